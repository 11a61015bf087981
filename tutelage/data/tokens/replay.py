"""Replay: rows of plain text added to the batches of a stage that teaches something else, so that the base is not forgotten."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tutelage.data.tokens.loader import GlobalBatch, StaticSource
from tutelage.models.interface import Batch

if TYPE_CHECKING:
    from tutelage.train.loop import Source


@dataclass(slots=True)
class ReplaySource:
    """The batches of `source`, each with one global batch of `text` behind it. The rows of text are marked `Batch.replay`; their
    supervised tokens are counted as `replay_tokens`, so that neither part changes what the other is divided by."""

    source: Source
    text: StaticSource

    def next(self, step: int) -> GlobalBatch:
        return joined(self.source.next(step), self.text.next(step))

    def largest(self) -> GlobalBatch:
        return joined(self.source.largest(), self.text.largest())

    def state_dict(self) -> dict[str, Any]:
        return {"source": self.source.state_dict(), "replay": self.text.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state["source"])
        self.text.load_state_dict(state["replay"])

    def on_weights(self, version: int) -> None:
        self.source.on_weights(version)


def joined(batch: GlobalBatch, text: GlobalBatch) -> GlobalBatch:
    """One global batch of both."""
    count = len(batch.micro)
    counts = {
        **batch.counts,
        "replay_tokens": text.counts["tokens"],
        "processed": batch.counts["processed"] + text.counts["processed"],
    }

    def apart(index: int) -> list[Batch]:
        if index >= count:
            return [replace(row, replay=True) for row in text.rows_apart(index - count)]
        return batch.rows_apart(index)

    micro = [*batch.micro, *(replace(rows, replay=True) for rows in text.micro)]
    return GlobalBatch(micro, counts, [*batch.rows, *text.rows], apart)
