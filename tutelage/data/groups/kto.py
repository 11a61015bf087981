"""KTO groups: a prompt with its rated completion, and with the completion of another prompt.

The second completion is never learned: how much likelier the policy makes such completions than the reference does estimates
how far the two have diverged. It stays the same for the whole training, so that the reference's log-probabilities are computed
once. Completions are rotated in the order of the data, by the offset (the smallest, if several are equally good) that leaves
the fewest on their own prompt; data often has several completions of a prompt in a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tutelage.data.groups.dropped import TOO_LONG, UNTRAINED, cut
from tutelage.data.groups.segment_groups import Ints, PairedGroups
from tutelage.data.tokens.shards import Segments
from tutelage.errors import DataError

MAX_OFFSET = 64  # largest rotation that is tried
FAIR = (1.0, 4 / 3)  # between these, weight times number of good completions over that of bad ones (KTO's paper, eq. 8)


class KtoGroups(PairedGroups):
    """Rated completions, each followed by the completion of another prompt. `desirable` [segments]: 1 or 0.

    Completions of other prompts are cut at their end if they are too long. Raises `NothingLeft` if fewer than two ratings
    remain.
    """

    def __init__(self, segments: Segments, desirable: npt.NDArray[Any], max_length: int, too_long: str = "drop") -> None:
        super().__init__(segments, "Rating", max_length, too_long)
        assert desirable.shape == (len(segments),), desirable.shape
        lengths, trained = segments.lengths.astype(np.int64), segments.supervised > 0
        ends = np.array([max(1, int(np.argmax(segments.mask(i) > 0))) for i in range(len(segments))], np.int64)
        starts = self._prompt_starts(lengths, ends)
        fits = lengths <= max_length if too_long == "drop" else ends - starts < max_length
        self.kept = np.flatnonzero(fits & trained)
        self.report = {
            "ratings": len(segments),
            TOO_LONG: int((~fits).sum()),
            UNTRAINED: int((fits & ~trained).sum()),
            **cut(too_long, (lengths[self.kept] > max_length).sum()),
        }
        if len(self.kept) < 2:
            raise self._nothing_left("KTO needs two ratings or more", lengths, ends - starts + 1)
        self.desirable = desirable[self.kept].astype(bool)
        self._starts, self._ends = starts[self.kept], ends[self.kept]
        seen: dict[bytes, int] = {}
        self.shift, on_own_prompt = rotation(
            np.array([seen.setdefault(self._prompt(i).tobytes(), i) for i in range(len(self.kept))])
        )
        own, room = lengths[self.kept] - self._ends, max_length - (self._ends - self._starts)
        others = np.roll(own, self.shift)
        self._sizes = np.minimum(np.stack([own, others], 1), room[:, None])
        self.report |= {
            "answers of other prompts, cut at their end": int((self._sizes[:, 1] < others).sum()),
            "answers of other prompts that are to the same one": on_own_prompt,
        }

    def _sources(self, i: int) -> Sequence[tuple[int, int]]:
        other = (i - self.shift) % len(self)
        return tuple((int(self.kept[j]), int(self._ends[j])) for j in (i, other))

    def _values_of(self, i: int, side: int) -> dict[str, float]:
        return {"desirable": float(self.desirable[i])} | super()._values_of(i, side)

    def _identity(self) -> bytes:
        return super()._identity() + f" {self.shift}".encode() + self.desirable.tobytes()

    def _prompt(self, i: int) -> npt.NDArray[Any]:
        return self.segments.ids(int(self.kept[i]))[int(self._starts[i]) : int(self._ends[i])]

    def balance(self, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> str:
        """The number of good and bad completions and, if the weights do not balance them, weights that would."""
        good, bad = int(self.desirable.sum()), int((~self.desirable).sum())
        summary = f"{good:,} desirable and {bad:,} undesirable answers, weighted {desirable_weight:g} and {undesirable_weight:g}"
        if not good or not bad:
            return f"{summary}: of one kind only, which teaches nothing about the other"
        least, most = (limit * undesirable_weight * bad / good for limit in FAIR)
        if least <= desirable_weight <= most:
            return summary
        return f"{summary}: out of balance; desirable_weight between {least:.3g} and {most:.3g} would even them out"


def rotation(prompts: Ints) -> tuple[int, int]:
    """The rotation offset and how many completions still land on their own prompt. `prompts`: equal numbers for equal prompts."""
    offsets = range(1, min(len(prompts), MAX_OFFSET + 1))
    remaining = [int((prompts == np.roll(prompts, n)).sum()) for n in offsets]
    best = int(np.argmin(remaining))
    return offsets[best], remaining[best]


def verdicts(records: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.float32]:
    """Desirability [ratings] of rows: 1 or 0. Raises `DataError` for a row without it."""
    out = []
    for row in records:
        said = row.get("scores", {}).get("desirable")
        if said not in (0, 1):
            raise DataError(
                "the rating has no desirable label", field="scores.desirable", found=row.get("scores"),
                expected="1 or 0", fix=f"give `label: true` or `false` in every row ({row.get('source')})",
            )  # fmt: skip
        out.append(said)
    return np.array(out, np.float32)
