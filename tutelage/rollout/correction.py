"""How far the log-probabilities of trainer and engine are apart, and the importance of each token that makes up for it.

Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training") and
masked importance sampling (Liu et al. 2025, "When speed kills stability").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from tutelage.rollout.metric_sums import MetricSums

Mode = Literal["truncate", "mask"]
Level = Literal["token", "sequence"]


def correction(
    trainer: npt.ArrayLike, engine: npt.ArrayLike, *, mode: Mode = "truncate", level: Level = "token", cap: float = 2.0,
    floor: float = 0.0,
) -> npt.NDArray[np.float64]:  # fmt: skip
    """[n]: p(trainer) / p(engine) of each token of an answer, or of all of them together. What is not between `floor` and `cap`
    is moved there ("truncate"), or becomes 0 ("mask")."""
    difference = np.asarray(trainer, np.float64) - np.asarray(engine, np.float64)
    if level == "sequence":
        difference = np.full_like(difference, difference.sum())
    ratio = np.exp(np.minimum(difference, 700.0))
    if mode == "truncate":
        return np.clip(ratio, floor, cap)
    return np.where((ratio < floor) | (ratio > cap), 0.0, ratio)


def mismatch(trainer: Sequence[npt.ArrayLike], engine: Sequence[npt.ArrayLike]) -> MetricSums:
    """Log-probabilities of the same tokens by trainer and engine, compared: the mean and largest absolute difference, and the
    mean of (r - 1) - log r, r = p(trainer) / p(engine): k3, the engine's divergence from the trainer."""
    pairs = [np.asarray(t, np.float64) - np.asarray(e, np.float64) for t, e in zip(trainer, engine, strict=True)]
    d = np.concatenate(pairs) if pairs else np.empty(0)
    means = {"mismatch_mean": np.abs(d), "mismatch_kl": np.expm1(np.minimum(d, 700.0)) - d}
    return MetricSums(
        {name: (float(values.sum()), float(len(d))) for name, values in means.items()},
        {"mismatch_max": float(np.abs(d).max(initial=0.0))},
    )
