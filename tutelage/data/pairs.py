"""Preferences as families: a prompt with the chosen and the rejected answer, from their tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tutelage.data.families import Ending, Family, Layout
from tutelage.data.tokens import Segments
from tutelage.errors import DataError


class PairFamilies:
    """Families of two endings over the tokens of preferences. What both texts begin with, up to the first supervised token, is
    the prompt; an answer ends with its last supervised token, since no model writes what a template puts behind it. `whole`:
    named numbers of each answer, [pairs, 2] (`reference`, `margin`).

    Pairs whose texts are longer than `max_length` are left out (`too_long="drop"`), or lose the beginning of their prompt
    (`left`) or the end of their answers (`right`); `report` counts them. Raises `DataError` where nothing is left.
    """

    def __init__(self, segments: Segments, max_length: int, too_long: str = "drop") -> None:
        assert segments.record == "Preference", segments.record
        self.segments, self.max_length, self.too_long = segments, max_length, too_long
        self._lengths = lengths = np.array([_end(segments.mask(i)) for i in range(len(segments))], np.int64).reshape(-1, 2)
        fits = (lengths <= max_length).all(1)
        trained = (segments.supervised.reshape(-1, 2) > 0).all(1)
        self.kept = np.flatnonzero((fits | (too_long != "drop")) & trained)
        self.report = {
            "pairs": len(lengths),
            "left out, too long" if too_long == "drop" else f"cut at the {too_long}": int((~fits).sum()),
            "left out, without a supervised token": int((~trained).sum()),
        }
        if not len(self.kept):
            raise DataError(
                "no pair is left to learn from", file=segments.folder, found=str(self.report),
                fix=f"raise max_length ({max_length}), or set too_long=left",
            )  # fmt: skip
        self._whole: dict[str, npt.NDArray[np.float32]] = {}
        self._prompts = np.array([self._shared(int(i)) for i in self.kept], np.int64)

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

    def __getitem__(self, i: int) -> Family:
        pair, cut = int(self.kept[i]), int(self._prompts[i])
        ends = {2 * pair + side: int(end) for side, end in enumerate(self._lengths[pair])}
        texts = [(self.segments.ids(n, 0, end), self.segments.mask(n, 0, end)) for n, end in ends.items()]
        start = 0
        if self.too_long == "left":  # one beginning for both, so that they still share it
            start = min(max(0, max(len(ids) for ids, _ in texts) - self.max_length), cut - 1)
        endings = []
        for side, (ids, mask) in enumerate(texts):
            stop = min(len(ids), start + self.max_length)
            whole = {name: float(values[i, side]) for name, values in self._whole.items()}
            endings.append(Ending(ids[cut:stop], mask[cut:stop], whole=whole))
        return Family(self.segments.record_id(2 * pair), texts[0][0][start:cut], tuple(endings))

    def sizes(self, layout: Layout) -> npt.NDArray[np.int64]:
        lengths = np.minimum(self._lengths[self.kept], self.max_length)
        return lengths.sum(1) - (self._prompts if layout == "tree" else 0)

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
