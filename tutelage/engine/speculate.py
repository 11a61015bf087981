"""Guesses at the next tokens, checked by the model several at a time.

Lossless: every token is still chosen from its own logits, with its own noise. Guessing switches itself off, by counts, where
guesses fail.
"""

from __future__ import annotations

from typing import Protocol

from tutelage.engine.drafts import REST, Drafts
from tutelage.engine.sequence import Sequence

TRIAL = 24
"""Guesses of a sequence after which it is decided whether they pay."""
LONGEST_REST = 3072
"""Tokens that a sequence makes without guesses at most; each time that they did not pay it rests twice as long."""
ALL = 4
"""Times as many for the engine as a whole: short answers would be all trial."""
FIXED = 6
"""A step costs about as much before its first token as for so many tokens; measured: 6.5 for a model of 6M, 9.7 for 100M."""


class Guesser(Protocol):
    """Where guesses come from."""

    cost: float  # of a guess, as a share of a step
    drafts: Drafts  # how all guesses have fared

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        """What may come next in each sequence: up to so many tokens."""
        ...


class Lookup(Guesser):
    """Prompt lookup (Saxena 2023): what followed the last time the text ended like this. It pays for summaries, edits, code and
    quotations."""

    cost = 0.0

    def __init__(self) -> None:
        self.drafts = Drafts()

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        return [s.drafts.endings.after(s.ids, count) for s, count in zip(sequences, most, strict=True)]


def guesses(guesser: Guesser | None, sequences: list[Sequence], most: int) -> list[list[int]]:
    """Guesses for each sequence, none for those that rest or have no room."""
    if guesser is None:
        return [[] for _ in sequences]
    rooms = [_room(guesser, s, most) for s in sequences]
    asked = [(s, room) for s, room in zip(sequences, rooms, strict=True) if room > 0]
    found = iter(guesser.propose([s for s, _ in asked], [room for _, room in asked]) if asked else [])
    return [next(found) if room > 0 else [] for room in rooms]


def _room(guesser: Guesser, sequence: Sequence, most: int) -> int:
    for drafts in (guesser.drafts, sequence.drafts):
        if drafts.rest > 0:
            drafts.rest -= 1
            return 0
    return min(most, sequence.limit - sequence.made - 1)


def note(sequence: Sequence, proposed: int, accepted: int, guesser: Guesser, running: int) -> None:
    """Counts how guesses fared, in a step of so many sequences. The sequence, or all of them, rest when too few were right.

    A step over n tokens costs FIXED + n. So a guess adds a share of running / (FIXED + running) to its sequence's part, and what
    it costs to make; it gives a token where it is right.
    """
    worth = running / (FIXED + running) + guesser.cost
    for drafts, times in ((sequence.drafts, 1), (guesser.drafts, ALL)):
        drafts.proposed += proposed
        drafts.accepted += accepted
        if drafts.proposed < times * TRIAL:
            continue
        if drafts.accepted < worth * drafts.proposed:
            drafts.rest = times * drafts.next_rest
            drafts.next_rest = min(2 * drafts.next_rest, LONGEST_REST)
        else:
            drafts.next_rest = REST
        drafts.proposed = drafts.accepted = 0
