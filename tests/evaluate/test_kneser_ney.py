"""The vectorised n-gram model against a slow one written from the paper's formulas."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from tutelage.evaluate.kneser_ney import KneserNey

TEXTS = [
    b"the cat sat on the mat. the dog sat on the log.", b"a cat and a dog sat.", b"the mat and the log", b"", b"cats, dogs, mats",
    b"once upon a time there was a cat on a mat", b"the end of the tale of the cat",
]  # fmt: skip
HELD = [b"the dog sat on a mat.", b"zebra!", b"", b"the cat sat on the log"]
ALPHABET = sorted({b for t in TEXTS + HELD for b in t})
SIZE = len(ALPHABET)
BEGIN, END = SIZE + 1, SIZE


def coded(text: bytes) -> list[int]:
    return [ALPHABET.index(b) for b in text]


class Slow:
    """Interpolated modified Kneser-Ney with dicts and recursion, as the paper writes it."""

    def __init__(self, texts: list[list[int]], order: int) -> None:
        self.order = order
        self.raw: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 2)]
        for text in texts:
            s = [BEGIN, *text, END]
            for n in range(1, order + 2):
                for i in range(len(s) - n + 1):
                    self.raw[n][tuple(s[i : i + n])] += 1
        self.raw[1].pop((BEGIN,), None)
        self.adjusted: list[dict[tuple[int, ...], int]] = [{} for _ in range(order + 1)]
        for n in range(1, order + 1):
            if n == order:
                self.adjusted[n] = dict(self.raw[n])
                continue
            left: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
            for gram in self.raw[n + 1]:
                left[gram[1:]].add(gram[0])
            self.adjusted[n] = {g: c if g[0] == BEGIN else len(left[g]) for g, c in self.raw[n].items()}
        self.d = [self.discounts(self.adjusted[n]) for n in range(1, order + 1)]

    @staticmethod
    def discounts(counts: dict[tuple[int, ...], int]) -> tuple[float, float, float]:
        n = [sum(c == k for c in counts.values()) for k in range(5)]
        if 0 in n[1:]:
            return 0.5, 1.0, 1.5
        y = n[1] / (n[1] + 2 * n[2])
        d = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
        return (d[0], d[1], d[2]) if all(0 < x <= k for k, x in enumerate(d, 1)) else (0.5, 1.0, 1.5)

    def p(self, history: tuple[int, ...], w: int) -> float:
        history = history[max(0, len(history) - self.order + 1) :] if self.order > 1 else ()
        return self.at(history, w)

    def at(self, history: tuple[int, ...], w: int) -> float:
        n = len(history) + 1
        lower = self.at(history[1:], w) if history else 1 / (SIZE + 1)
        follow = {g[-1]: c for g, c in self.adjusted[n].items() if g[:-1] == history and c > 0}
        if not follow:
            return lower
        total, d = sum(follow.values()), (0.0, *self.d[n - 1])
        left = sum(d[min(c, 3)] for c in follow.values())
        c = follow.get(w, 0)
        return (c - d[min(c, 3)] + left * lower) / total

    def bits(self, text: list[int]) -> float:
        s = [BEGIN, *text, END]
        return -sum(math.log2(self.p(tuple(s[:i]), s[i])) for i in range(1, len(s)))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_slow_model(order: int) -> None:
    """Hash collisions, a wrong continuation count, or begin-of-document n-grams counted as others would shift these bits."""
    slow = Slow([coded(t) for t in TEXTS], order)
    fast = KneserNey.fit([np.array(coded(t), np.int64) for t in TEXTS], size=SIZE, order=order)
    bits = fast.bits([np.array(coded(t), np.int64) for t in HELD])[order - 1]
    assert bits == pytest.approx([slow.bits(coded(t)) for t in HELD], rel=1e-12)


def test_each_lower_order_of_one_fit_is_the_model_of_that_order() -> None:
    """Choosing the order from one fit is only honest if its row n is what a fit of order n gives."""
    documents = [np.array(coded(t), np.int64) for t in TEXTS]
    held = [np.array(coded(t), np.int64) for t in HELD]
    rows = KneserNey.fit(documents, size=SIZE, order=5).bits(held)
    for order in range(1, 6):
        assert rows[order - 1] == pytest.approx(KneserNey.fit(documents, size=SIZE, order=order).bits(held)[order - 1], rel=1e-12)


@pytest.mark.parametrize("context", [b"", b"t", b"the cat sat", b"zzz", b"on the mat. the dog", b"dogs, mats"])
def test_probabilities_sum_to_one(context: bytes) -> None:
    """A model that gives away more than one looks better than it is: for seen, unseen and document-initial contexts."""
    model = KneserNey.fit([np.array(coded(t), np.int64) for t in TEXTS], size=SIZE, order=6)
    p = model.distribution(coded(context))
    assert p.shape == (6, SIZE + 1)
    assert p.sum(axis=1) == pytest.approx(np.ones(6), abs=1e-12)
    assert (p > 0).all()


def test_sums_to_one_on_bytes_of_real_text() -> None:
    """Also with discounts estimated from real counts of counts rather than the fallback."""
    from pydoc_data.topics import topics

    documents = [np.frombuffer(t.encode(), np.uint8) for t in list(topics.values())[:12]]
    model = KneserNey.fit(documents, size=256, order=8)
    assert 0.5 < model.levels[-1].plain.discounts[0] < 1.0
    for context in (b"The ", b"\xc3", b"class object", b""):
        assert model.distribution(np.frombuffer(context, np.uint8)).sum(axis=1) == pytest.approx(np.ones(8), abs=1e-10)


def test_unseen_symbols_never_cost_infinitely() -> None:
    """Counts of counts that give a discount of 0 leave nothing for an unseen symbol."""
    rng = np.random.default_rng(0)
    for trial in range(20):
        documents = [rng.integers(0, 30, size=int(rng.integers(5, 300))) for _ in range(30)]
        bits = KneserNey.fit(documents, size=40, order=4).bits([np.arange(40)])
        assert np.isfinite(bits).all(), trial


def test_documents_do_not_run_into_each_other() -> None:
    """Joining documents without marks would teach that `b` follows `a`."""
    model = KneserNey.fit([np.array([0]), np.array([1])] * 20, size=3, order=3)
    after_a = model.distribution([0])[2]
    assert after_a[3] > 0.9  # the end
    assert after_a[1] < 0.05


def test_large_vocabulary_has_no_collisions() -> None:
    """Keys are id pairs in 64 bits: ids near the top of a large vocabulary must stay apart."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(19_900, 20_000, size=400) for _ in range(10)]
    model = KneserNey.fit(documents, size=20_000, order=4)
    grams = {tuple(d[i : i + 3].tolist()) for d in documents for i in range(398)}
    inside = sum(1 for k in range(len(model.levels[2].keys)) if model.levels[2].keys[k] % 20_002 < 20_000)
    starts = len({(int(d[0]), int(d[1])) for d in documents})
    assert inside == len(grams) + starts
    assert model.distribution(documents[0][:3]).sum(axis=1) == pytest.approx(np.ones(4), abs=1e-9)
