"""Stage `prefer`: a model and what people prefer -> a model that prefers it too, without a reward model.

Preferences for DPO and its family, ORPO, SimPO and CPO; ratings, of single answers, for KTO.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tutelage import log
from tutelage.config.stages import Prefer
from tutelage.data.family_source import FamilySource
from tutelage.data.pairs import PairFamilies, margins
from tutelage.data.rated import RatedFamilies, verdicts
from tutelage.data.tokens import Segments
from tutelage.errors import ConfigError
from tutelage.models.config import check_vocabulary
from tutelage.models.export import save as save_model
from tutelage.models.load import load
from tutelage.objectives import TABLE, Objective, method, objective
from tutelage.rundir import RunDir
from tutelage.stages import fitting, tuning
from tutelage.stages.fitting import Work
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.train import distributed

SETTINGS = ("beta", "label_smoothing")  # of this stage, that are given to the method
RECORDS = {"preferences": "Preference", "ratings": "Rating"}  # by what a method learns from
RATE_AT_7B = 1e-6
Judged = PairFamilies | RatedFamilies


def run(config: Prefer, run: RunDir) -> dict[str, Any]:
    chosen, kind = chosen_method(config), method(config.method).data
    tuning.check_records(run.input("data"), (RECORDS[kind],), f"read them with `tutelage data --kind {kind}`")
    unit = "answers" if kind == "ratings" else "pairs"
    device = fitting.choose_device(config)
    start = run.input("model")
    model = fitting.load_start(start, config, device)
    words = TokenizerFolder.open(start)
    check_vocabulary(model.config, words.vocab_size, start)
    layout = tuning.layout_for(config, model)
    train, held_out = families_of(config, run, model, device, layout, method(config.method).reference)
    steps = tuning.steps_of(config, config.epochs, len(train))
    source = FamilySource(
        train, per_step=config.batch, micro_tokens=config.micro_tokens, layout=layout, seed=config.seed, unit=unit,
        rank=log.rank(), world=distributed.world(),
    )  # fmt: skip
    log.say("\n".join(source.describe()))
    parameters = sum(p.numel() for p in model.parameters())
    length = tuning.max_length(config, model.config.max_position_embeddings)
    rates = tuning.rates(config, parameters, RATE_AT_7B)
    work = Work(
        parts={"policy": model},
        source=source,
        objective=chosen,
        steps=steps,
        rates=rates,
        shape=model.config.to_hf(),
        length=length,
        micro=(1, config.micro_tokens),
        tokens=float(train.sizes(layout).mean()) * config.batch * steps,
        numbers={"max_length": length, "lr": rates.lr, "matrix_lr": rates.matrix_lr, "embedding_lr": rates.embedding_lr},
        write=lambda: save_model(model, run.folder("model"), start, stop_ids=words.stop_ids),
        validation=None if held_out is None else validation(held_out, config, layout, unit),
    )
    return {**fitting.fit(config, run, work, device), "method": config.method, unit: len(train), "packing": train.report}


def chosen_method(config: Prefer) -> Objective:
    """The objective of the settings. Raises `ConfigError` for a method that does not train a model from what people prefer."""
    names = [name for name, row in TABLE.items() if row.data in RECORDS and row.part == "policy"]
    if config.method in TABLE and config.method not in names:
        raise ConfigError(
            "this method does not train a model from what people prefer",
            field="method",
            found=config.method,
            expected=", ".join(names),
        )
    return objective(config.method, **{**config.settings, **{key: getattr(config, key) for key in SETTINGS}})


def families_of(
    config: Prefer, run: RunDir, model: Any, device: torch.device, layout: Any, reference: bool
) -> tuple[Judged, Judged | None]:
    """The families for training and those held out, where there are any, with the reference's log-probabilities."""
    length = tuning.max_length(config, model.config.max_position_embeddings)
    assert run.nested is not None
    tokens = run.nested("tokens", {"data": str(run.input("data")), "tokenizer": str(run.input("model"))})
    other = load(run.input("reference"), device=device) if config.reference else model
    found: list[Judged | None] = []
    for split in ("train", "validation"):
        segments = Segments.open(tokens.path / "tokens" / split, vocabulary=model.config.vocab_size)
        if split == "validation" and len(segments) < 2:
            found.append(None)
            continue
        families = judged(segments, run.input("data") / f"{split}.jsonl", length, config)
        for what, count in families.report.items():
            if count:
                log.say(f"{split}: {count:,} {what}")
        if split == "train" and isinstance(families, RatedFamilies):
            weights = {key: config.settings[key] for key in ("desirable_weight", "undesirable_weight") if key in config.settings}
            log.say(families.balance(**weights))
        if reference:
            families.give("reference", tuning.reference_logprobs(
                Path(run.folder("reference")) / split, other, families, config, layout, device
            ))  # fmt: skip
        found.append(families)
    assert found[0] is not None
    return found[0], found[1]


def judged(segments: Segments, records: Path, length: int, config: Prefer) -> Judged:
    """Pairs, with their margins where there are any; or rated answers."""
    with records.open(encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    if segments.record == "Rating":
        return RatedFamilies(segments, verdicts(rows), length, config.too_long)
    pairs, known = PairFamilies(segments, length, config.too_long), margins(rows)
    if known is not None:
        pairs.give("margin", known[pairs.kept])
    return pairs


def validation(held_out: Judged, config: Prefer, layout: Any, unit: str) -> Any:
    source = FamilySource(held_out, per_step=1, micro_tokens=config.micro_tokens, layout=layout, seed=0, unit=unit)
    return source.validation()
