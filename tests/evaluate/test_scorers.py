"""Agreement with people, beside what length alone would give: by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tutelage.evaluate.scorers import correlation, of_pairs, of_ratings, of_steps, separation


def test_pairs_by_hand() -> None:
    """A tie that counts as right flatters a model which gives everything the same reward."""
    rewards = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 1.0], [4.0, 0.0]])
    lengths = np.array([[5.0, 3.0], [2.0, 9.0], [4.0, 4.0], [1.0, 6.0]])
    found = of_pairs(rewards, lengths)
    assert found["accuracy"]["value"] == 0.5 and found["longer_wins"]["value"] == 0.5 and found["pairs"] == 4
    assert found["margin"]["value"] == pytest.approx((1 - 3 + 0 + 4) / 4)
    assert found["against_length"]["value"] == 1.0 and found["against_length"]["n"] == 1
    assert found["rewards"]["mean"] == 1.5 and found["rewards"]["p100"] == 4.0
    assert found["correlation_with_length"] == pytest.approx(np.corrcoef(rewards.ravel(), lengths.ravel())[0, 1])
    same = of_pairs(np.zeros((40, 2)), np.stack([np.full(40, 2.0), np.ones(40)], 1))
    assert same["accuracy"]["value"] == 0.5 and same["longer_wins"]["value"] == 1.0 and same["correlation_with_length"] is None
    assert same["beyond_length"] == pytest.approx(2 * 0.5**40)
    short = of_pairs(np.stack([np.ones(40), np.zeros(40)], 1), np.stack([np.ones(40), np.full(40, 2.0)], 1))
    assert short["longer_wins"]["value"] == 0.0 and short["beyond_length"] == 1.0  # the shorter answer is as good a rule


def test_ratings_by_hand() -> None:
    """A model is compared with the mean of the training part, over what was rated; an aspect nobody rated has no line."""
    scores = np.array([[1.0, 0.0, 7.0], [2.0, 0.0, 7.0], [3.0, 0.0, 7.0]])
    nothing = math.nan
    ratings = np.array([[1.0, 2.0, nothing], [2.0, nothing, nothing], [5.0, 4.0, nothing]])
    found = of_ratings(scores, ratings, np.array([1.0, 2.0, 3.0]), ("a", "b", "c"), np.array([3.0, 3.0, 0.0]))
    assert set(found) == {"a", "b"} and found["b"]["ratings"] == 2
    assert found["a"]["error"]["value"] == pytest.approx(2 / 3)
    assert found["a"]["explained"]["value"] == pytest.approx(1 - 4 / (4 + 1 + 4))
    assert found["b"]["explained"]["value"] == pytest.approx(1 - 20 / 2) and found["b"]["correlation"] is None
    assert found["a"]["correlation_with_length"] == pytest.approx(1.0)


def test_steps_by_hand() -> None:
    """Most steps are right in most data: 70% is no achievement where always saying right gives 75%."""
    found = of_steps(np.array([2.0, -1.0, 0.5, 3.0]), np.array([1.0, 1.0, 0.0, 1.0]), 0.9)
    assert found["accuracy"]["value"] == 0.5 and found["usual"]["value"] == 0.75
    assert found["separation"] == pytest.approx(2 / 3)
    assert "separation" not in of_steps(np.array([1.0]), np.array([1.0]), 1.0)


def test_separation_counts_pairs() -> None:
    """Against the plain count, ties included."""
    rng = np.random.default_rng(0)
    high, low = rng.integers(0, 6, 40).astype(float), rng.integers(0, 5, 30).astype(float)
    plain = np.mean([(a > b) + 0.5 * (a == b) for a in high for b in low])
    assert separation(high, low) == pytest.approx(plain)
    assert correlation(np.array([1.0]), np.array([2.0])) is None
