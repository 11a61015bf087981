"""What `pretrain` and `sft` share: rows of text, from settings, a model and tokens to what `fit` takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage import log
from tutelage.chat.render import check_supervision
from tutelage.config.train import Train
from tutelage.data.groups.dropped import UNTRAINED, say_left_out
from tutelage.data.tokens.loader import Source, StaticSource, eval_batches
from tutelage.data.tokens.shards import Segments
from tutelage.models.adapters.attach import inference_view
from tutelage.models.config import check_vocabulary
from tutelage.models.interface import Batch
from tutelage.objectives import objective
from tutelage.rundir import RunDir
from tutelage.setup.extend import ParentRun, say_rate
from tutelage.setup.hyperparameters import Hyperparameters
from tutelage.setup.inputs import record_type, require_record_type
from tutelage.setup.trainer import TrainingSpec, write_model
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.train import distributed, hooks
from tutelage.train.loop import Hook


def open_segments(config: Train, run: RunDir, tokenizer: Path, vocabulary: int, data: str = "data") -> tuple[Segments, Segments]:
    """Tokens of the input `data`, made now or found, as (train, validation). Raises `DataError` for records that are no texts to
    write on: of a preference the rejected answer would be learnt too."""
    require_record_type(record_type(run.input(data)), ("Document", "Conversation"), field=data, file=run.input(data))
    assert run.nested is not None
    tokens = run.nested("tokens", {"data": str(run.input(data)), "tokenizer": str(tokenizer)})
    folder = tokens.path / "tokens"
    return tuple(Segments.open(folder / split, vocabulary=vocabulary) for split in ("train", "validation"))  # type: ignore[return-value]


def next_token_spec(
    config: Train,
    run: RunDir,
    model: Any,
    segments: tuple[Segments, Segments],
    tokenizer: Path,
    numbers: Hyperparameters,
    parent: ParentRun | None,
    source: Source | None = None,
    beside: Mapping[str, Hook] | None = None,
) -> TrainingSpec:
    """Training `model` to predict the next token of texts, from the last step of `parent` if there is one. `source`: where rows
    come from, if not from `segments` alone; `beside`: more hooks."""
    totals = segments[0].totals
    if segments[0].kind == "chat":  # a segment's first token is never a target
        check_supervision(totals["supervised"], totals["tokens"] - totals["segments"], "chat")
    words = TokenizerFolder.open(tokenizer)
    check_vocabulary(model.config, words.vocab_size, tokenizer)
    if parent is not None:
        say_rate(parent, config, numbers.steps)
    row, steps = numbers.sequence_length, numbers.steps - (parent.steps if parent else 0)
    held_out = segments[1]
    return TrainingSpec(
        parts={"policy": model},
        source=source or make_source(config, run, segments[0], numbers),
        objective=objective("next_token"),
        steps=numbers.steps,
        rates=numbers.rates,
        shape=model.config.to_hf(),
        length=row,
        micro=(numbers.micro_rows, row),
        tokens=steps * numbers.rows_per_step * row,
        numbers=numbers.derived,
        write=lambda: write_model(model, run, tokenizer, words.stop_ids),
        validation=validation(config, held_out, numbers),
        per_byte=tokens_per_byte(held_out),
        hooks=lambda job: {**sampling(config, model, words, held_out, numbers), **(beside or {})},
    )


def make_source(config: Train, run: RunDir, segments: Segments, numbers: Hyperparameters) -> StaticSource:
    """The batches of this rank. Says what they are made of and what packing did."""
    source = StaticSource(
        segments,
        row_length=numbers.sequence_length,
        rows_per_step=numbers.rows_per_step,
        micro_rows=numbers.micro_rows,
        seed=run.seed,
        policy=config.too_long,
        packing=config.packing,
        trim=config.packing == "none",
        rank=log.rank(),
        world=distributed.world(),
    )
    for line in source.describe():
        log.say(line)
    say_packing(source.report, numbers.sequence_length)
    return source


def validation(config: Train, held_out: Segments, numbers: Hyperparameters) -> tuple[list[Batch], dict[str, float]] | None:
    """Held-out batches that are measured during a run, with their counts."""
    if not len(held_out) or not held_out.totals["supervised"]:
        return None
    batches, counts = [], {"tokens": 0.0}
    for item in eval_batches(
        held_out, row_length=numbers.sequence_length, stride=numbers.sequence_length // 2, micro_rows=numbers.micro_rows
    ):
        batches.append(item.batch)
        counts["tokens"] += float(item.batch.weights.sum())
        if len(batches) * numbers.micro_rows >= config.evaluate_rows:
            break
    return batches, counts


def tokens_per_byte(held_out: Segments) -> float:
    totals = held_out.totals
    return totals["supervised"] / totals["bytes"] if held_out.kind == "text" and totals["bytes"] else 0.0


def sampling(config: Train, model: Any, words: TokenizerFolder, held_out: Segments, numbers: Hyperparameters) -> dict[str, Hook]:
    """The hook that shows what the model says, where it can generate."""
    prompts = sample_prompts(held_out, words)
    if not prompts or not (model.traits.cache or model.traits.virtual_tokens):
        return {}
    every = config.sample_every or max(1, math.ceil(numbers.steps / 5))
    return {"sample": hooks.Sample(lambda: samples(model, words, prompts, numbers.sequence_length), every)}


def sample_prompts(held_out: Segments, words: TokenizerFolder, count: int = 3, length: int = 24) -> list[list[int]]:
    """Beginnings of held-out documents; of a conversation, all before its first supervised token."""
    out = []
    for i in range(min(count, len(held_out))):
        ids = held_out.ids(i).tolist()
        supervised = held_out.mask(i).tolist() if held_out.kind == "chat" else []
        out.append(ids[: supervised.index(1)] if 1 in supervised else ids[:length])
    return [p for p in out if p]


def samples(model: Any, words: TokenizerFolder, prompts: list[list[int]], limit: int) -> list[dict[str, str]]:
    """What the model says now, greedily."""
    from tutelage.engine import Engine, Sampling

    answer = min(40, limit // 2)
    model.eval()
    plain, lora = inference_view(model)
    engine = Engine(plain, slots=len(prompts), max_length=limit)
    prompts = [p[-(limit - answer) :] for p in prompts]
    done = engine.generate(prompts, Sampling(max_tokens=answer, temperature=0.0, stop_ids=words.stop_ids), lora)
    model.train()
    return [{"prompt": words.decode(p), "text": words.decode(c.ids)} for p, c in zip(prompts, done, strict=True)]


NOT_LOSSES = ("segments", "rows", "fill", "targets", "pieces", "tokens")  # said elsewhere
LOSSES = {
    "dropped_long": "left out, too long for a row",
    "cut_left": "cut at the left",
    "cut_right": "cut at the right",
    "pieces_unsupervised": UNTRAINED,
}


def say_packing(report: dict[str, float], row_length: int) -> None:
    """Nothing is dropped or cut silently (promise 2)."""
    for key, value in report.items():
        if value and key not in (*NOT_LOSSES, *LOSSES):
            log.say(f"  {key}: {value:,.0f}")
    counted = {LOSSES[key]: report[key] for key in LOSSES if key in report}
    fix = f"raise sequence_length ({row_length}), or set too_long to split, left or right"
    say_left_out({"segments": report["segments"], **counted}, fix=fix)


def first_kept(segments: Segments, row_length: int, too_long: str | None) -> int:
    """The first segment that is learnt from: one with supervised tokens, and no longer than a row where longer ones are left
    out. 0 where there is none, which packing refuses."""
    good = segments.supervised > 0
    if (too_long or ("split" if segments.kind == "text" else "drop")) == "drop":
        good = good & (segments.lengths <= row_length)
    return int(good.argmax()) if good.any() else 0
