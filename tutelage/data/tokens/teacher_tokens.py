"""A teacher's likeliest tokens at each supervised place of some texts: computed once, kept in files, read as streams of batches.

`folder/plan.json` says what they were made of. `part_00000.ids.npy` [n,k] and `part_00000.logprobs.npy` [n,k] float32 hold the
supervised targets of some segments in their order; each file appears whole, so that a killed process goes on where it was. A
teacher reads a text through windows of its own, in which it may see more before a token than the student's row has.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tutelage import log
from tutelage.data.tokens.loader import GlobalBatch, Row, StaticSource, assemble
from tutelage.data.tokens.pack import Ints, eval_rows
from tutelage.data.tokens.shards import Segments, id_type
from tutelage.files import read_json, whole_file, write_json
from tutelage.models.interface import Answers, Batch

PART = 1 << 16  # supervised targets in a file, about
ROWS = 4096  # tokens that the teacher reads at a time

Likeliest = Callable[[Batch], tuple[Tensor, Tensor]]  # (ids [N,k], log-probabilities [N,k]) at a batch's supervised places


def likeliest(teacher: Any, k: int, temperature: float, device: torch.device, chunk: int = 256) -> Likeliest:
    """The k likeliest tokens of a model at a temperature, with their log-probabilities among all tokens."""

    @torch.no_grad()
    def of(batch: Batch) -> tuple[Tensor, Tensor]:
        batch = batch.to(device)
        hidden = teacher(batch).hidden.flatten(0, 1)[batch.weights.flatten().nonzero().squeeze(1)]
        found = []
        for part in hidden.split(chunk):  # the logits of all would be too many
            found.append((teacher.lm_head.logits(part).float() / temperature).log_softmax(1).topk(k))
        return torch.cat([f.indices for f in found]).cpu(), torch.cat([f.values for f in found]).cpu()

    return of


class KeptTokens:
    """The kept tokens of one split. `parts` are made by `keep`."""

    def __init__(self, folder: Path, segments: Segments) -> None:
        self.folder, self.segments = folder, segments
        self.first: Ints = np.concatenate([[0], np.cumsum(segments.supervised)])  # of each segment's targets
        self.groups = _groups(segments.supervised)
        self._starts = self.first[[begin for begin, _ in self.groups]]
        self._parts: dict[int, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {}

    def file(self, part: int, name: str) -> Path:
        return self.folder / f"part_{part:05d}.{name}.npy"

    def there(self, part: int) -> bool:
        return self.file(part, "logprobs").is_file()  # written last

    def of_piece(self, segment: int, start: int, stop: int, context: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Ids and log-probabilities [n,k] of the supervised targets in a piece."""
        at = slice(*self.span(segment, start, stop, context))
        part = int(np.searchsorted(self._starts, self.first[segment], "right")) - 1
        if part not in self._parts:
            self._parts[part] = tuple(np.load(self.file(part, n), mmap_mode="r") for n in ("ids", "logprobs"))
        ids, logprobs = self._parts[part]
        own = slice(at.start - self._starts[part], at.stop - self._starts[part])
        return ids[own], logprobs[own]

    def span(self, segment: int, start: int, stop: int, context: int) -> tuple[int, int]:
        """Numbers of the first supervised target of a piece and of the one after its last, counted over all segments."""
        begin = start + context + 1
        before = int(self.segments.mask(segment, 1, begin).sum())
        first = int(self.first[segment]) + before
        return first, first + int(self.segments.mask(segment, begin, stop).sum())


def _groups(supervised: Ints) -> list[tuple[int, int]]:
    """Runs of segments that have about PART supervised targets together: (first, one past the last)."""
    out, begin, size = [], 0, 0
    for i, count in enumerate(supervised.tolist()):
        size += count
        if size >= PART or i == len(supervised) - 1:
            out.append((begin, i + 1))
            begin, size = i + 1, 0
    return out


