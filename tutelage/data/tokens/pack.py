"""From segment lengths to rows: which piece of which segment stands in which row of which step. Numpy only.

Everything here is a pure function of the lengths and of integers (seed, epoch, step), and of nothing else: no clock, no
generator state, no number of ranks. The order comes from a hash (splitmix64) sorted, not from `numpy.random`, whose
streams may change between numpy versions.

Words:
- A *piece* is `(segment, start, stop)`: tokens start..stop-1 of a segment. It has `stop - start - 1` targets, because the
  target of a token is the next token of the same piece.
- Neighbouring pieces of a segment overlap by one token, so that every token but the first of a segment is the target of
  exactly one piece: cutting loses no prediction, and the targets of an epoch do not depend on where the cuts fall.
- A *row* holds pieces of at most `row_length` tokens together.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tutelage.errors import ConfigError, DataError

POLICIES = ("split", "drop", "left", "right")
PACKINGS = ("best_fit", "none")
Ints = npt.NDArray[np.int64]
Count = Callable[[Ints, Ints, Ints], Ints]  # (segment, start, stop) of pieces -> supervised targets in each


@dataclass(slots=True, frozen=True, kw_only=True)
class Pieces:
    """Parallel arrays, one entry a piece."""

    segment: Ints  # [P]
    start: Ints  # [P] first token inside the segment
    stop: Ints  # [P] one past the last token
    context: Ints  # [P] leading tokens whose target is not counted again (weight 0); all 0 for training rows

    def __len__(self) -> int:
        return len(self.segment)

    def __getitem__(self, index: slice | Ints | npt.NDArray[np.bool_]) -> Pieces:
        return Pieces(segment=self.segment[index], start=self.start[index], stop=self.stop[index], context=self.context[index])

    @property
    def tokens(self) -> Ints:
        return self.stop - self.start


@dataclass(slots=True, frozen=True, kw_only=True)
class Plan:
    """The rows of one epoch, as compressed rows: row r holds pieces row_offsets[r] .. row_offsets[r + 1] - 1."""

    pieces: Pieces
    row_offsets: Ints  # [rows + 1]
    row_length: int
    report: dict[str, float] = field(default_factory=dict)  # see `plan_rows`

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def row(self, index: int) -> Pieces:
        return self.pieces[slice(int(self.row_offsets[index]), int(self.row_offsets[index + 1]))]

    def row_tokens(self) -> Ints:
        """[rows] tokens used in each row."""
        total = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.pieces.tokens)])
        return total[self.row_offsets[1:]] - total[self.row_offsets[:-1]]


def plan_rows(
    lengths: Ints,
    row_length: int,
    *,
    seed: int,
    epoch: int,
    policy: str,
    supervised: Count | None = None,
    packing: str = "best_fit",
) -> Plan:
    """The rows of one epoch, in the order in which they are to be used.

    `policy` is what becomes of a segment longer than a row: `split` (cut in pieces; where everything is supervised the
    short piece changes place with the epoch, so that the cuts fall elsewhere), `drop`, `left` (its left end is cut off) or
    `right` (its right end). `supervised` counts the supervised targets of pieces (None: all are supervised); a piece without
    any never enters a row. The number of rows does not depend on `epoch`. `packing="none"` gives each piece a row of its own.

    The report says what happened: `segments`, `segments_used`, `pieces`, `rows`, `tokens` (in rows), `slots`
    (rows x row_length), `fill` (tokens / slots), `targets` (supervised), `long` (segments longer than a row), `split`,
    `dropped_long`, `cut_left`, `cut_right`, `tokens_cut` (of cut or dropped segments), `pieces_unsupervised` (left out).
    Raises `ConfigError` for a policy or row length that cannot be, `DataError` if no row remains.
    """
    lengths = np.asarray(lengths, np.int64)
    _check(row_length, policy, packing)
    moving = supervised is None
    pieces, report = _cut(lengths, row_length, policy, seed=seed, epoch=epoch if moving else 0)
    targets = pieces.tokens - 1 if supervised is None else supervised(pieces.segment, pieces.start, pieces.stop)
    useful = targets > 0
    report["pieces_unsupervised"] = float(len(pieces) - int(useful.sum()))
    pieces = pieces[useful]
    if len(pieces) == 0:
        raise DataError(
            "no row to train on: every segment is dropped or has no supervised token",
            found=", ".join(f"{k} {v:.0f}" for k, v in report.items()),
            fix=f"raise sequence_length (now {row_length}), set too_long to other than {policy!r}, or check the loss mask",
        )
    order = shuffled(len(pieces), seed, epoch, 1)
    pieces = pieces[order]
    rows_of = _best_fit(pieces.tokens, row_length) if packing == "best_fit" else np.arange(len(pieces))
    count = int(rows_of.max()) + 1
    place = np.empty(count, np.int64)
    place[shuffled(count, seed, epoch, 2)] = np.arange(count)
    plan = _plan(pieces, place[rows_of], count, row_length, report)
    plan.report["targets"] = float(targets[useful].sum())
    return plan


def eval_rows(lengths: Ints, row_length: int, stride: int) -> Plan:
    """Rows for measuring: every token but the first of each segment is predicted exactly once, with as much context as fits.

    A segment longer than a row is read through windows of `row_length` tokens that move on by `stride` tokens; the first
    `context` tokens of a window have targets that an earlier window already predicted, so their weight is 0. Each predicted
    token sees at least `row_length - stride` tokens before it (or all there are). Cost: row_length / stride times the tokens.
    """
    lengths = np.asarray(lengths, np.int64)
    _check(row_length, "split", "best_fit")
    if not 1 <= stride < row_length:
        raise ConfigError("stride does not fit the row", field="stride", found=stride, expected=f"1 to {row_length - 1}")
    used = np.flatnonzero(lengths > 1)
    windows = 1 + np.maximum(0, -(-(lengths[used] - row_length) // stride))
    segment, k = _repeat(used, windows)
    length = lengths[segment]
    stop = np.minimum(row_length + k * stride, length)
    start = np.maximum(0, stop - row_length)
    before = np.where(k > 0, row_length + (k - 1) * stride, 1)  # first token not predicted by earlier windows
    pieces = Pieces(segment=segment, start=start, stop=stop, context=before - start - 1)
    rows_of = _best_fit(pieces.tokens, row_length)
    count = int(rows_of.max()) + 1 if len(pieces) else 0
    plan = _plan(pieces, rows_of, count, row_length, {"segments": float(len(lengths))})
    plan.report["targets"] = float((pieces.tokens - 1 - pieces.context).sum())
    return plan


class RowOrder:
    """The endless stream of rows: epoch after epoch, each in its own order, without a seam.

    Row number g is row `g % rows_per_epoch` of epoch `g // rows_per_epoch`; step s uses rows s * n .. s * n + n - 1, so a
    step may take the end of one epoch and the beginning of the next: no row is lost or repeated.
    """

    def __init__(
        self,
        lengths: Ints,
        row_length: int,
        *,
        seed: int,
        policy: str,
        supervised: Count | None = None,
        packing: str = "best_fit",
    ) -> None:
        self._make = lambda epoch: plan_rows(
            lengths, row_length, seed=seed, epoch=epoch, policy=policy, supervised=supervised, packing=packing
        )
        self._plans: dict[int, Plan] = {}
        self.rows_per_epoch = len(self.plan(0))

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch; the two used last are kept."""
        if epoch not in self._plans:
            while len(self._plans) >= 2:
                self._plans.pop(next(iter(self._plans)))
            self._plans[epoch] = self._make(epoch)
        return self._plans[epoch]

    def row(self, number: int) -> Pieces:
        """The pieces of row `number` of the stream."""
        epoch, index = divmod(number, self.rows_per_epoch)
        return self.plan(epoch).row(index)

    def rows_of_step(self, step: int, rows_per_step: int) -> list[Pieces]:
        """The pieces of each row of the global batch of `step` (0 is the first)."""
        return [self.row(step * rows_per_step + i) for i in range(rows_per_step)]


