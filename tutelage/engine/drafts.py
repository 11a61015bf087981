"""What a sequence remembers for guesses at its next tokens (`speculate.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field

LONGEST, SHORTEST = 3, 2
"""Tokens of the ending that is looked for."""
REST = 48
"""Tokens that a sequence makes without guesses after the first time that they did not pay."""


class Endings:
    """Where a growing text ended before as it ends now: for every few tokens in a row, the place behind them. Takes in what is
    new at each question."""

    __slots__ = ("_known", "_places")

    def __init__(self) -> None:
        self._known = 0  # tokens taken in, but for the endings at the last of them
        self._places: dict[tuple[int, ...], int] = {}

    def after(self, ids: list[int], most: int) -> list[int]:
        """Up to `most` tokens that followed the latest earlier place where `ids` ended as it does now, by the longest ending that
        there is. `ids` is the text of earlier questions, and more."""
        for end in range(max(self._known, SHORTEST), len(ids)):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._places[tuple(ids[end - size : end])] = end
        self._known = len(ids)
        for size in range(min(LONGEST, len(ids)), SHORTEST - 1, -1):
            place = self._places.get(tuple(ids[len(ids) - size :]))
            if place is not None:
                return ids[place : place + most]
        return []


@dataclass(slots=True)
class Drafts:
    """How guesses have fared."""

    proposed: int = 0
    accepted: int = 0
    rest: int = 0  # tokens to make before guessing again
    next_rest: int = REST
    endings: Endings = field(default_factory=Endings)
