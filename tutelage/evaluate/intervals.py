"""Intervals for every number that evaluation prints. numpy only; those that resample take a seed.

Means use Student's t, proportions Wilson (or the exact Clopper-Pearson) and their differences Newcombe, ratios of sums (bits
per byte, perplexity) a bootstrap that resamples whole documents, because tokens of one document are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
MOST_UNITS = 2000  # most units that a bootstrap draws from; more are first summed in groups
LEAST_VALUES = 3  # fewest values for which a mean has an interval


@dataclass(slots=True, frozen=True)
class Estimate:
    """A number with its interval.

    Example:
        >>> wilson(8, 10).value
        0.8
    """

    value: float
    low: float  # lower end of the interval; without one -inf, of a bootstrap over one unit the value
    high: float  # without one inf
    n: int  # independent units: documents, questions
    standard_error: float  # of the value; NaN where the method has none
    method: str  # how the interval was made, in words

    def to_json(self) -> dict[str, Any]:
        """Without an interval its ends are null."""
        row = asdict(self)
        return row | {key: row[key] if math.isfinite(row[key]) else None for key in ("low", "high", "standard_error")}

    def said(self, form: str = ".3f") -> str:
        """Example: `0.700 (0.512 to 0.888)`; `0.700 (one value: no interval)`."""
        return said(asdict(self), form)


def said(row: Mapping[str, Any], form: str = ".3f", unit: str = "") -> str:
    """`Estimate.said` of an estimate as JSON, with the unit between the value and its interval."""
    ends = [row["low"], row["high"]]
    known = all(end is not None and math.isfinite(end) for end in ends)
    value = f"{row['value']:{form}} {unit}".rstrip()
    return f"{value} ({' to '.join(format(end, form) for end in ends) if known else row['method']})"


def number(estimate: Estimate, unit: str, definition: str) -> dict[str, Any]:
    """An estimate as scores.json stores it."""
    return {**estimate.to_json(), "unit": unit, "definition": definition}


def mean(values: ArrayLike, level: float = 0.95, *, bounds: tuple[float, float] | None = None) -> Estimate:
    """Mean of independent values with Student's t interval. Fewer than `LEAST_VALUES` values, or values that are all the same,
    have no interval: they do not tell how much others would vary. With `bounds` on the possible values, the interval lies
    within them; where every value is one of the bounds, it is Wilson's. Raises `ValueError` for no values."""
    x = np.asarray(values, np.float64)
    if x.size == 0:
        raise ValueError("mean of no values")
    value = float(x.mean())
    if x.size < LEAST_VALUES or np.ptp(x) <= 1e-12 * np.abs(x).max():  # a difference of rounding is none
        few = ("one value", "two values")[x.size - 1] if x.size < LEAST_VALUES else f"{x.size} values, all the same"
        return Estimate(value, -math.inf, math.inf, int(x.size), math.nan, f"{few}: no interval")
    error = float(x.std(ddof=1) / math.sqrt(x.size))
    half = error * student_quantile(0.5 + level / 2, x.size - 1)
    if bounds is None:
        return Estimate(value, value - half, value + half, int(x.size), error, f"Student t, {level:.0%}")
    least, most = bounds
    if np.all((x == least) | (x == most)):  # a share, stretched
        share = wilson(int((x == most).sum()), int(x.size), level)
        low, high = (least + (most - least) * end for end in (share.low, share.high))
        return Estimate(value, min(low, value), max(high, value), int(x.size), error, share.method)
    low, high = max(least, value - half), min(most, value + half)
    return Estimate(value, low, high, int(x.size), error, f"Student t, {level:.0%}, within {least:g} to {most:g}")


def paired_difference(
    a: ArrayLike, b: ArrayLike, level: float = 0.95, *, bounds: tuple[float, float] | None = None
) -> Estimate:  # fmt: skip
    """Mean of `a - b` over the same units, with Student's t interval of the differences, where `mean` has one. `bounds` are of
    the values: their difference lies within the width of them."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape:
        raise ValueError(f"paired values must pair: {x.shape} and {y.shape}")
    if bounds is None:
        return mean(x - y, level)
    least, most = bounds
    width = most - least
    if x.size >= LEAST_VALUES and np.ptp(x - y) > 0 and all(np.all((z == least) | (z == most)) for z in (x, y)):
        e = paired_shares(x == most, y == most, level)
        return Estimate(e.value * width, e.low * width, e.high * width, e.n, e.standard_error * width, e.method)
    return mean(x - y, level, bounds=(-width, width))


def wilson(successes: int, n: int, level: float = 0.95) -> Estimate:
    """A proportion with Wilson's score interval (E. B. Wilson, 1927), sound for small n and for 0 or n successes."""
    _check_counts(successes, n)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Estimate(p, min(low, p), max(high, p), n, math.sqrt(p * (1 - p) / n), f"Wilson, {level:.0%}")


