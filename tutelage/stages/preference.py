"""Stage `preference`: a model and preferences or ratings -> a model that answers as people prefer, without a reward model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from tutelage import log
from tutelage.config.stages import Preference
from tutelage.data.groups.kto import KtoGroups, verdicts
from tutelage.data.groups.pairs import PreferencePairs, margins
from tutelage.data.groups.source import GroupSource
from tutelage.data.tokens.shards import Segments
from tutelage.errors import ConfigError
from tutelage.models.adapters.attach import reference_weights
from tutelage.models.config import check_vocabulary
from tutelage.models.open import load
from tutelage.objectives import method
from tutelage.rundir import RunDir
from tutelage.setup import answers, trainer
from tutelage.setup.feedback import read_rows
from tutelage.setup.methods import preference_method
from tutelage.setup.replay import train_with_replay
from tutelage.setup.trainer import TrainingSpec
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.train import distributed

RECORDS = {"preferences": "Preference", "ratings": "Rating"}  # what a method learns from -> the records that hold it
UNITS = {"preferences": "pairs", "ratings": "answers"}
RATE_AT_7B = 1e-6

Groups = PreferencePairs | KtoGroups


def run(config: Preference, run: RunDir) -> dict[str, Any]:
    chosen = preference_method(config)
    kind = method(config.method).data
    device = trainer.choose_device(config)
    start = run.input("model")
    model = trainer.load_start(start, config, device, run.seed)
    words = TokenizerFolder.open(start)
    check_vocabulary(model.config, words.vocab_size, start)
    layout = answers.layout_for(config, model)
    length = answers.max_length(config, model)
    train = groups_of(config, run, model, "train", length)
    held_out = answers.held_out(lambda: groups_of(config, run, model, "validation", length))
    assert train is not None
    steps = answers.steps_of(config, config.epochs, len(train))
    if method(config.method).reference:
        give_reference(config, run, model, {"train": train, "validation": held_out}, layout, device)
    source = source_of(train, config, layout, UNITS[kind], config.batch)
    log.say("\n".join(source.describe()))
    rates = answers.rates(config, answers.size_of(model), RATE_AT_7B)
    work = TrainingSpec(
        parts={"policy": model},
        source=source,
        objective=chosen,
        steps=steps,
        rates=rates,
        shape=model.config.to_hf(),
        length=length,
        micro=(1, config.micro_tokens),
        tokens=float(train.sizes(layout).mean()) * config.batch * steps,
        numbers={"max_length": length, **asdict(rates)},
        write=lambda: trainer.write_model(model, run, start, words.stop_ids),
        validation=None if held_out is None else source_of(held_out, config, layout, UNITS[kind], 1).validation(),
    )
    return {
        **train_with_replay(config, run, work, start, device),
        "method": config.method,
        "answers": len(train),
        "packing": train.report,
    }


def groups_of(config: Preference, run: RunDir, model: Any, part: str, length: int) -> Groups | None:
    """The prompt groups of one part; None for a held-out part that holds nothing. Says what is left out."""
    assert run.nested is not None
    tokens = run.nested("tokens", {"data": str(run.input("data")), "tokenizer": str(run.input("model"))})
    segments = Segments.open(tokens.path / "tokens" / part, vocabulary=model.config.vocab_size)
    rated = segments.record == "Rating"
    if part == "validation" and len(segments) < 2 + 2 * rated:
        log.say(f"validation: {len(segments)} answers are too few to measure anything on")
        return None
    rows = read_rows(run.input("data") / f"{part}.jsonl")
    if rated:
        prompt_groups: Groups = KtoGroups(segments, verdicts(rows), length, config.too_long)
        log.say(f"{part}: {prompt_groups.balance(config.desirable_weight or 1.0, config.undesirable_weight or 1.0)}")  # type: ignore[union-attr]
    else:
        prompt_groups = PreferencePairs(segments, length, config.too_long)
        given = margins(rows)
        if config.offset and given is None:
            raise ConfigError(
                "the data has no margins", field="offset", found=config.offset, fix="leave it out, or give `margin`"
            )
        if given is not None:
            prompt_groups.set_values("margin", given[prompt_groups.kept])
    if part == "train":
        first = int(prompt_groups.kept[0]) * (1 if rated else 2)  # a pair has two segments
        answers.show_first(segments, TokenizerFolder.open(run.input("model")), run.input("data"), first)
    answers.say_left_out(prompt_groups.report, part, length, config.too_long)
    if part == "validation" and len(prompt_groups) < answers.FEW:
        unit = "answers" if rated else "pairs"
        log.say(f"validation: {len(prompt_groups)} {unit} say little: an accuracy on so few is chance", style="yellow")
    return prompt_groups


def give_reference(
    config: Preference, run: RunDir, model: Any, parts: dict[str, Groups | None], layout: Any, device: torch.device
) -> None:
    """Computes the reference log-probabilities of every answer, once."""
    if config.reference is not None:
        answers.check_tokens(run, "reference")
    other = load(run.input("reference"), device=device) if config.reference else model
    for name, prompt_groups in parts.items():
        if prompt_groups is not None:
            folder = run.folder("reference") / name
            with reference_weights(other):
                prompt_groups.set_values(
                    "reference", answers.reference_logprobs(folder, other, prompt_groups, config, layout, device)
                )


def source_of(prompt_groups: Groups, config: Preference, layout: Any, unit: str, per_step: int) -> GroupSource:
    alone = per_step == 1
    return GroupSource(
        prompt_groups, per_step=per_step, micro_tokens=config.micro_tokens, layout=layout, seed=config.seed, unit=unit,
        rank=0 if alone else log.rank(), world=1 if alone else distributed.world(),
    )  # fmt: skip
