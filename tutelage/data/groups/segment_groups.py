"""What preferences and ratings share: prompt groups read from stored segments and cut to a length."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tutelage.data.groups.dropped import NothingLeft, nothing_left
from tutelage.data.groups.groups import Completion, Layout, PromptGroup
from tutelage.data.tokens.shards import Segments

Ints = npt.NDArray[np.int64]


class SegmentGroups:
    """Prompt groups over the tokens of `segments`, at most `max_length` tokens a text.

    Longer texts are dropped (`too_long="drop"`), lose the start of their prompt (`left`) or the end of their completion
    (`right`). `report` counts the texts, then those that were dropped or cut, by reason.
    """

    report: dict[str, int]

    def __init__(self, segments: Segments, record: str, max_length: int, too_long: str) -> None:
        assert segments.record == record, segments.record
        self.segments, self.max_length, self.too_long = segments, max_length, too_long

    def _prompt_starts(self, lengths: Ints, prompt_ends: Ints) -> Ints:
        """The first retained token of each prompt. At least one token of a prompt stays."""
        if self.too_long != "left":
            return np.zeros_like(prompt_ends)
        return np.clip(lengths - self.max_length, 0, prompt_ends - 1)

    def _nothing_left(self, message: str, lengths: Ints, shortest: Ints) -> NothingLeft:
        """`lengths` [n] of the texts, and `shortest` [n]: how short each can be cut."""
        needed = lengths if self.too_long == "drop" else shortest
        return nothing_left(message, self.report, self.segments.folder, self.max_length, self.too_long, needed)


class PairedGroups(SegmentGroups, ABC):
    """Groups of two completions each. Subclasses set, for each retained group: `kept` [groups] (its number in the data), the
    prompt's `_starts` and `_ends` [groups] in its segment, and `_sizes` [groups, 2]: tokens of each completion."""

    kept: npt.NDArray[np.intp]
    _starts: Ints
    _ends: Ints
    _sizes: Ints

    def __init__(self, segments: Segments, record: str, max_length: int, too_long: str) -> None:
        super().__init__(segments, record, max_length, too_long)
        self._values: dict[str, npt.NDArray[np.float32]] = {}

    def set_values(self, name: str, values: npt.NDArray[Any]) -> None:
        """Adds a named number for each completion: [groups, 2]."""
        assert values.shape == (len(self.kept), 2), (name, values.shape)
        self._values[name] = values.astype(np.float32)

    @property
    def digest(self) -> str:
        streams = b"".join(name.encode() + self._values[name].tobytes() for name in sorted(self._values))
        return hashlib.sha256(self._identity() + streams).hexdigest()

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> PromptGroup:
        sources, completions = self._sources(i), []
        for side, (segment, start) in enumerate(sources):
            part = slice(start, start + int(self._sizes[i, side]))
            ids, mask = self.segments.ids(segment)[part], self.segments.mask(segment)[part]
            completions.append(Completion(ids, mask, per_completion=self._values_of(i, side)))
        prompt = self.segments.ids(sources[0][0])[int(self._starts[i]) : int(self._ends[i])]
        return PromptGroup(self.segments.record_id(sources[0][0]), prompt, tuple(completions))

    def sizes(self, layout: Layout) -> Ints:
        return self._sizes.sum(1) + (self._ends - self._starts) * (1 if layout == "tree" else 2)

    def _identity(self) -> bytes:
        return f"{self.segments.digest} {self.max_length} {self.too_long}".encode()

    @abstractmethod
    def _sources(self, i: int) -> Sequence[tuple[int, int]]:
        """For each completion, its segment and its first token there."""

    def _values_of(self, i: int, side: int) -> dict[str, float]:
        return {name: float(values[i, side]) for name, values in self._values.items()}
