"""Advantages: how much better an answer, or a token, was than could be expected. Numpy alone.

Shapes: S answers of a global batch, G groups of answers to one prompt, n tokens of one answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Baseline = Literal["mean", "leave_one_out", "none"]
Scale = Literal["group", "batch", "none"]
EPSILON = 1e-4  # added to a standard deviation that divides


@dataclass(slots=True, frozen=True)
class GroupAdvantages:
    values: Floats  # [S]
    signal: npt.NDArray[np.bool_]  # [S]: False where no answer of the group has an advantage, as all have one reward

    @property
    def zero_variance(self) -> int:
        """The number of answers without an advantage, as all answers of their group have one reward."""
        return int((~self.signal).sum())


def group_advantages(rewards: npt.ArrayLike, groups: npt.ArrayLike, baseline: Baseline, scale: Scale) -> GroupAdvantages:
    """Advantages of whole answers [S] from their rewards and the number of each one's group, in any order.

    `baseline`: "mean" of the group (GRPO), mean of the others in it ("leave_one_out", RLOO), or "none".
    `scale`: divided by the standard deviation of the "group" (GRPO) or of the "batch", or not at all (Dr. GRPO). With "batch"
    and no baseline, the mean of the batch is taken off first, so that they are whitened (REINFORCE++, arXiv:2501.03262).
    An answer whose reward is NaN, because nothing could score it, counts nowhere and gets 0; so does one that is alone in its
    group where there is a baseline.
    """
    r, numbers = np.asarray(rewards, np.float64), np.unique(np.asarray(groups), return_inverse=True)[1]
    scored = ~np.isnan(r)
    r = np.where(scored, r, 0.0)
    size = int(numbers.max()) + 1

    def total(values: Any) -> Floats:
        sums: Floats = np.bincount(numbers, np.where(scored, values, 0.0), size).astype(np.float64)
        return sums[numbers]

    count = total(1.0)
    mean = total(r) / np.maximum(count, 1)
    deviation = np.sqrt(total((r - mean) ** 2) / np.maximum(count - 1, 1))
    differ = deviation > 1e-8 * np.maximum(1, np.abs(mean))
    values = r
    if baseline != "none":
        others = count / np.maximum(count - 1, 1) if baseline == "leave_one_out" else 1.0
        values = np.where(differ, (r - mean) * others, 0.0)
    elif scale == "batch":
        values = r - _mean(r[scored])
    if scale == "group":
        values = values / (deviation + EPSILON)
    elif scale == "batch":
        values = values / (_deviation((r if baseline == "mean" else values)[scored]) + EPSILON)
    values = np.where(scored, values, 0.0)
    return GroupAdvantages(values, total(values != 0) > 0)


def whiten(values: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> Floats:
    """Mean 0 and standard deviation 1 over all, or over those of weight 1; the others become 0."""
    x = np.asarray(values, np.float64)
    used = np.ones(x.shape, bool) if weights is None else np.asarray(weights) != 0
    return np.where(used, (x - _mean(x[used])) / (_deviation(x[used]) + 1e-8), 0.0)


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else 0.0


def _deviation(values: Floats) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


Estimator = Literal["k1", "k2", "k3"]


def divergence(logprobs: npt.ArrayLike, reference: npt.ArrayLike, kind: Estimator = "k1") -> Floats:
    """[n]: what each token says of the divergence of p from q (Schulman 2020, http://joschu.net/blog/kl-approx.html). k1 is
    log p - log q, k2 half of its square, k3 q/p - 1 - log q/p."""
    beyond = np.asarray(logprobs, np.float64) - np.asarray(reference, np.float64)
    if kind == "k1":
        return beyond
    return beyond**2 / 2 if kind == "k2" else np.expm1(-beyond) + beyond


def token_rewards(
    reward: float, logprobs: npt.ArrayLike, reference: npt.ArrayLike | None = None, kl_weight: float = 0.0,
    estimator: Estimator = "k1",
) -> Floats:  # fmt: skip
    """[n]: the answer's reward at its last token, less kl_weight times the divergence at every token, what keeps the policy p
    near the reference q."""
    p = np.asarray(logprobs, np.float64)
    out = np.zeros_like(p) if reference is None else -kl_weight * divergence(p, reference, estimator)
    if len(out):
        out[-1] += reward
    return out


def gae(
    rewards: npt.ArrayLike, values: npt.ArrayLike, *, gamma: float = 1.0, lam: float = 0.95, after: float = 0.0
) -> tuple[Floats, Floats]:
    """Advantages and returns [n] of an answer's tokens: generalised advantage estimation (Schulman et al. 2016,
    arXiv:1506.02438).

    `values` [n] are of the states before each token, `after` of the state behind the last one: 0 where the answer had ended.
    With values of 0 and lam = 1, advantages are the discounted rewards to come.
    """
    r, v = np.asarray(rewards, np.float64), np.asarray(values, np.float64)
    advantages, last, following = np.zeros_like(r), 0.0, after
    for t in range(len(r) - 1, -1, -1):
        last = r[t] + gamma * following - v[t] + gamma * lam * last
        advantages[t], following = last, v[t]
    return advantages, advantages + v
