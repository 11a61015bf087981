"""Groups of rated completions for reward models: each completion has ratings, or scores for its steps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tutelage.data.groups.dropped import TOO_LONG, UNSCORED, UNTRAINED, cut
from tutelage.data.groups.groups import Completion, Layout, PromptGroup
from tutelage.data.groups.segment_groups import Ints, SegmentGroups
from tutelage.data.tokens.shards import Segments
from tutelage.errors import DataError

MOST = 16  # completions of a group; a prompt with more makes several groups
Floats = npt.NDArray[np.float32]


class RatedGroups(SegmentGroups):
    """All rated completions of a prompt. Either `ratings` [segments, K], NaN where an aspect was not rated, or `steps`
    [segments]: an array over each segment's tokens with a score at the last token of each step, NaN elsewhere.

    A completion ends with its last supervised token: what a template writes after it was not rated, and no model generates it.
    Raises `NothingLeft` if no rating remains.
    """

    def __init__(
        self, segments: Segments, max_length: int, too_long: str = "drop", *, ratings: Floats | None = None,
        steps: Sequence[Floats] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(segments, "Rating", max_length, too_long)
        assert (ratings is None) != (steps is None)
        self.ratings, self.steps = ratings, steps
        spans = np.array([_span(segments.mask(i)) for i in range(len(segments))], np.int64).reshape(-1, 2)
        ends, stops = spans[:, 0], spans[:, 1]
        fits, trained = stops <= max_length, stops > ends
        starts = self._prompt_starts(stops, ends)
        self._ends, self._starts, self._stops = ends, starts, np.minimum(stops, starts + max_length)
        kept = (fits | (too_long != "drop")) & (self._stops > ends)
        rated = np.array([self._rated(i) for i in range(len(segments))], bool)
        self.kept = np.flatnonzero(kept & rated)
        self.report = {
            "ratings": len(segments),
            TOO_LONG: int((trained & ~kept).sum()),
            **cut(too_long, (~fits & kept).sum()),
            UNTRAINED: int((~trained).sum()),
            UNSCORED: int((kept & ~rated).sum()),
        }
        if not len(self.kept):
            raise self._nothing_left("no rating is left", stops, ends - starts + 1)
        self.members = self._grouped()

    def _rated(self, i: int) -> bool:
        if self.ratings is not None:
            return bool(np.isfinite(self.ratings[i]).any())
        assert self.steps is not None
        return bool(np.isfinite(self.steps[i][self._ends[i] : self._stops[i]]).any())

    def _grouped(self) -> list[list[int]]:
        """Segments grouped by prompt, in the order of the data."""
        groups: dict[bytes, list[list[int]]] = {}
        for i in self.kept.tolist():
            found = groups.setdefault(self._prompt(i).tobytes(), [[]])
            if len(found[-1]) == MOST:
                found.append([])
            found[-1].append(i)
        return sorted(group for found in groups.values() for group in found)

    @property
    def varies(self) -> bool:
        """Whether the scores differ between completions or steps."""
        if self.ratings is not None:
            return any(len(np.unique(column[np.isfinite(column)])) > 1 for column in self.ratings[self.kept].T)
        assert self.steps is not None
        seen = [self.steps[i][self._ends[i] : self._stops[i]] for i in self.kept.tolist()]
        values = np.concatenate(seen)
        return len(np.unique(values[np.isfinite(values)])) > 1

    @property
    def digest(self) -> str:
        total = hashlib.sha256(f"{self.segments.digest} {self.members}".encode())
        for array in (self._starts, self._stops, *([self.ratings] if self.ratings is not None else self.steps or ())):
            total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, i: int) -> PromptGroup:
        first = self.members[i][0]
        return PromptGroup(
            self.segments.record_id(first), self._prompt(first), tuple(self._completion(j) for j in self.members[i])
        )

    def _completion(self, i: int) -> Completion:
        part = slice(int(self._ends[i]), int(self._stops[i]))
        ids, mask = self.segments.ids(i)[part], self.segments.mask(i)[part]
        if self.ratings is not None:
            return Completion(ids, mask, per_completion={"ratings": self.ratings[i].tolist()})
        assert self.steps is not None
        return Completion(ids, mask, {"step_score": self.steps[i][part]})

    def _prompt(self, i: int) -> npt.NDArray[Any]:
        return self.segments.ids(i)[int(self._starts[i]) : int(self._ends[i])]

    def sizes(self, layout: Layout) -> Ints:
        prompts = (self._ends - self._starts)[[m[0] for m in self.members]]
        answers = np.array([(self._stops - self._ends)[m].sum() for m in self.members], np.int64)
        return answers + prompts * (1 if layout == "tree" else np.array([len(m) for m in self.members]))


def _span(mask: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Start and end of the supervised tokens; equal if there are none."""
    at = np.flatnonzero(mask)
    return (max(1, int(at[0])), int(at[-1]) + 1) if len(at) else (1, 1)


