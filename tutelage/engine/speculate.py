"""Guesses at the next tokens, checked by the model several at a time.

Lossless: every token is still chosen from its own logits, with its own noise. Prompt lookup (Saxena 2023): what followed the
last time the text ended like this. It pays for summaries, edits, code and quotations, and switches itself off, by counts, where
guesses fail.
"""

from __future__ import annotations

from tutelage.engine.sequence import Sequence

LONGEST, SHORTEST = 3, 2  # tokens of the ending that is looked for
TRIAL, WORTH, REST = 24, 0.25, 48
"""After so many guesses, fewer than this share accepted stops them for so many tokens."""


def propose(sequence: Sequence, most: int) -> list[int]:
    """Up to `most` tokens that may come next; none where the text does not repeat itself or guesses have failed."""
    drafts = sequence.drafts
    if drafts.rest > 0:
        drafts.rest -= 1
        return []
    room = min(most, sequence.limit - sequence.made - 1)
    return lookup(sequence.ids, room) if room > 0 else []


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


def note(sequence: Sequence, proposed: int, accepted: int) -> None:
    """Counts how guesses fared; rests when too few were right."""
    drafts = sequence.drafts
    drafts.proposed += proposed
    drafts.accepted += accepted
    if drafts.proposed >= TRIAL:
        if drafts.accepted < WORTH * drafts.proposed:
            drafts.rest = REST
        drafts.proposed = drafts.accepted = 0
