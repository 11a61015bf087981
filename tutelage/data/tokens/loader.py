"""Batches of static data: a pure function of (seed, step), the same global batch on any number of ranks.

A *stream* is the endless sequence of rows of one tokens folder (`pack.RowOrder`). A source takes the rows of a step from one
stream (`StaticSource`) or from several by weight (`MixSource`), gives row j of the global batch to rank `j % world`, and cuts
each rank's rows into micro-batches. What the loop divides by is counted from the plan, for all ranks, without communication.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from tutelage.config.base import flat
from tutelage.data.tokens.pack import Ints, Pieces, Plan, RowOrder, eval_rows, shuffled
from tutelage.data.tokens.shards import Segments
from tutelage.errors import ArtifactError, ConfigError
from tutelage.models.interface import Batch

TRIM_TO = 64  # a trimmed micro-batch is a multiple of this wide, so that few shapes occur
BY_ROW = ("ids", "segments", "positions", "targets", "weights")  # tensors of a batch that have a row for each row
MIX_BLOCK = 1000  # rows in which a mixture's shares are exact


@dataclass(slots=True, frozen=True)
class GlobalBatch:
    """What one optimizer step trains on: this rank's part, and what is counted over all ranks.

    `counts`: `tokens` (supervised targets), `sequences` (pieces or answers), `processed` (tokens without padding), and the other
    units of an objective's terms (`pairs`).
    """

    micro: list[Batch]
    counts: dict[str, float]
    rows: list[tuple[str, ...]]  # record ids of each row of this rank, in the order of the micro-batches
    apart: Callable[[int], list[Batch]] | None = None  # micro-batch i in its smallest parts; None: its rows are

    def rows_apart(self, index: int) -> list[Batch]:
        """Micro-batch `index` in its smallest parts."""
        if self.apart is not None:
            return self.apart(index)
        micro = self.micro[index]
        one = [slice(r, r + 1) for r in range(len(micro.ids))]
        return [replace(micro, **{n: getattr(micro, n)[r] for n in BY_ROW}, rows=micro.rows and micro.rows[r]) for r in one]


class Source(Protocol):
    """Where batches come from. Static data is a function of (seed, step)."""

    def next(self, step: int) -> GlobalBatch: ...
    def largest(self) -> GlobalBatch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def on_weights(self, version: int) -> None: ...


@dataclass(slots=True, frozen=True)
class Row:
    """A row of a batch: pieces of one tokens folder."""

    segments: Segments
    pieces: Pieces

    @property
    def tokens(self) -> int:
        return int(self.pieces.tokens.sum())

    @property
    def targets(self) -> int:
        p = self.pieces
        return int(self.segments.supervised_in(p.segment, p.start + p.context, p.stop).sum())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.segments.record_id(s) for s in self.pieces.segment.tolist())


class Stream:
    """The endless rows of one tokens folder. `report` says what packing did with the first epoch (see `pack.plan_rows`)."""

    def __init__(self, segments: Segments, row_length: int, *, seed: int, policy: str, packing: str) -> None:
        self.segments, self.row_length = segments, row_length
        count = None if segments.kind == "text" else segments.supervised_in
        self.order = RowOrder(segments.lengths, row_length, seed=seed, policy=policy, supervised=count, packing=packing)
        self.report = dict(self.order.plan(0).report)
        self.identity = {"data": segments.digest, "seed": seed, "row_length": row_length, "policy": policy, "packing": packing}

    def row(self, number: int) -> Row:
        return Row(self.segments, self.order.row(number))

    def largest(self, count: int) -> list[Row]:
        """The `count` rows of the first epoch with the most tokens."""
        plan = self.order.plan(0)
        best = np.argsort(-plan.row_tokens(), kind="stable")[:count]
        return [Row(self.segments, plan.row(int(i))) for i in np.resize(best, count)]

    def describe(self) -> str:
        r, folder = self.report, self.segments.folder
        size = f"{r['segments']:,.0f} segments, {r['rows']:,.0f} rows of {self.row_length} an epoch"
        use = f"{100 * r['fill']:.1f}% full, {r['targets']:,.0f} targets"
        return f"{folder.parent.name}/{folder.name}: {size}, {use}  [{fingerprint(self.identity)}]"


class _Source(ABC):
    """What both sources share: assembling the rows of a step, and state."""

    def __init__(self, *, row_length: int, rows_per_step: int, micro_rows: int, rank: int, world: int, trim: bool) -> None:
        for name, value in (("rows_per_step", rows_per_step), ("micro_rows", micro_rows)):
            if value < 1:
                raise ConfigError("a batch needs rows", field=name, found=value, expected="1 or more")
        if rows_per_step % world:
            raise ConfigError(
                "the rows of a step can't be divided evenly among the ranks",
                field="rows_per_step",
                found=f"{rows_per_step} rows, {world} ranks",
                expected="a multiple of the number of ranks",
                fix=f"use {-(-rows_per_step // world) * world} rows",
            )
        self.row_length, self.rows_per_step, self.micro_rows = row_length, rows_per_step, micro_rows
        self.rank, self.world, self.trim = rank, world, trim

    @abstractmethod
    def rows_of(self, step: int) -> list[Row]:
        """The rows of the global batch of `step`, over all ranks."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the rows."""

    def next(self, step: int) -> GlobalBatch:
        """The batch of `step` (0 is the first), whatever was asked for before."""
        return self._batch(self.rows_of(step))

    def state_dict(self) -> dict[str, Any]:
        """Nothing moves in a pure function of (seed, step): the state is what must be the same when a run goes on."""
        return self.identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accepts the state of a run over the same data with the same settings. Raises `ArtifactError` naming what differs."""
        ours, theirs = flat(self.identity()), flat(state)
        different = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if different:
            raise ArtifactError(
                "the checkpoint was made with other data or another data order",
                field=", ".join(different),
                found="; ".join(f"{k} {ours.get(k)}" for k in different),
                expected="; ".join(f"{k} {theirs.get(k)}" for k in different),
                fix="resume with the data and settings of the checkpoint, or start a new run from its model",
            )

    def on_weights(self, version: int) -> None:  # noqa: B027 (nothing to do is the behaviour)
        """Static data does not depend on the weights."""

    def fingerprint(self) -> str:
        return fingerprint(self.identity())

    def _batch(self, rows: list[Row]) -> GlobalBatch:
        counts = {
            "tokens": float(sum(r.targets for r in rows)),
            "sequences": float(sum(len(r.pieces) for r in rows)),
            "processed": float(sum(r.tokens for r in rows)),
        }
        mine = rows[self.rank :: self.world]
        groups = [mine[i : i + self.micro_rows] for i in range(0, len(mine), self.micro_rows)]
        return GlobalBatch([assemble(g, self.row_length, self.trim) for g in groups], counts, [r.names for r in mine])


class StaticSource(_Source):
    """Batches of one tokens folder.

    `rows_per_step` rows of `row_length` tokens make a global batch, over all `world` ranks and all accumulation; `micro_rows` of
    them go through the model at a time on one rank (the last micro-batch may have fewer). `policy` and `packing`: see
    `pack.plan_rows`; None means `split` for text and `drop` for conversations. `trim` cuts a micro-batch to its longest row.

    Example:
        source = StaticSource(Segments.open(tokens / "train"), row_length=512, rows_per_step=16, micro_rows=16, seed=0)
        batch = source.next(step=0)
    """

    def __init__(
        self,
        segments: Segments,
        *,
        row_length: int,
        rows_per_step: int,
        micro_rows: int,
        seed: int,
        policy: str | None = None,
        packing: str = "best_fit",
        rank: int = 0,
        world: int = 1,
        trim: bool = False,
    ) -> None:
        super().__init__(
            row_length=row_length, rows_per_step=rows_per_step, micro_rows=micro_rows, rank=rank, world=world, trim=trim
        )
        if policy is None:
            policy = "split" if segments.kind == "text" else "drop"
        self.stream = Stream(segments, row_length, seed=seed, policy=policy, packing=packing)
        self.report = self.stream.report

    @property
    def rows_per_epoch(self) -> int:
        return self.stream.order.rows_per_epoch

    def rows_of(self, step: int) -> list[Row]:
        first = step * self.rows_per_step
        return [self.stream.row(first + j) for j in range(self.rows_per_step)]

    def largest(self) -> GlobalBatch:
        """The fullest rows there are, as one batch: what memory must hold."""
        return self._batch(self.stream.largest(self.rows_per_step))

    def identity(self) -> dict[str, Any]:
        return {**self.stream.identity, "rows_per_step": self.rows_per_step}

    def describe(self) -> list[str]:
        """The source as a tree, a fingerprint a node."""
        head = f"static data, {self.rows_per_step} rows a step, seed {self.stream.identity['seed']}  [{self.fingerprint()}]"
        return [head, f"└── {self.stream.describe()}"]


class MixSource(_Source):
    """Batches of several tokens folders, by weights.

    In each block of 1,000 rows of the mixture every source has its exact share (largest remainders), in an order that depends on
    (seed, block) alone; each source's own rows come in its own order, none left out. So row j of step s is a pure function of
    (seed, s, j). Sources must agree in all but data, policy and seed.
    """

    def __init__(self, sources: Mapping[str, tuple[StaticSource, float]], *, seed: int) -> None:
        if not sources or any(weight <= 0 for _, weight in sources.values()):
            found = {name: weight for name, (_, weight) in sources.items()}
            raise ConfigError("a mixture needs sources of positive weight", field="mix", found=found)
        first = next(iter(sources.values()))[0]
        names = ("row_length", "rows_per_step", "micro_rows", "rank", "world", "trim")
        shape = {n: getattr(first, n) for n in names}
        for name, (source, _) in sources.items():
            other = {n: getattr(source, n) for n in names}
            if other != shape:
                raise ConfigError(
                    "the sources of a mixture have different batches", field=f"mix.{name}", found=other, expected=str(shape)
                )
        super().__init__(**shape)
        self.seed, self.names = seed, list(sources)
        self.streams = [source.stream for source, _ in sources.values()]
        self.quotas = _quotas([weight for _, weight in sources.values()])
        if min(self.quotas) == 0:
            small = self.names[self.quotas.index(0)]
            raise ConfigError(
                "a weight is too small to ever be used", field=f"mix.{small}", expected=f"at least 1/{MIX_BLOCK} of all"
            )
        self.report = {f"{n}/{k}": v for n, s in zip(self.names, self.streams, strict=True) for k, v in s.report.items()}
        self._block: tuple[int, Ints, Ints] | None = None

    def rows_of(self, step: int) -> list[Row]:
        return [self._row(step * self.rows_per_step + j) for j in range(self.rows_per_step)]

    def drawn(self, steps: int) -> dict[str, int]:
        """How many rows of each source the first `steps` steps hold, over all ranks."""
        block, at = divmod(steps * self.rows_per_step, MIX_BLOCK)
        which, _ = self._order(block)
        counts = {name: block * quota for name, quota in zip(self.names, self.quotas, strict=True)}
        return {name: counts[name] + int((which[:at] == k).sum()) for k, name in enumerate(self.names)}

    def _row(self, number: int) -> Row:
        block, at = divmod(number, MIX_BLOCK)
        which, rank = self._order(block)
        k = int(which[at])
        return self.streams[k].row(block * self.quotas[k] + int(rank[at]))

    def _order(self, block: int) -> tuple[Ints, Ints]:
        """The source of each row of a block, and how many rows of the same source come before it in the block."""
        if self._block is None or self._block[0] != block:
            which = np.repeat(np.arange(len(self.quotas)), self.quotas)[shuffled(MIX_BLOCK, self.seed, block, 4)]
            rank = np.empty(MIX_BLOCK, np.int64)
            for k, quota in enumerate(self.quotas):
                rank[which == k] = np.arange(quota)
            self._block = (block, which, rank)
        return self._block[1:]

    def largest(self) -> GlobalBatch:
        """The fullest rows of all sources, as one batch."""
        rows = [row for stream in self.streams for row in stream.largest(self.rows_per_step)]
        return self._batch(sorted(rows, key=lambda r: -r.tokens)[: self.rows_per_step])

    def identity(self) -> dict[str, Any]:
        parts = {n: {**s.identity, "share": q} for n, s, q in zip(self.names, self.streams, self.quotas, strict=True)}
        return {"mix": parts, "seed": self.seed, "rows_per_step": self.rows_per_step}

    def describe(self) -> list[str]:
        """The mixture as a tree, a fingerprint a node."""
        lines = [f"mixture, {self.rows_per_step} rows a step, seed {self.seed}  [{self.fingerprint()}]"]
        for i, (name, stream, quota) in enumerate(zip(self.names, self.streams, self.quotas, strict=True)):
            branch = "└──" if i == len(self.names) - 1 else "├──"
            lines.append(f"{branch} {name} {100 * quota / MIX_BLOCK:.1f}%: {stream.describe()}")
        return lines


def assemble(rows: list[Row], row_length: int, trim: bool = False) -> Batch:
    """The tensors of some rows. Padding is what no piece covers: `segments` 0, weight 0, id 0."""
    width = row_length
    if trim:
        longest = max(r.tokens for r in rows)
        width = min(row_length, -(-longest // TRIM_TO) * TRIM_TO)
    shape = (len(rows), width)
    ids, targets, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    numbers, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    count = np.arange(width)
    for r, row in enumerate(rows):
        at, p = 0, row.pieces
        spans = zip(p.segment.tolist(), p.start.tolist(), p.stop.tolist(), p.context.tolist(), strict=True)
        for number, (segment, start, stop, context) in enumerate(spans, 1):
            end = at + stop - start
            tokens = row.segments.ids(segment, start, stop)
            ids[r, at:end] = tokens
            targets[r, at : end - 1] = tokens[1:]
            weights[r, at + context : end - 1] = row.segments.mask(segment, start + context + 1, stop)
            positions[r, at:end] = count[: end - at]
            numbers[r, at:end] = number
            at = end
    return Batch(
        ids=torch.from_numpy(ids),
        segments=torch.from_numpy(numbers),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
        rows=tuple(r.names for r in rows),
    )


@dataclass(slots=True, frozen=True)
class EvalBatch:
    """A batch for measuring, with the segment that each piece belongs to."""

    batch: Batch
    segment_of: list[list[int]]  # of row r, piece n (token segments value n + 1): index in `Segments`


def eval_batches(segments: Segments, *, row_length: int, stride: int, micro_rows: int, trim: bool = False) -> Iterator[EvalBatch]:
    """Every target of every segment exactly once (`pack.eval_rows`), `micro_rows` rows at a time; supervision as in training."""
    plan: Plan = eval_rows(segments.lengths, row_length, stride)
    for begin in range(0, len(plan), micro_rows):
        rows = [Row(segments, plan.row(i)) for i in range(begin, min(begin + micro_rows, len(plan)))]
        yield EvalBatch(assemble(rows, row_length, trim), [r.pieces.segment.tolist() for r in rows])


def fingerprint(identity: Mapping[str, Any]) -> str:
    """8 hex digits of what decides the rows."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def _quotas(weights: list[float]) -> list[int]:
    """Rows of each source in a block: shares rounded by largest remainders, together `MIX_BLOCK`."""
    exact = np.array(weights) / sum(weights) * MIX_BLOCK
    rows = np.floor(exact).astype(int)
    for k in np.argsort(-(exact - rows), kind="stable")[: MIX_BLOCK - int(rows.sum())]:
        rows[k] += 1
    return [int(n) for n in rows]
