"""How alike two texts are."""

from __future__ import annotations

import numpy as np


def edits(a: str, b: str) -> int:
    """Levenshtein's distance: characters to insert, delete or replace to make one text of the other."""
    if not a or not b:
        return len(a) + len(b)
    other = np.array([ord(c) for c in b])
    steps = np.arange(len(b) + 1)
    row = steps.copy()
    for i, c in enumerate(a, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (other != ord(c)))
        row = np.concatenate([[i], best])
        row = np.minimum.accumulate(row - steps) + steps  # insertions, which run along the row
    return int(row[-1])


def similarity(a: str, b: str) -> float:
    """1 for equal texts, 0 for texts with nothing in common: 1 - edits / the longer one's length."""
    longest = max(len(a), len(b))
    return 1.0 if not longest else 1 - edits(a, b) / longest
