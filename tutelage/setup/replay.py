"""Fine-tuning must not destroy the base: plain text replayed beside what a stage teaches, and what the model forgot, measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tutelage import log
from tutelage.config.train import Loop
from tutelage.data.tokens.loader import StaticSource, eval_batches
from tutelage.data.tokens.replay import ReplaySource
from tutelage.data.tokens.shards import Segments
from tutelage.errors import DataError
from tutelage.evaluate import adaptation_effect
from tutelage.evaluate.bits import DocumentSums
from tutelage.files import read_json, write_json
from tutelage.models.interface import Batch
from tutelage.models.open import load
from tutelage.objectives.replay import with_replay
from tutelage.records import Document
from tutelage.rundir import RunDir
from tutelage.setup.extend import ParentRun
from tutelage.setup.trainer import TrainingSpec, result_of, run_training
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.train import distributed
from tutelage.train.hooks import Validate
from tutelage.train.loop import Hook

LONGEST_ROW = 512  # tokens of a row of general text, at most
EVALUATE_ROWS = 16  # rows of held-out general text whose loss is followed during a run


@dataclass(slots=True)
class GeneralText:
    """General text of a run: what is replayed, and the held-out documents that are measured before and after."""

    run: RunDir
    documents: dict[str, list[Document]]
    device: torch.device
    before: dict[str, DocumentSums]

    @classmethod
    def of(cls, config: Any, run: RunDir, device: torch.device) -> GeneralText | None:
        """Measures the start on the held-out documents of `general`; None (which is said) where there is no general text."""
        if config.general is None:
            log.say(
                "no general text (`general`): nothing is replayed, and how much plain text is forgotten is not measured",
                style="yellow",
            )
            return None
        found = adaptation_effect.held_out(run.input("general"), config.max_documents, "`general`")
        documents = {"general": found}
        return cls(run, documents, device, measured(run, "before", run.input("model"), documents, device))

    def replayed(self, config: Any, spec: TrainingSpec, tokenizer: Path) -> TrainingSpec:
        """`spec` with `replay_share` of each step's tokens taken from general text, and its held-out loss followed."""
        train, held_out = general_segments(self.run, tokenizer)
        row = min(spec.length, LONGEST_ROW)
        hooks = validation_hook(held_out, row, config.evaluate_every or math.ceil(spec.steps / 10))
        make_hooks = spec.hooks
        spec = replace(spec, objective=with_replay(spec.objective), hooks=lambda job: {**make_hooks(job), **hooks})
        if not config.replay_share:
            return spec
        share = config.replay_share
        wanted = spec.tokens / spec.steps * share / (1 - share) / row
        rows = max(1, round(wanted / distributed.world())) * distributed.world()
        text = StaticSource(
            train, row_length=row, rows_per_step=rows, micro_rows=max(1, spec.micro[0] * spec.micro[1] // row),
            seed=self.run.seed, policy="split", rank=log.rank(), world=distributed.world(),
        )  # fmt: skip
        log.say(f"replay: {rows} rows of {row} tokens of general text a step, weight {config.replay_weight:g}")
        for line in text.describe():
            log.say(line)
        return replace(
            spec, source=ReplaySource(spec.source, text), weights={**spec.weights, "replay": config.replay_weight},
            tokens=spec.tokens + rows * row * spec.steps,
        )  # fmt: skip

    def forgotten(self, config: Loop) -> dict[str, Any]:
        """Facts of the run: bits per byte of general text before and after. Prints them. For rank 0, after training."""
        return report(
            self.before, measured(self.run, "after", result_of(config, self.run), self.documents, self.device), self.run.seed
        )


def train_with_replay(
    config: Any, run: RunDir, spec: TrainingSpec, tokenizer: Path, device: torch.device, parent: ParentRun | None = None
) -> dict[str, Any]:
    """`run_training` with the general text of the settings, if they name any. Returns the facts of the run."""
    general = GeneralText.of(config, run, device)
    if general is None:
        return run_training(config, run, spec, device, parent)
    facts = run_training(config, run, general.replayed(config, spec, tokenizer), device, parent)
    return {**facts, **general.forgotten(config)} if log.rank() == 0 else facts


def general_segments(run: RunDir, tokenizer: Path) -> tuple[Segments, Segments]:
    """Tokens of the general text, made now or found. Raises `DataError` where there are fewer tokens than a row has."""
    assert run.nested is not None
    tokens = run.nested("tokens", {"data": str(run.input("general")), "tokenizer": str(tokenizer)})
    train, held_out = (Segments.open(tokens.path / "tokens" / part) for part in ("train", "validation"))
    if train.kind != "text" or not len(train):
        raise DataError(
            "general text is plain documents, and there are none here", file=run.input("general"), field="general",
            expected="records made by `tutelage data` of kind documents", fix="give the corpus that the base was trained on",
        )  # fmt: skip
    return train, held_out


def validation_hook(held_out: Segments, row: int, every: int) -> dict[str, Hook]:
    """The next-token loss on held-out general text, every so many steps, under the name `general`."""
    batches: list[Batch] = []
    tokens = 0.0
    for item in eval_batches(held_out, row_length=row, stride=row // 2, micro_rows=4):
        batches.append(replace(item.batch, replay=True))
        tokens += float(item.batch.weights.sum())
        if len(batches) * 4 >= EVALUATE_ROWS:
            break
    per_byte = held_out.totals["supervised"] / held_out.totals["bytes"] if held_out.totals["bytes"] else 0.0
    return (
        {"general": Validate(batches, {"replay_tokens": tokens}, every, per_byte, of="general", term="replay")} if batches else {}
    )


def measured(
    run: RunDir, name: str, model: Path, texts: dict[str, list[Document]], device: torch.device
) -> dict[str, DocumentSums]:
    """What the model of a folder pays for each document, kept in the run: a resumed run does not measure again."""
    file = run.folder(f"{name}.json")
    if not file.exists():
        log.say(f"measuring {sum(map(len, texts.values())):,} held-out documents {name} training")
        words, loaded = TokenizerFolder.open(model), load(model, device=device)
        found = {kind: adaptation_effect.measure(loaded, words, documents, str(device)) for kind, documents in texts.items()}
        if log.rank() != 0:
            return found
        write_json(file, {kind: sums.to_json() for kind, sums in found.items()})
    return {kind: adaptation_effect.to_sums(rows) for kind, rows in read_json(file).items()}


def report(before: Mapping[str, DocumentSums], after: Mapping[str, DocumentSums], seed: int) -> dict[str, Any]:
    """Gain and loss as facts, printed."""
    rows = {kind: adaptation_effect.effect(before[kind], after[kind], seed) for kind in after}
    log.console.print(adaptation_effect.table(rows))
    verdict = "; ".join(adaptation_effect.verdict(kind, found) for kind, found in rows.items())
    log.say(verdict)
    return {"adaptation_effect": rows, "verdict": verdict}