def mixed_bits(values: npt.ArrayLike, *keys: int) -> npt.NDArray[np.uint64]:
    """splitmix64 of `values` under integer keys: 64 well mixed bits each (Steele, Lea, Flood 2014)."""
    state = np.asarray(values, np.uint64)
    with np.errstate(over="ignore"):
        for key in (*keys, 0):
            state = state + np.uint64(((key + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def shuffled(count: int, *keys: int) -> Ints:
    """A permutation of 0..count-1 that depends on `keys` alone."""
    return np.argsort(mixed_bits(np.arange(count), *keys), kind="stable").astype(np.int64)


def _check(row_length: int, policy: str, packing: str) -> None:
    if row_length < 2:
        raise ConfigError("a row needs at least two tokens", field="row_length", found=row_length, expected="2 or more")
    for name, value, known in (("policy", policy, POLICIES), ("packing", packing, PACKINGS)):
        if value not in known:
            raise ConfigError(f"unknown {name}", field=name, found=value, expected=" | ".join(known))


def _repeat(values: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Each value as often as its count says, and the running number of each repetition."""
    first = np.cumsum(counts) - counts
    return np.repeat(values, counts), np.arange(int(counts.sum())) - np.repeat(first, counts)


def _cut(lengths: Ints, row_length: int, policy: str, *, seed: int, epoch: int) -> tuple[Pieces, dict[str, float]]:
    """All pieces of the segments under `policy`, in segment order, and what was done to the long ones."""
    long = lengths > row_length
    count = float(long.sum())
    report = {"segments": float(len(lengths)), "long": count}
    report |= dict.fromkeys(("split", "dropped_long", "cut_left", "cut_right", "tokens_cut"), 0.0)
    segment = np.arange(len(lengths), dtype=np.int64)
    if policy == "split":
        report["split"] = count
        return _split(lengths, row_length, seed=seed, epoch=epoch), report
    report[{"drop": "dropped_long", "left": "cut_left", "right": "cut_right"}[policy]] = count
    kept = 0 if policy == "drop" else row_length
    report["tokens_cut"] = float((lengths[long] - kept).sum())
    if policy == "drop":
        segment = segment[~long]
    length = lengths[segment]
    start = np.maximum(0, length - row_length) if policy == "left" else np.zeros_like(length)
    stop = np.minimum(length, start + row_length)
    return Pieces(segment=segment, start=start, stop=stop, context=np.zeros_like(start)), report


def _split(lengths: Ints, row_length: int, *, seed: int, epoch: int) -> Pieces:
    """Pieces of `row_length` tokens and one shorter one, which stands anywhere among them.

    Moving the short piece, instead of drawing free cut points, keeps the multiset of lengths and so the number of rows the
    same in each epoch. With the overlap of one token the short piece has at least one target, never none.
    """
    full = row_length - 1  # targets of a full piece
    targets = np.maximum(lengths - 1, 1)
    counts = -(-targets // full)
    short = targets - (counts - 1) * full
    at = (mixed_bits(np.arange(len(lengths)), seed, epoch, 3) % counts.astype(np.uint64)).astype(np.int64)
    if epoch == 0:
        at = counts - 1
    segment, k = _repeat(np.arange(len(lengths), dtype=np.int64), counts)
    short, at = short[segment], at[segment]
    start = np.where(k <= at, k * full, (k - 1) * full + short)
    stop = np.minimum(start + np.where(k == at, short, full) + 1, lengths[segment])
    return Pieces(segment=segment, start=start, stop=stop, context=np.zeros_like(start))


def _best_fit(tokens: Ints, row_length: int) -> Ints:
    """The row of each piece, by best-fit decreasing: longest pieces first, each into the fullest row that still takes it.

    Pieces of equal length are placed together and rows of equal remaining space are kept as one group, so the work in Python
    grows with the number of different lengths (at most `row_length`), not with the number of pieces.
    """
    order = np.argsort(-tokens, kind="stable")
    sizes, begins = np.unique(-tokens[order], return_index=True)
    ends = [*begins[1:].tolist(), len(order)]
    rows_of = np.empty(len(tokens), np.int64)
    space: list[int] = []  # remaining spaces that occur, ascending
    groups: dict[int, list[Ints]] = {}  # remaining space -> rows
    opened = 0

    def put(rows: Ints, left: int) -> None:
        if left < 2 or len(rows) == 0:
            return
        if left not in groups:
            groups[left] = []
            bisect.insort(space, left)
        groups[left].append(rows)

    for size, begin, end in zip((-sizes).tolist(), begins.tolist(), ends, strict=True):
        at = begin
        while at < end:
            found = bisect.bisect_left(space, size)
            if found < len(space):
                left = space.pop(found)
                rows = np.concatenate(groups.pop(left))
            else:
                left, need = row_length, -(-(end - at) // (row_length // size))
                rows = np.arange(opened, opened + need)
                opened += need
            each = left // size  # pieces of this size that a row of the group takes
            full, rest = divmod(min(end - at, each * len(rows)), each)
            rows_of[order[at : at + full * each]] = np.repeat(rows[:full], each)
            put(rows[:full], left - each * size)
            at += full * each
            if rest:
                rows_of[order[at : at + rest]] = rows[full]
                put(rows[full : full + 1], left - rest * size)
                at += rest
            put(rows[full + (rest > 0) :], left)
    return rows_of


def _plan(pieces: Pieces, rows_of: Ints, count: int, row_length: int, report: dict[str, float]) -> Plan:
    """Sorts the pieces by row and fills in the report."""
    order = np.argsort(rows_of, kind="stable")
    offsets = np.searchsorted(rows_of[order], np.arange(count + 1))
    tokens, slots = float(pieces.tokens.sum()), float(count * row_length)
    report |= {"segments_used": float(len(np.unique(pieces.segment))), "pieces": float(len(pieces)), "rows": float(count)}
    report |= {"tokens": tokens, "slots": slots, "fill": tokens / slots if slots else 0.0}
    return Plan(pieces=pieces[order], row_offsets=offsets.astype(np.int64), row_length=row_length, report=report)
