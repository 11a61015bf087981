"""Intervals against published values, and against how often they hold."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tutelage.evaluate import intervals as iv


def test_mcnemar_exact_published_value() -> None:
    """A chi-square approximation, or a one-sided sum, would give another number for 12 against 3."""
    assert iv.mcnemar(12, 3) == 0.03515625
    assert iv.mcnemar(3, 12) == 0.03515625
    assert iv.mcnemar(0, 0) == 1.0
    assert iv.mcnemar(5, 5) == 1.0


@pytest.mark.parametrize(
    ("p", "freedom", "t"), [(0.975, 1, 12.7062), (0.975, 10, 2.2281), (0.95, 5, 2.0150), (0.995, 30, 2.7500)]
)
def test_student_quantiles_from_tables(p: float, freedom: int, t: float) -> None:
    """The normal quantile in place of t makes small samples look certain."""
    assert iv.student_quantile(p, freedom) == pytest.approx(t, abs=5e-5)
    assert iv.student_quantile(1 - p, freedom) == pytest.approx(-t, abs=5e-5)


def test_wilson_and_clopper_pearson_published() -> None:
    """Wald's interval is [0, 0] for 0 of 10: the bug that both of these end. Values: Newcombe 1998, table I."""
    w, c = iv.wilson(15, 148), iv.clopper_pearson(15, 148)
    assert (round(w.low, 4), round(w.high, 4)) == (0.0624, 0.1605)
    assert (round(c.low, 4), round(c.high, 4)) == (0.0578, 0.1617)
    none = iv.wilson(0, 10)
    assert none.low == 0 and none.high == pytest.approx(0.2775, abs=1e-4)
    assert iv.clopper_pearson(0, 10).high == pytest.approx(1 - 0.025**0.1)
    assert iv.clopper_pearson(10, 10).low == pytest.approx(0.025**0.1)


def test_mean_and_paired_difference() -> None:
    """Treating pairs as independent throws the gain of pairing away."""
    a = np.array([3.0, 5.0, 9.0, 11.0])
    estimate = iv.mean(a)
    assert estimate.value == 7 and estimate.standard_error == pytest.approx(a.std(ddof=1) / 2)
    assert estimate.high - 7 == pytest.approx(3.1824 * estimate.standard_error, rel=1e-4)
    paired = iv.paired_difference(a + np.array([0.9, 1.1, 1.0, 1.0]), a)
    assert paired.low > 0.8 and paired.high < 1.2


@pytest.mark.parametrize(
    ("counts", "low", "high"), [((36, 12, 2, 0), 0.0569, 0.3404), ((1, 97, 0, 2), 0.9031, 0.9867), ((0, 30, 0, 0), 0.8395, 1.0)]
)
def test_paired_shares_as_published(counts: tuple[int, ...], low: float, high: float) -> None:
    """Student's t of the differences: -0.8 over five texts was said to lie between -1.029 and -0.571. Newcombe 1998."""
    a, b = (np.repeat(shares, counts) for shares in ([1, 1, 0, 0], [1, 0, 1, 0]))
    for sign, (x, y) in ((1, (a, b)), (-1, (b, a))):
        found = iv.paired_shares(x, y)
        assert found.value == pytest.approx(sign * (counts[1] - counts[2]) / sum(counts))
        assert [sign * e for e in (found.low, found.high)][::sign] == pytest.approx([low, high], abs=5e-5)
        assert found.standard_error == pytest.approx(float((x - y).std() / len(x) ** 0.5))


