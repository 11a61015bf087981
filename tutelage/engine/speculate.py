"""Guesses at the next tokens, checked by the model several at a time.

Lossless: every token is still chosen from its own logits, with its own noise. Guessing switches itself off, by counts, where
guesses fail.
"""

from __future__ import annotations

from typing import Protocol

from tutelage.engine.sequence import Sequence

LONGEST, SHORTEST = 3, 2  # tokens of the ending that is looked for
TRIAL, WORTH, REST = 24, 0.25, 48
"""After so many guesses, fewer than this share accepted stops them for so many tokens."""


class Guesser(Protocol):
    """Where guesses come from."""

    worth: float  # share of guesses that must prove right for guessing to go on

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        """What may come next in each sequence: up to so many tokens."""
        ...


class Lookup(Guesser):
    """Prompt lookup (Saxena 2023): what followed the last time the text ended like this. It costs nothing, and pays for
    summaries, edits, code and quotations."""

    worth = WORTH

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        return [lookup(s.ids, count) for s, count in zip(sequences, most, strict=True)]


def guesses(guesser: Guesser | None, sequences: list[Sequence], most: int) -> list[list[int]]:
    """Guesses for each sequence, none for those that rest or have no room."""
    if guesser is None:
        return [[] for _ in sequences]
    rooms = [_room(s, most) for s in sequences]
    asked = [(s, room) for s, room in zip(sequences, rooms, strict=True) if room > 0]
    found = iter(guesser.propose([s for s, _ in asked], [room for _, room in asked]) if asked else [])
    return [next(found) if room > 0 else [] for room in rooms]


def _room(sequence: Sequence, most: int) -> int:
    if sequence.drafts.rest > 0:
        sequence.drafts.rest -= 1
        return 0
    return min(most, sequence.limit - sequence.made - 1)


def lookup(ids: list[int], most: int) -> list[int]:
    """What followed the latest earlier place where `ids` ended as it does now."""
    for size in range(LONGEST, SHORTEST - 1, -1):
        if len(ids) <= size:
            continue
        ending = ids[-size:]
        last = ending[-1]
        at = len(ids) - 2
        while at >= size - 1:
            if ids[at] == last and ids[at - size + 1 : at + 1] == ending:
                return ids[at + 1 : at + 1 + most]
            at -= 1
    return []


def note(sequence: Sequence, proposed: int, accepted: int, worth: float) -> None:
    """Counts how guesses fared; rests when too few were right."""
    drafts = sequence.drafts
    drafts.proposed += proposed
    drafts.accepted += accepted
    if drafts.proposed >= TRIAL:
        if drafts.accepted < worth * drafts.proposed:
            drafts.rest = REST
        drafts.proposed = drafts.accepted = 0