def paired_shares(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Estimate:
    """Difference of the shares of `a` and `b` over the same units, with an interval inside [-1, 1]: the tenth method of
    R. G. Newcombe, Statistics in Medicine 17, 1998, 2635-2650, made of Wilson's intervals and the correlation of the two.

    Example: 36 right in both, 12 in the first alone, 2 in the second alone, none in neither: 0.200 (0.057 to 0.340).
    """
    x, y = np.asarray(a, bool), np.asarray(b, bool)
    if x.shape != y.shape:
        raise ValueError(f"paired values must pair: {x.shape} and {y.shape}")
    n = x.size
    both, first, second = (int(found.sum()) for found in (x & y, x & ~y, y & ~x))
    neither = n - both - first - second
    p, q = wilson(both + first, n, level), wilson(both + second, n, level)
    together = float(both * neither - first * second)
    if together > 0:
        together = max(together - n / 2, 0.0)  # a correction for continuity
    spread = (both + first) * (second + neither) * (both + second) * (first + neither)
    phi = together / math.sqrt(spread) if spread else 0.0

    def side(of_p: float, of_q: float) -> float:
        return math.sqrt(max(0.0, of_p**2 - 2 * phi * of_p * of_q + of_q**2))

    value = p.value - q.value
    low, high = value - side(p.value - p.low, q.high - q.value), value + side(p.high - p.value, q.value - q.low)
    error = math.sqrt(max(0.0, (first + second) / n - value**2) / n)
    return Estimate(value, low, high, n, error, f"Newcombe, {level:.0%}")


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> Estimate:
    """A proportion with the exact (conservative) interval of Clopper and Pearson, 1934."""
    _check_counts(successes, n)
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else _invert(lambda p: beta_cdf(p, successes, n - successes + 1), tail)
    high = 1.0 if successes == n else _invert(lambda p: beta_cdf(p, successes + 1, n - successes), 1 - tail)
    p = successes / n
    return Estimate(p, low, high, n, math.sqrt(p * (1 - p) / n), f"Clopper-Pearson, {level:.0%}")


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value that two systems are equally often right, from the questions on which they differ.

    Example:
        >>> mcnemar(12, 3)
        0.03515625
    """
    n, k = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2.0 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0


def ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    seed: int = 0,
    level: float = 0.95,
    draws: int = 2000,
    transform: Callable[[Floats], Floats] | None = None,
) -> Estimate:
    """`transform(sum(numerators) / sum(denominators))` with a bootstrap over units (percentile interval).

    One unit per entry: a document's bits and its bytes give bits per byte; its nats and tokens with
    `transform=np.exp` give perplexity.
    """
    columns = np.stack([np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)], axis=1)
    shape: Callable[[Floats], Floats] = transform or (lambda x: x)
    return _bootstrap(columns, lambda s: shape(s[..., 0] / s[..., 1]), seed=seed, level=level, draws=draws)


def relative_saving(ours: ArrayLike, theirs: ArrayLike, *, seed: int = 0, level: float = 0.95, draws: int = 2000) -> Estimate:
    """`1 - sum(ours) / sum(theirs)` over the same documents, resampled together: 0.08 = 8% fewer bits."""
    columns = np.stack([np.asarray(ours, np.float64), np.asarray(theirs, np.float64)], axis=1)
    return _bootstrap(columns, lambda s: 1.0 - s[..., 0] / s[..., 1], seed=seed, level=level, draws=draws)


def _bootstrap(columns: Floats, statistic: Callable[[Floats], Floats], *, seed: int, level: float, draws: int) -> Estimate:
    n = len(columns)
    if n == 0:
        raise ValueError("bootstrap of no units")
    value = float(statistic(columns.sum(axis=0)))
    if n == 1:
        return Estimate(value, value, value, 1, math.nan, "one unit: no interval")
    rng = np.random.default_rng(seed)
    drawn = columns
    if n > MOST_UNITS:  # sums of random equal groups vary as their members do, and there are few of them to draw
        drawn = np.zeros((MOST_UNITS, columns.shape[1]))
        np.add.at(drawn, rng.permutation(n) % MOST_UNITS, columns)
    m = len(drawn)
    chunk = 256  # draws at a time: memory stays flat
    sums = [rng.multinomial(m, np.full(m, 1.0 / m), size=min(chunk, draws - start)) @ drawn for start in range(0, draws, chunk)]
    values = statistic(np.concatenate(sums))
    # the plain percentile interval is too narrow for few units: widened as T. Hesterberg, 2015, section 4.5 (expanded percentile)
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * student_quantile(0.5 + level / 2, n - 1))
    low, high = np.quantile(values, [tail, 1 - tail])
    method = f"bootstrap over {n} units, {draws} draws, {level:.0%}"
    return Estimate(value, float(low), float(high), n, float(values.std(ddof=1)), method)


def student_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t. Example: `student_quantile(0.975, 10)` is 2.2281."""
    if p < 0.5:
        return -student_quantile(1 - p, freedom)
    # P(T <= t) = 1 - I_x(v/2, 1/2) / 2 with x = v / (v + t^2)
    x = _invert(lambda u: beta_cdf(u, freedom / 2, 0.5), 2 * (1 - p))
    return math.sqrt(freedom * (1 - x) / x)


def beta_cdf(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b), by its continued fraction (Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast only on this side
        return 1.0 - beta_cdf(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny = 1e-300
    c, d = 1.0, 1.0 / _away(1 - (a + b) * x / (a + 1), tiny)
    fraction = d
    for m in range(1, 10_000):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / _away(1 + step * d, tiny)
            c = _away(1 + step / c, tiny)
            fraction *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return front * fraction / a


def _away(x: float, tiny: float) -> float:
    return x if abs(x) > tiny else tiny


def _invert(increasing: Callable[[float], float], target: float) -> float:
    """The x in [0, 1] where an increasing function reaches `target`, by bisection to full precision."""
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if increasing(middle) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _check_counts(successes: int, n: int) -> None:
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}")


def accuracy(correct: Sequence[bool], level: float = 0.95) -> Estimate:
    """Share of correct answers with Wilson's interval."""
    return wilson(sum(correct), len(correct), level)
