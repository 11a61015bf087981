"""Preferences as families: a prompt with the chosen and the rejected answer, from their tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tutelage.data.groups.dropped import ALIKE, TOO_LONG, UNTRAINED, cut, nothing_left
from tutelage.data.groups.groups import Completion, Layout, PromptGroup
from tutelage.data.tokens.shards import Segments


class PreferencePairs:
    """Families of two endings over the tokens of preferences. What both texts begin with, up to the first supervised token, is
    the prompt; an answer ends with its last supervised token, since no model writes what a template puts behind it. `whole`:
    named numbers of each answer, [pairs, 2] (`reference`, `margin`).

    Pairs whose texts are longer than `max_length` are left out (`too_long="drop"`), or lose the beginning of their prompt
    (`left`) or the end of their answers (`right`); those whose prompt alone is too long are left out, and so are those whose
    answers are the same tokens. `report` counts them.
    Raises `NothingLeft` where there is none.
    """

    def __init__(self, segments: Segments, max_length: int, too_long: str = "drop") -> None:
        assert segments.record == "Preference", segments.record
        self.segments, self.max_length, self.too_long = segments, max_length, too_long
        lengths = np.array([_end(segments.mask(i)) for i in range(len(segments))], np.int64).reshape(-1, 2)
        whole = (lengths <= max_length).all(1)
        trained = np.asarray((segments.supervised.reshape(-1, 2) > 0).all(1))
        prompts = np.array([self._shared(i) if t else 1 for i, t in enumerate(trained)], np.int64)
        # One beginning for both, so that they still share it; of a prompt one token stays at least.
        starts = np.clip(lengths.max(1) - max_length, 0, prompts - 1) if too_long == "left" else np.zeros_like(prompts)
        fits = whole if too_long == "drop" else prompts - starts < max_length
        self._prompts, self._starts = prompts, starts
        self._sizes = np.minimum(lengths - prompts[:, None], (max_length - (prompts - starts))[:, None])  # of both endings
        differ = np.array([ok and self._differ(i) for i, ok in enumerate(fits & trained)], bool)
        self.kept = np.flatnonzero(differ)
        self.report = {
            "pairs": len(lengths),
            TOO_LONG: int((~fits).sum()),
            **cut(too_long, (fits & ~whole).sum()),
            UNTRAINED: int((fits & ~trained).sum()),
            ALIKE: int((fits & trained & ~differ).sum()),
        }
        if not len(self.kept):
            needed = lengths.max(1) if too_long == "drop" else prompts - starts + 1
            raise nothing_left("no pair is left", self.report, segments.folder, max_length, too_long, needed)
        self._whole: dict[str, npt.NDArray[np.float32]] = {}
        self._prompts, self._starts, self._sizes = (x[self.kept] for x in (self._prompts, self._starts, self._sizes))

    def give(self, name: str, values: npt.NDArray[Any]) -> None:
        """Names a number of each answer: [families, 2]."""
        assert values.shape == (len(self.kept), 2), (name, values.shape)
        self._whole[name] = values.astype(np.float32)

    @property
    def digest(self) -> str:
        about = f"{self.segments.digest} {self.max_length} {self.too_long}"
        streams = b"".join(name.encode() + self._whole[name].tobytes() for name in sorted(self._whole))
        return hashlib.sha256(about.encode() + streams).hexdigest()

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> PromptGroup:
        pair, cut = int(self.kept[i]), int(self._prompts[i])
        texts = [(self.segments.ids(n), self.segments.mask(n)) for n in (2 * pair, 2 * pair + 1)]
        endings = []
        for side, (ids, mask) in enumerate(texts):
            stop = cut + int(self._sizes[i, side])
            whole = {name: float(values[i, side]) for name, values in self._whole.items()}
            endings.append(Completion(ids[cut:stop], mask[cut:stop], whole=whole))
        return PromptGroup(self.segments.record_id(2 * pair), texts[0][0][int(self._starts[i]) : cut], tuple(endings))

    def sizes(self, layout: Layout) -> npt.NDArray[np.int64]:
        return self._sizes.sum(1) + (self._prompts - self._starts) * (1 if layout == "tree" else 2)

    def _differ(self, pair: int) -> bool:
        """Whether the endings are different ones: a cut, or a template that trims, may have made them the same."""
        at, sizes = int(self._prompts[pair]), self._sizes[pair]
        one, other = (self.segments.ids(2 * pair + side)[at : at + int(sizes[side])] for side in (0, 1))
        return not np.array_equal(one, other)

    def _shared(self, pair: int) -> int:
        """Tokens that both texts begin with, none of them supervised; at least one."""
        ids = [self.segments.ids(n) for n in (2 * pair, 2 * pair + 1)]
        most = min(min(int(np.argmax(self.segments.mask(n) > 0)) for n in (2 * pair, 2 * pair + 1)), *(len(x) - 1 for x in ids))
        differ = np.flatnonzero(ids[0][:most] != ids[1][:most])
        return max(1, int(differ[0]) if len(differ) else most)


def _end(mask: npt.NDArray[np.uint8]) -> int:
    """Behind the last supervised token; all of it where there is none."""
    return len(mask) - int(np.argmax(mask[::-1] > 0))


def margins(records: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.float32] | None:
    """[pairs, 2] of the rows' margins, the same for both answers; None where no row has one. A row without one has 0."""
    if not any(row.get("margin") is not None for row in records):
        return None
    values = np.array([row.get("margin") or 0.0 for row in records], np.float32)
    return np.stack([values, values], 1)