def test_paired_shares_hold_in_their_range() -> None:
    """An interval that leaves [-1, 1], or that holds the truth less often than it says."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        a, b = rng.random((2, 30)) < np.array([[0.9], [0.3]])
        b = np.where(rng.random(30) < 0.5, a, b)
        found = iv.paired_shares(a, b)
        assert -1 <= found.low <= found.value <= found.high <= 1
        hits += found.low <= 0.3 <= found.high
    assert hits >= 368


@pytest.mark.parametrize(
    ("values", "words"),
    [([0.7], "one value: no interval"), ([0.0, 1.0], "two values: no interval"),
     ([1.0] * 8, "8 values, all the same: no interval")],
)  # fmt: skip
def test_too_little_to_tell_has_no_interval(values: list[float], words: str) -> None:
    """Guards against `0.700 (0.700 to 0.700)`: an interval without width reads as certainty. JSON has no infinity."""
    for estimate in (iv.mean(values), iv.paired_difference(values, np.zeros(len(values)))):
        assert (estimate.low, estimate.high) == (-math.inf, math.inf) and math.isnan(estimate.standard_error)
        assert estimate.said() == iv.said(estimate.to_json()) == f"{np.mean(values):.3f} ({words})"
        row = json.loads(json.dumps(estimate.to_json(), allow_nan=False))
        assert (row["low"], row["high"], row["standard_error"]) == (None, None, None) and row["n"] == len(values)
    assert iv.mean([0.0, 1.0, 1.0]).said("+.1%") == "+66.7% (-76.8% to +210.1%)"


def test_ratio_resamples_documents_not_tokens() -> None:
    """Resampling tokens of a few long documents gives an interval many times too narrow; 95 in 100 must hold the truth."""
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(100):
        level = rng.normal(2.0, 0.3, size=30)  # bits per byte differ between documents
        sizes = rng.integers(500, 1500, size=30)
        estimate = iv.ratio(level * sizes, sizes, seed=trial, draws=300)
        hits += estimate.low <= 2.0 <= estimate.high
    assert 0.87 <= hits / 100 <= 0.99


def test_few_units_widen_the_interval() -> None:
    """With eight units the plain percentile interval covers 88%, not 95%."""
    rng = np.random.default_rng(2)
    inside = 0
    for trial in range(300):
        estimate = iv.ratio(rng.normal(2, 0.3, size=8), np.ones(8), seed=trial, draws=500)
        inside += estimate.low <= 2 <= estimate.high
    assert inside / 300 > 0.92


def test_ratio_is_seeded_and_transforms() -> None:
    """Two runs must print the same interval; perplexity is exp of the ratio, not the ratio of exps."""
    nats, tokens = np.array([10.0, 30.0, 25.0]), np.array([5, 10, 10])
    one, two = (iv.ratio(nats, tokens, seed=3, transform=np.exp) for _ in range(2))
    assert one == two
    assert one.value == pytest.approx(math.exp(65 / 25))
    assert one.low <= one.value <= one.high


def test_relative_saving_is_paired() -> None:
    """Resampling the two systems apart hides a difference that every single document shows."""
    rng = np.random.default_rng(0)
    theirs = rng.lognormal(7, 1, size=60)
    saving = iv.relative_saving(theirs * rng.normal(0.9, 0.01, size=60), theirs)
    assert 0.08 < saving.low < saving.value < saving.high < 0.12


def test_many_documents_in_groups_keep_the_interval() -> None:
    """Drawing 2,000 times from 100,000 documents would take minutes; grouping them must not change the width."""
    bits, sizes = np.random.default_rng(0).lognormal(7, 0.5, size=(2, 20_000))
    estimate = iv.ratio(bits, sizes, draws=300)
    # delta method for a ratio of means
    by_hand = np.std(bits - estimate.value * sizes) / sizes.mean() / np.sqrt(20_000)
    assert estimate.standard_error == pytest.approx(by_hand, rel=0.15)
    assert estimate.n == 20_000


@pytest.mark.parametrize(
    "call", [lambda: iv.mean([]), lambda: iv.wilson(3, 2), lambda: iv.wilson(0, 0), lambda: iv.ratio([], [])]
)
def test_nothing_to_estimate_is_an_error(call) -> None:  # type: ignore[no-untyped-def]
    """An empty evaluation must not print a number."""
    with pytest.raises(ValueError):
        call()


def test_intervals_stay_within_what_can_be() -> None:
    """Rewards between 0 and 1 had 0.145 (-0.253 to 0.543), and overlap of words -0.059."""
    few = iv.mean([0.0, 0.0, 0.02, 0.5], bounds=(0.0, 1.0))
    assert few.low == 0.0 and few.value < few.high < iv.mean([0.0, 0.0, 0.02, 0.5]).high + 1e-12
    shares = iv.mean([0, 0, 0, 1, 0, 0, 0, 2, 2], bounds=(0.0, 2.0))
    assert "within 0 to 2" in shares.method
    two = iv.mean([0.0] * 7 + [2.0], bounds=(0.0, 2.0))
    assert (two.low, two.high) == pytest.approx((2 * iv.wilson(1, 8).low, 2 * iv.wilson(1, 8).high))
    a, b = [1.0] * 9 + [0.0], [0.0] * 10
    assert iv.paired_difference(a, b, bounds=(0.0, 1.0)).high <= 1.0 < iv.paired_difference(a, b).high
    assert iv.paired_difference([0.9, 1.0, 0.2], [0.0, 0.1, 0.0], bounds=(0.0, 1.0)).high == 1.0
