"""How well a scoring model agrees with people, compared with scoring by length, which such models learn readily
(Singhal et al. 2023, arXiv:2310.03716). Numpy only; every share and mean has an interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tutelage.evaluate.intervals import mcnemar, mean, ratio, wilson

Floats = NDArray[np.float64]
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)  # of a distribution


def of_pairs(rewards: Floats, lengths: Floats) -> dict[str, Any]:
    """Agreement on pairs, the chosen answer first: rewards [n,2] and lengths [n,2] in tokens. A tie is half right.

    `longer_wins`: accuracy of choosing the longer answer. `beyond_length`: McNemar's p-value for the difference from the better
    of choosing the longer and choosing the shorter answer. `against_length`: accuracy where that rule is wrong.
    """
    right, longer = _wins(rewards), _wins(lengths)
    rule = longer if longer.mean() >= 0.5 else 1.0 - longer
    out = {
        "pairs": len(rewards),
        "accuracy": wilson(round(right.sum()), len(right)).to_json(),
        "longer_wins": wilson(round(longer.sum()), len(longer)).to_json(),
        "beyond_length": mcnemar(int((right > rule).sum()), int((right < rule).sum())),
        "margin": mean(rewards[:, 0] - rewards[:, 1]).to_json(),
        "rewards": distribution(rewards),
        "correlation_with_length": correlation(rewards.ravel(), lengths.ravel()),
    }
    if (rule == 0).any():
        out["against_length"] = wilson(round(right[rule == 0].sum()), int((rule == 0).sum())).to_json()
    return out


def of_ratings(scores: Floats, ratings: Floats, lengths: Floats, aspects: Sequence[str], means: Floats) -> dict[str, Any]:
    """Agreement with ratings, by aspect: scores and ratings [n,K], NaN where there is none, lengths [n]. `explained`: 1 - squared
    error / squared error of always predicting the mean of the training ratings (`means` [K])."""
    out: dict[str, Any] = {}
    for k, name in enumerate(aspects):
        given = np.isfinite(ratings[:, k])
        if not given.any():
            continue
        got, wanted = scores[given, k], ratings[given, k]
        errors, baseline = (got - wanted) ** 2, (means[k] - wanted) ** 2
        out[name] = {
            "ratings": int(given.sum()),
            "error": mean(np.abs(got - wanted)).to_json(),
            "correlation": correlation(got, wanted),
            "correlation_with_length": correlation(got, lengths[given]),
            "ratings_with_length": correlation(wanted, lengths[given]),
            "rewards": distribution(got),
        }
        if baseline.sum() > 0:
            out[name]["explained"] = ratio(errors, baseline, transform=lambda x: 1.0 - x).to_json()
    return out


def of_steps(odds: Floats, wanted: Floats, right_in_training: float) -> dict[str, Any]:
    """Agreement on labelled steps: log-odds of right [m] and the share of people who say right [m]. `usual`: accuracy of always
    predicting the more common label of the training data; `separation`: how often a right step has higher odds than a wrong one
    (area under the ROC curve)."""
    truth = wanted > 0.5
    said = odds > 0
    usual = truth == (right_in_training > 0.5)
    out = {
        "steps": len(odds),
        "accuracy": wilson(int((said == truth).sum()), len(odds)).to_json(),
        "usual": wilson(int(usual.sum()), len(odds)).to_json(),
        "log_odds": distribution(odds),
    }
    if truth.any() and not truth.all():
        out["separation"] = separation(odds[truth], odds[~truth])
    return out


def separation(high: Floats, low: Floats) -> float:
    """How often a value of `high` is above one of `low`; ties count half (Mann and Whitney, 1947)."""
    values, index = np.unique(np.concatenate([high, low]), return_inverse=True)
    of_low = np.bincount(index[len(high) :], minlength=len(values))
    below = np.cumsum(of_low) - of_low
    return float((below[index[: len(high)]] + of_low[index[: len(high)]] / 2).mean() / len(low))


def correlation(a: Floats, b: Floats) -> float | None:
    """Pearson's; None where one of the two is constant."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def distribution(values: Floats) -> dict[str, float]:
    """Mean, standard deviation and quantiles."""
    rows = {f"p{100 * q:g}": float(x) for q, x in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}
    return {"mean": float(values.mean()), "deviation": float(values.std()), **rows}


def _wins(values: Floats) -> Floats:
    """1 where the first of a row is larger, 0.5 where both are the same."""
    return (values[:, 0] > values[:, 1]) + 0.5 * (values[:, 0] == values[:, 1])
