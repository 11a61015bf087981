"""An n-gram model: interpolated modified Kneser-Ney, exact and vectorised. numpy only.

S. F. Chen and J. Goodman, "An empirical study of smoothing techniques for language modeling", 1999, section 4.1: three
discounts per order from counts of counts, continuation counts below the highest order, interpolation down to the uniform
distribution. N-grams that begin a document keep their plain counts below the highest order (nothing can stand to their left).

Symbols are integers 0..size-1. Each document is predicted symbol by symbol, and then its end: the end is one more
symbol (`size`), the begin mark (`size + 1`) is only ever a context. So `size + 1` outcomes share probability one.

An n-gram is the pair (id of its first n-1 symbols, last symbol), packed exactly into one 64-bit key; sorting the keys gives
the id of the n-gram. No hash, no collision, no Python loop over n-grams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(slots=True, frozen=True)
class Level:
    """The n-grams of one length."""

    keys: Ints  # sorted; key = id of the context * (size + 2) + last symbol; the n-gram's id is its place here
    contexts: Ints  # per n-gram: id of its context, an n-gram one shorter
    plain: Tables  # from counts: used when this is the highest order
    continuation: Tables  # from numbers of distinct left neighbours: used below the highest order


@dataclass(slots=True, frozen=True)
class Tables:
    """Discounted counts per n-gram, totals and what is left over per context."""

    kept: Floats  # per n-gram: max(count - discount, 0)
    total: Floats  # per context: sum of counts of its n-grams; 0 where it has none
    left: Floats  # per context: sum of the discounts taken; left / total goes to the shorter context
    discounts: tuple[float, float, float]  # D1, D2, D3+


class KneserNey:
    """A fitted model.

    Example:
        >>> model = KneserNey.fit([np.frombuffer(b"abracadabra", np.uint8)], size=256, order=3)
        >>> model.bits([np.frombuffer(b"abra", np.uint8)]).shape     # orders 1..3 by documents
        (3, 1)
    """

    def __init__(self, size: int, levels: list[Level]) -> None:
        self.size, self.levels = size, levels

    @property
    def order(self) -> int:
        return len(self.levels)

    @classmethod
    def fit(cls, documents: Sequence[NDArray[np.integer]], *, size: int, order: int) -> KneserNey:
        """Counts every n-gram of 1..`order` symbols inside the documents. Raises `ValueError` for no documents."""
        if not documents or order < 1:
            raise ValueError("an n-gram model needs documents and an order of at least 1")
        symbols, place, _ = _join(documents, size)
        width = size + 2
        ids = symbols.copy()  # id of the n-gram of the current length that ends here; meaningless where place < n - 1
        keys, contexts, counts, suffixes = [np.arange(width)], [np.zeros(width, np.int64)], [], []
        outcome = np.where(place > 0, symbols, size + 1)
        unigrams = np.bincount(outcome, minlength=width)
        unigrams[size + 1] = 0
        counts.append(unigrams)
        for n in range(2, order + 2):  # one longer than needed: its types are the left neighbours of the highest order
            ends = np.flatnonzero(place >= n - 1)
            packed = ids[ends - 1] * width + symbols[ends]
            unique, first, inverse, count = np.unique(packed, return_index=True, return_inverse=True, return_counts=True)
            suffixes.append(ids[ends[first]])
            if n <= order:
                keys.append(unique)
                contexts.append(unique // width)
                counts.append(count)
                ids = np.full(len(symbols), -1, np.int64)
                ids[ends] = inverse
        levels = []
        for n in range(1, order + 1):
            begins = _begins(n, keys, contexts, size)
            left = np.bincount(suffixes[n - 1], minlength=len(keys[n - 1]))
            distinct = np.where(begins, counts[n - 1], left)
            parents = 1 if n == 1 else len(keys[n - 2])
            levels.append(
                Level(
                    keys[n - 1], contexts[n - 1],
                    _tables(counts[n - 1], contexts[n - 1], parents), _tables(distinct, contexts[n - 1], parents),
                )
            )  # fmt: skip
        return cls(size, levels)

    def bits(self, documents: Sequence[NDArray[np.integer]]) -> Floats:
        """Bits that each document costs, its end included, for each order: [order, documents]."""
        symbols, place, owner = _join(documents, self.size)
        ends = np.flatnonzero(place > 0)
        probability = self._probabilities(symbols, place, ends)
        out = np.empty((self.order, len(documents)))
        for n, p in enumerate(probability):
            out[n] = np.bincount(owner[ends], weights=-np.log2(p), minlength=len(documents))
        return out

    def distribution(self, context: NDArray[np.integer] | Sequence[int]) -> Floats:
        """Probability of each outcome (symbols, then the end) after a document that began with `context`: [order, size + 1]."""
        start = np.concatenate([[self.size + 1], np.asarray(context, np.int64)]).astype(np.int64)
        rows = np.repeat(start[None], self.size + 1, axis=0)
        rows = np.concatenate([rows, np.arange(self.size + 1)[:, None]], axis=1)
        place = np.tile(np.arange(rows.shape[1]), len(rows))
        ends = np.flatnonzero(place == rows.shape[1] - 1)
        return np.stack(self._probabilities(rows.reshape(-1), place, ends))

    def _probabilities(self, symbols: Ints, place: Ints, ends: Ints) -> list[Floats]:
        """Probability of `symbols[ends]` given the symbols before it, with each order from 1 up as the highest one."""
        width = self.size + 2
        lower = np.full(len(ends), 1.0 / (self.size + 1))
        known = np.zeros(len(symbols), np.int64)  # id of the context that ends one before each place; -1: not seen
        out = []
        for n, level in enumerate(self.levels, 1):
            packed = np.where(known >= 0, known * width + symbols, -1)
            found = np.minimum(np.searchsorted(level.keys, packed), len(level.keys) - 1)
            ids = np.where((level.keys[found] == packed) & (place >= n - 1), found, -1)
            top = _interpolate(level.plain, known[ends], ids[ends], lower)
            # where the document is still shorter than this context, the shorter order already had all there is, and
            # its n-gram begins the document: its counts are plain ones at every order
            out.append(np.where(place[ends] >= n - 1, top, lower))
            below = _interpolate(level.continuation, known[ends], ids[ends], lower)
            lower = np.where(place[ends] >= n - 1, below, lower)
            known = np.concatenate([[-1], ids[:-1]])
            known[place < n] = -1
        return out


def _interpolate(tables: Tables, context: Ints, ids: Ints, lower: Floats) -> Floats:
    total = np.where(context >= 0, tables.total[context], 0.0)
    kept = np.where(ids >= 0, tables.kept[ids], 0.0)
    left = tables.left[context]
    safe = np.where(total > 0, total, 1.0)
    return np.where(total > 0, (kept + left * lower) / safe, lower)


def _tables(counts: Ints, contexts: Ints, parents: int) -> Tables:
    counts = counts.astype(np.int64)
    d = _discounts(counts)
    taken = np.array([0.0, *d])[np.minimum(counts, 3)]
    return Tables(
        counts - taken,
        np.bincount(contexts, weights=counts, minlength=parents).astype(np.float64),
        np.bincount(contexts, weights=taken, minlength=parents).astype(np.float64),
        d,
    )


def _discounts(counts: Ints) -> tuple[float, float, float]:
    """D1, D2, D3+ from the numbers of n-grams seen 1, 2, 3 and 4 times (Chen and Goodman, equation 26)."""
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    middle = 0.5, 1.0, 1.5  # of the allowed range, where there are too few types for an estimate, as with single bytes
    if not (n1 and n2 and n3 and n4):
        return middle
    y = n1 / (n1 + 2 * n2)
    found = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
    # a discount of 0 would leave nothing for what was not seen: infinite bits
    return found if all(0 < d <= k for k, d in enumerate(found, 1)) else middle


def _begins(n: int, keys: list[Ints], contexts: list[Ints], size: int) -> NDArray[np.bool_]:
    """Which n-grams of length `n` begin a document: follow the contexts down to the first symbol."""
    if n == 1:
        return keys[0] == size + 1
    first = contexts[n - 1]
    for shorter in range(n - 2, 0, -1):
        first = contexts[shorter][first]
    return first == size + 1


def _join(documents: Sequence[NDArray[np.integer]], size: int) -> tuple[Ints, Ints, Ints]:
    """All documents in a row as begin, symbols, end; each symbol's place in its document; each symbol's document."""
    lengths = np.array([len(d) + 2 for d in documents], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    symbols = np.empty(starts[-1], np.int64)
    for start, document in zip(starts, documents, strict=False):
        symbols[start] = size + 1
        symbols[start + 1 : start + 1 + len(document)] = document
        symbols[start + 1 + len(document)] = size
    owner = np.repeat(np.arange(len(documents)), lengths)
    place = np.arange(starts[-1]) - starts[:-1][owner]
    return symbols, place, owner
