"""Stage `prefer`: a model and preferences -> a model that prefers what people prefer, without a reward model (DPO and family)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tutelage import log
from tutelage.config.stages import Prefer
from tutelage.data.family_source import FamilySource
from tutelage.data.pairs import PairFamilies
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
RATE_AT_7B = 1e-6


def run(config: Prefer, run: RunDir) -> dict[str, Any]:
    tuning.check_records(run.input("data"), ("Preference",), "read them with `tutelage data --kind preferences`")
    chosen = chosen_method(config)
    device = fitting.choose_device(config)
    start = run.input("model")
    model = fitting.load_start(start, config, device)
    words = TokenizerFolder.open(start)
    check_vocabulary(model.config, words.vocab_size, start)
    layout = tuning.layout_for(config, model)
    train, held_out = families_of(config, run, model, device, layout, method(config.method).reference)
    steps = tuning.steps_of(config, config.epochs, len(train))
    source = FamilySource(
        train, per_step=config.batch, micro_tokens=config.micro_tokens, layout=layout, seed=config.seed, unit="pairs",
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
        validation=None if held_out is None else validation(held_out, config, layout),
    )
    return {**fitting.fit(config, run, work, device), "method": config.method, "pairs": len(train), "packing": train.report}


def chosen_method(config: Prefer) -> Objective:
    """The objective of the settings. Raises `ConfigError` for a method that does not learn from preferences."""
    names = [name for name, row in TABLE.items() if row.data == "preferences"]
    if config.method in TABLE and config.method not in names:
        raise ConfigError(
            "this method does not learn from preferences", field="method", found=config.method, expected=", ".join(names)
        )
    return objective(config.method, **{key: getattr(config, key) for key in SETTINGS})


def families_of(
    config: Prefer, run: RunDir, model: Any, device: torch.device, layout: Any, reference: bool
) -> tuple[PairFamilies, PairFamilies | None]:
    """The pairs for training and those held out, where there are any, with the reference's log-probabilities."""
    length = tuning.max_length(config, model.config.max_position_embeddings)
    assert run.nested is not None
    tokens = run.nested("tokens", {"data": str(run.input("data")), "tokenizer": str(run.input("model"))})
    other = load(run.input("reference"), device=device) if config.reference else model
    found: list[PairFamilies | None] = []
    for split in ("train", "validation"):
        segments = Segments.open(tokens.path / "tokens" / split, vocabulary=model.config.vocab_size)
        if split == "validation" and not len(segments):
            found.append(None)
            continue
        families = PairFamilies(segments, length, config.too_long)
        for what, count in families.report.items():
            if count:
                log.say(f"{split}: {count:,} {what}")
        if reference:
            families.give("reference", tuning.reference_logprobs(
                Path(run.folder("reference")) / split, other, families, config, layout, device
            ))  # fmt: skip
        found.append(families)
    assert found[0] is not None
    return found[0], found[1]


def validation(held_out: PairFamilies, config: Prefer, layout: Any) -> Any:
    source = FamilySource(held_out, per_step=1, micro_tokens=config.micro_tokens, layout=layout, seed=0, unit="pairs")
    return source.validation()
