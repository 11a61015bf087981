"""Preference pairs: a prompt with its chosen and its rejected completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tutelage.data.groups.dropped import ALIKE, TOO_LONG, UNTRAINED, cut
from tutelage.data.groups.segment_groups import PairedGroups
from tutelage.data.tokens.shards import Segments


class PreferencePairs(PairedGroups):
    """Chosen and rejected completions of one prompt, with values such as `reference` and `margin`.

    The prompt is what both texts begin with, up to the first supervised token. A completion ends with its last supervised
    token: the tokens that a template writes after it are never generated. Pairs are dropped whose prompt alone is too long or
    whose completions have the same tokens. Raises `NothingLeft` if no pair remains.
    """

    def __init__(self, segments: Segments, max_length: int, too_long: str = "drop") -> None:
        super().__init__(segments, "Preference", max_length, too_long)
        lengths = np.array([_end(segments.mask(i)) for i in range(len(segments))], np.int64).reshape(-1, 2)
        short = (lengths <= max_length).all(1)
        trained = np.asarray((segments.supervised.reshape(-1, 2) > 0).all(1))
        ends = np.array([self._shared(i) if t else 1 for i, t in enumerate(trained)], np.int64)
        starts = self._prompt_starts(lengths.max(1), ends)  # one start for both texts, so that they still share their prompt
        fits = short if too_long == "drop" else ends - starts < max_length
        sizes = np.minimum(lengths - ends[:, None], (max_length - (ends - starts))[:, None])
        differ = np.array([ok and self._differ(i, ends[i], sizes[i]) for i, ok in enumerate(fits & trained)], bool)
        self.kept = np.flatnonzero(differ)
        self.report = {
            "pairs": len(lengths),
            TOO_LONG: int((~fits).sum()),
            **cut(too_long, (fits & ~short).sum()),
            UNTRAINED: int((fits & ~trained).sum()),
            ALIKE: int((fits & trained & ~differ).sum()),
        }
        if not len(self.kept):
            raise self._nothing_left("no pair is left", lengths.max(1), ends - starts + 1)
        self._starts, self._ends, self._sizes = starts[self.kept], ends[self.kept], sizes[self.kept]

    def _sources(self, i: int) -> Sequence[tuple[int, int]]:
        pair, start = int(self.kept[i]), int(self._ends[i])
        return (2 * pair, start), (2 * pair + 1, start)

    def _differ(self, pair: int, at: int, sizes: npt.NDArray[np.int64]) -> bool:
        """Whether the completions differ: cutting them, or a template that trims, may have made them equal."""
        one, other = (self.segments.ids(2 * pair + side)[at : at + int(sizes[side])] for side in (0, 1))
        return not np.array_equal(one, other)

    def _shared(self, pair: int) -> int:
        """Number of unsupervised tokens that both texts begin with; at least one."""
        ids = [self.segments.ids(n) for n in (2 * pair, 2 * pair + 1)]
        most = min(min(int(np.argmax(self.segments.mask(n) > 0)) for n in (2 * pair, 2 * pair + 1)), *(len(x) - 1 for x in ids))
        differ = np.flatnonzero(ids[0][:most] != ids[1][:most])
        return max(1, int(differ[0]) if len(differ) else most)


def _end(mask: npt.NDArray[np.uint8]) -> int:
    """The index after the last supervised token; the whole length if there is none."""
    return len(mask) - int(np.argmax(mask[::-1] > 0))


def margins(records: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.float32] | None:
    """Margins [pairs, 2], the same for both completions; 0 where a row has none. None if no row has one."""
    if not any(row.get("margin") is not None for row in records):
        return None
    values = np.array([row.get("margin") or 0.0 for row in records], np.float32)
    return np.stack([values, values], 1)
