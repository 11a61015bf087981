"""Ratings as families for KTO: a prompt with the answer that was judged, and with the answer of another prompt.

The other answer is never learned: how much likelier the policy makes such answers than the reference does says how far the two
are apart. Which one it is stays the same for the whole training, so that the reference's log-probabilities are computed once:
answers rotate in the data's order, by the fewest places at which the fewest come to a prompt of their own (data often has several
answers to a prompt in a row).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tutelage.data.groups.dropped import TOO_LONG, UNTRAINED, cut, nothing_left
from tutelage.data.groups.groups import Completion, Layout, PromptGroup
from tutelage.data.tokens.shards import Segments
from tutelage.errors import DataError

FARTHEST = 64  # places that answers are moved at most
FAIR = (1.0, 4 / 3)  # between these, weight times number of good answers over that of bad ones (KTO's paper, eq. 8)
Ints = npt.NDArray[np.int64]


class KtoGroups:
    """Families of two endings over the tokens of ratings. `desirable` [segments]: 1 or 0. `whole`: named numbers of each answer,
    [families, 2] (`reference`).

    Texts longer than `max_length` are left out (`too_long="drop"`), or lose the beginning of their prompt (`left`) or the end of
    their answer (`right`); answers of other prompts are cut at their end. `report` counts all of it. Raises `NothingLeft` where
    fewer than two ratings are left.
    """

    def __init__(self, segments: Segments, desirable: npt.NDArray[Any], max_length: int, too_long: str = "drop") -> None:
        assert segments.record == "Rating", segments.record
        assert desirable.shape == (len(segments),), desirable.shape
        self.segments, self.max_length, self.too_long = segments, max_length, too_long
        lengths, trained = segments.lengths.astype(np.int64), segments.supervised > 0
        cuts = np.array([max(1, int(np.argmax(segments.mask(i) > 0))) for i in range(len(segments))], np.int64)
        starts = np.clip(lengths - max_length, 0, cuts - 1) if too_long == "left" else np.zeros_like(cuts)
        fits = lengths <= max_length if too_long == "drop" else cuts - starts < max_length
        self.kept = np.flatnonzero(fits & trained)
        self.report = {
            "ratings": len(segments), TOO_LONG: int((~fits).sum()), UNTRAINED: int((fits & ~trained).sum()),
            **cut(too_long, (lengths[self.kept] > max_length).sum()),
        }  # fmt: skip
        if len(self.kept) < 2:
            needed = lengths if too_long == "drop" else cuts - starts + 1
            raise nothing_left(
                "KTO needs two ratings at least", self.report, segments.folder, max_length, too_long, needed
            )  # fmt: skip
        self.desirable = desirable[self.kept].astype(bool)
        self._whole: dict[str, npt.NDArray[np.float32]] = {}
        self._cuts, self._starts = cuts[self.kept], starts[self.kept]
        seen: dict[bytes, int] = {}
        self.shift, met = rotation(np.array([seen.setdefault(self._prompt(i).tobytes(), i) for i in range(len(self.kept))]))
        answers, room = lengths[self.kept] - self._cuts, max_length - (self._cuts - self._starts)
        self._sizes = np.minimum(np.stack([answers, np.roll(answers, self.shift)], 1), room[:, None])  # of both endings
        self.report |= {
            "answers of other prompts, cut at their end": int((self._sizes[:, 1] < np.roll(answers, self.shift)).sum()),
            "answers of other prompts that are to the same one": met,
        }

    def give(self, name: str, values: npt.NDArray[Any]) -> None:
        """Names a number of each answer: [families, 2]."""
        assert values.shape == (len(self.kept), 2), (name, values.shape)
        self._whole[name] = values.astype(np.float32)

    @property
    def digest(self) -> str:
        about = f"{self.segments.digest} {self.max_length} {self.too_long} {self.shift}"
        streams = b"".join(name.encode() + self._whole[name].tobytes() for name in sorted(self._whole))
        return hashlib.sha256(about.encode() + self.desirable.tobytes() + streams).hexdigest()

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> PromptGroup:
        good = float(self.desirable[i])
        endings = []
        for side, j in enumerate((i, (i - self.shift) % len(self))):
            number, cut = int(self.kept[j]), int(self._cuts[j])
            stop = cut + int(self._sizes[i, side])
            whole = {"desirable": good} | {name: float(values[i, side]) for name, values in self._whole.items()}
            endings.append(Completion(self.segments.ids(number)[cut:stop], self.segments.mask(number)[cut:stop], whole=whole))
        name = self.segments.record_id(int(self.kept[i]))
        return PromptGroup(name, self._prompt(i), tuple(endings))

    def sizes(self, layout: Layout) -> Ints:
        return self._sizes.sum(1) + (self._cuts - self._starts) * (1 if layout == "tree" else 2)

    def balance(self, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> str:
        """How many answers are good and bad, and a weight that would balance them where the weights given do not."""
        good, bad = int(self.desirable.sum()), int((~self.desirable).sum())
        said = f"{good:,} desirable and {bad:,} undesirable answers, weighted {desirable_weight:g} and {undesirable_weight:g}"
        if not good or not bad:
            return f"{said}: of one kind only, which teaches nothing about the other"
        least, most = (limit * undesirable_weight * bad / good for limit in FAIR)
        if least <= desirable_weight <= most:
            return said
        return f"{said}: out of balance; desirable_weight between {least:.3g} and {most:.3g} would even them out"

    def _prompt(self, i: int) -> npt.NDArray[Any]:
        return self.segments.ids(int(self.kept[i]))[int(self._starts[i]) : int(self._cuts[i])]


def rotation(prompts: Ints) -> tuple[int, int]:
    """`prompts`: equal numbers for equal prompts. By how many places answers move, and how many come to the same prompt all the
    same."""
    places = range(1, min(len(prompts), FARTHEST + 1))
    met = [int((prompts == np.roll(prompts, n)).sum()) for n in places]
    best = int(np.argmin(met))
    return places[best], met[best]


def verdicts(records: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.float32]:
    """[ratings] of rows of ratings: 1 desirable, 0 not. Raises `DataError` for a row that does not say."""
    out = []
    for row in records:
        said = row.get("scores", {}).get("desirable")
        if said not in (0, 1):
            raise DataError(
                "a rating does not say whether the answer is desirable", field="scores.desirable", found=row.get("scores"),
                expected="1 or 0", fix=f"give `label: true` or `false` in every row ({row.get('source')})",
            )  # fmt: skip
        out.append(said)
    return np.array(out, np.float32)