def aspects_of(records: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """All aspects that occur in the ratings, in alphabetical order."""
    return tuple(sorted({name for row in records for name in row.get("scores") or ()}))


def ratings_of(records: Sequence[Mapping[str, Any]], aspects: Sequence[str]) -> Floats:
    """Ratings [ratings, aspects], NaN where an aspect was not rated."""
    rows = [[(row.get("scores") or {}).get(name, np.nan) for name in aspects] for row in records]
    return np.array(rows, np.float32).reshape(len(rows), len(aspects))


def steps_of(
    records: Sequence[Mapping[str, Any]], segments: Segments, decode: Callable[[npt.NDArray[Any]], str], file: Path
) -> list[Floats]:
    """For each rating, the scores at its steps' last tokens. Raises `DataError` with the line of one whose steps are not found in
    its tokens; one without steps has no score."""
    out = []
    for i, row in enumerate(records):
        stream = np.full(int(segments.lengths[i]), np.nan, np.float32)
        if row.get("steps"):
            learned = np.flatnonzero(segments.mask(i))
            try:
                ends = step_ends(segments.ids(i)[learned], row["steps"], decode)
            except DataError as error:
                raise error.but(file=file, line=i + 1) from error
            stream[learned[ends]] = row["step_scores"]
        out.append(stream)
    return out


def step_ends(ids: npt.NDArray[Any], steps: Sequence[str], decode: Callable[[npt.NDArray[Any]], str]) -> list[int]:
    """The places in `ids` of the last token of each step: the first one with which the decoded text holds the whole step, white
    space at its end left aside.

    Proven, not guessed: `DataError` where the text of `ids` does not hold the joined steps exactly once, or where a token holds
    more of the next step than white space.
    """
    text, joined = decode(ids), "".join(steps)
    body = joined.strip()
    if not body or text.count(body) != 1:
        raise DataError(
            "the steps are not found in the text that the model reads", field="steps", found=body[:80] or joined,
            expected="steps which, joined, are the answer as the chat template writes it",
        )  # fmt: skip
    at = text.index(body) - (len(joined) - len(joined.lstrip()))
    out: list[int] = []
    for number, step in enumerate(steps):
        stop = at + len(step.rstrip())
        at += len(step)
        low, high = (out[-1] + 1 if out else 0), len(ids)
        while low < high:  # the fewest tokens whose text is so long
            middle = (low + high) // 2
            low, high = (low, middle) if len(decode(ids[:middle])) >= stop else (middle + 1, high)
        while low < len(ids) and not text.startswith(decode(ids[:low])):  # in the middle of a character
            low += 1
        read = decode(ids[:low])
        if not step.strip() or not text.startswith(read) or read[stop:].strip():
            raise DataError(
                "a step has no last token of its own", field=f"steps[{number}]", found=read[-40:], expected=step[-40:],
                fix="end each step with a new line",
            )  # fmt: skip
        out.append(low - 1)
    return out
