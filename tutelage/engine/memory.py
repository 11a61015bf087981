"""Which part of the cache is in memory.

Places of our cache have room for a whole context each, but memory comes only as tokens are written to them, page by page, and is
given back when it is needed elsewhere. So places can be many and contexts long; what counts is tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from tutelage.engine.blocks import Slots
from tutelage.engine.sequence import Sequence


def _nothing(slot: int, tokens: int) -> None: ...


@dataclass(slots=True)
class Memory:
    """Tokens in memory by place, at most `most` over all places (None: no limit). A single sequence may always go on.

    trim: gives back the memory of a place behind so many tokens.
    """

    slots: Slots
    most: int | None = None
    trim: Callable[[int, int], None] = _nothing
    resident: dict[int, int] = field(default_factory=dict)

    def hold(self, slot: int, tokens: int) -> None:
        """A place is going to have so many tokens."""
        self.resident[slot] = max(self.resident.get(slot, 0), tokens)

    def drop(self, slot: int, tokens: int = 0) -> None:
        """A place has so many tokens left."""
        if self.resident.get(slot, 0) > tokens:
            self.trim(slot, tokens)
            self.resident[slot] = tokens

    def more(self, slot: int, tokens: int) -> int:
        """Tokens that would come to those in memory if a place had so many."""
        return max(0, tokens - self.resident.get(slot, 0))

    def admits(self, tokens: int, active: Iterable[Sequence], ahead: int) -> bool:
        """Whether so many tokens have room beside the sequences that have places, and some growth of theirs."""
        return self.most is None or tokens + sum(max(s.cached, s.target) + GROWTH + ahead for s in active) <= self.most

    def make_room(self, tokens: int, active: Collection[Sequence], ahead: int, kept: Collection[int] = ()) -> bool:
        """Room for so many more tokens: free places but `kept` are emptied, longest unused first, then what active ones hold
        behind their texts. False where that is not enough."""
        if self.most is None or sum(self.resident.values()) + tokens <= self.most:
            return True
        for slot in self.slots.oldest():
            if slot not in kept and self.resident.get(slot):
                self.slots.empty(slot)
                self.drop(slot)
                if sum(self.resident.values()) + tokens <= self.most:
                    return True
        for sequence in active:
            self.drop(sequence.slot, max(sequence.cached, sequence.target) + ahead)
        return sum(self.resident.values()) + tokens <= self.most


GROWTH = 16
"""Tokens that each running answer is to have room for before another one begins."""