def keep(
    store: KeptTokens, top: Likeliest, k: int, plan: dict[str, Any], *, row_length: int, rank: int = 0, world: int = 1
) -> int:
    """Makes the parts that are not there yet, each rank its own, and waits for those of others. Parts of another plan are removed
    first. Returns how many of this rank's were missing."""
    made_for = store.folder / "plan.json"
    if rank == 0 and not (made_for.is_file() and read_json(made_for) == plan):
        shutil.rmtree(store.folder, ignore_errors=True)
        write_json(made_for, plan)
    while not (made_for.is_file() and read_json(made_for) == plan):
        time.sleep(0.2)
    own = [p for p in range(rank, len(store.groups), world) if not store.there(p)]
    for part in log.counted(own, "asking the teacher"):
        _make(store, part, top, k, row_length)
    while not all(store.there(p) for p in range(len(store.groups))):
        time.sleep(0.2)
    return len(own)


def _make(store: KeptTokens, part: int, top: Likeliest, k: int, row_length: int) -> None:
    segments, (begin, end) = store.segments, store.groups[part]
    origin, size = int(store.first[begin]), int(store.first[end] - store.first[begin])
    ids, logprobs = np.zeros((size, k), id_type(segments.vocabulary)), np.zeros((size, k), np.float32)
    for rows in _rows(segments, begin, end, row_length):
        batch = assemble(rows, row_length, trim=True)
        found, scores = top(batch)
        places = [np.arange(*store.span(*piece)) for row in rows for piece in _pieces(row)]
        at = np.concatenate(places) - origin
        ids[at], logprobs[at] = found.numpy(), scores.numpy()
    for name, values in (("ids", ids), ("logprobs", logprobs)):
        with whole_file(store.file(part, name), "wb") as f:
            np.save(f, values, allow_pickle=False)


def _rows(segments: Segments, begin: int, end: int, row_length: int) -> Iterator[list[Row]]:
    """The texts of some segments, some rows at a time, every target once."""
    plan = eval_rows(segments.lengths[begin:end], row_length, max(1, row_length // 2))
    several = max(1, ROWS // row_length)
    for at in range(0, len(plan), several):
        rows = [plan.row(i) for i in range(at, min(at + several, len(plan)))]
        yield [Row(segments, replace(pieces, segment=pieces.segment + begin)) for pieces in rows]


def _pieces(row: Row) -> Iterator[tuple[int, int, int, int]]:
    p = row.pieces
    yield from zip(p.segment.tolist(), p.start.tolist(), p.stop.tolist(), p.context.tolist(), strict=True)


def with_streams(batch: Batch, ids: Tensor, logprobs: Tensor) -> Batch:
    """A batch of rows whose supervised places bring what a teacher thinks of them: each row counts as an answer."""
    places = batch.weights.flatten().nonzero().squeeze(1)
    rows, width = batch.shape
    streams = {"top_ids": ids, "top_logprobs": logprobs}
    last = (torch.arange(rows) + 1) * width - 1
    return replace(batch, answers=Answers(places, batch.targets.flatten()[places], places // width, last, streams))


class TaughtSource:
    """A source of rows whose batches bring the kept tokens of a teacher."""

    def __init__(self, inner: StaticSource, store: KeptTokens, plan: dict[str, Any]) -> None:
        self.inner, self.store, self.plan = inner, store, plan

    def next(self, step: int) -> GlobalBatch:
        return self._taught(self.inner.next(step), self.inner.rows_of(step))

    def largest(self) -> GlobalBatch:
        return self._taught(self.inner.largest(), self.inner.stream.largest(self.inner.rows_per_step))

    def _taught(self, batch: GlobalBatch, rows: list[Row]) -> GlobalBatch:
        mine, size = rows[self.inner.rank :: self.inner.world], self.inner.micro_rows
        groups = [mine[i : i + size] for i in range(0, len(mine), size)]
        width = self.inner.row_length, self.inner.trim

        def apart(i: int) -> list[Batch]:
            return [self._with_streams(assemble([row], *width), [row]) for row in groups[i]]

        taught = [self._with_streams(micro, group) for micro, group in zip(batch.micro, groups, strict=True)]
        return replace(batch, micro=taught, apart=apart)

    def _with_streams(self, batch: Batch, rows: list[Row]) -> Batch:
        found = [self.store.of_piece(*piece) for row in rows for piece in _pieces(row)]
        ids, logprobs = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return with_streams(batch, torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(logprobs))

    def state_dict(self) -> dict[str, Any]:
        return {**self.inner.state_dict(), "teacher": self.plan}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict({k: v for k, v in state.items() if k != "teacher"})

    def on_weights(self, version: int) -> None:
        self.inner.on_weights(version)
