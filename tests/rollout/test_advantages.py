"""Advantages against tables worked by hand, and against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tutelage.rollout.advantages import gae, group_advantages, token_rewards, whiten

REWARDS = [1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 2.0, 4.0]
GROUPS = [7, 7, 7, 7, 3, 3, 9, 9]
HALF = 0.5 / (np.sqrt(1 / 3) + 1e-4)
ONE = 1 / (np.sqrt(2) + 1e-4)
BATCH = np.std(REWARDS, ddof=1) + 1e-4


@pytest.mark.parametrize(("baseline", "scale", "expected"), [
    ("mean", "group", [HALF, -HALF, -HALF, HALF, 0, 0, -ONE, ONE]),
    ("mean", "none", [0.5, -0.5, -0.5, 0.5, 0, 0, -1, 1]),
    ("mean", "batch", [0.5 / BATCH, -0.5 / BATCH, -0.5 / BATCH, 0.5 / BATCH, 0, 0, -1 / BATCH, 1 / BATCH]),
    ("leave_one_out", "none", [2 / 3, -2 / 3, -2 / 3, 2 / 3, 0, 0, -2, 2]),
    ("none", "none", REWARDS),
    ("none", "batch", [(r - 1.125) / BATCH for r in REWARDS]),
])  # fmt: skip
def test_group_advantages(baseline, scale, expected):
    """Guards each method's baseline and scale: a table worked by hand, with a group that has no signal. Shuffled answers get
    the same."""
    found = group_advantages(REWARDS, GROUPS, baseline, scale)
    np.testing.assert_allclose(found.values, expected, atol=1e-12)
    zero_variance = baseline != "none"
    assert found.signal.tolist() == [True] * 4 + [not zero_variance] * 2 + [True] * 2
    assert found.zero_variance == (2 if zero_variance else 0)
    order = [3, 6, 0, 5, 7, 1, 2, 4]
    again = group_advantages([REWARDS[i] for i in order], [GROUPS[i] for i in order], baseline, scale)
    np.testing.assert_allclose(again.values, np.array(expected)[order], atol=1e-12)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6])
def test_equal_rewards_are_no_signal(value):
    """Guards against rounding that a division by almost nothing blows up to an advantage."""
    found = group_advantages([value] * 7 + [0.0, 1.0], [0] * 7 + [1] * 2, "mean", "group")
    assert found.values[:7].tolist() == [0.0] * 7
    assert found.zero_variance == 7


def test_what_nobody_could_judge_counts_nowhere():
    """Guards against an answer without a reward that counts as 0 and moves its group's baseline."""
    for baseline in ("mean", "leave_one_out"):
        found = group_advantages([1.0, float("nan"), 3.0, 5.0, float("nan")], [0, 0, 0, 1, 1], baseline, "none")
        without = group_advantages([1.0, 3.0], [0, 0], baseline, "none").values
        np.testing.assert_allclose(found.values, [without[0], 0, without[1], 0, 0])
    assert not group_advantages([float("nan")] * 2, [0, 0], "mean", "group").values.any()


def test_whiten():
    """Guards against masked tokens that move the mean, or that get a share of it."""
    found = whiten([1.0, 2.0, 3.0, 99.0], [1, 1, 1, 0])
    np.testing.assert_allclose(found, [-1, 0, 1, 0], atol=1e-7)
    assert whiten([4.0]).tolist() == [0.0]


def test_gae_by_hand():
    """gamma 0.9, lambda 0.5: deltas 0.9*0.6-0.5 = 0.04, 0.9*0.2-0.6 = -0.42 and 1-0.2 = 0.8; from behind, each plus 0.45 times
    the next: guards the order and the discount."""
    advantages, returns = gae([0.0, 0.0, 1.0], [0.5, 0.6, 0.2], gamma=0.9, lam=0.5)
    np.testing.assert_allclose(advantages, [0.013, -0.06, 0.8], atol=1e-12)
    np.testing.assert_allclose(returns, [0.513, 0.54, 1.0], atol=1e-12)


@pytest.mark.parametrize(("gamma", "lam", "after"), [(1.0, 0.95, 0.0), (0.97, 1.0, 0.3), (0.9, 0.0, 0.0), (1.0, 1.0, 0.0)])
def test_gae_is_its_definition(gamma, lam, after):
    """Against the sum of (gamma * lam)^k * delta(t + k), written out; the recursion has one sign to lose."""
    rng = np.random.default_rng(0)
    r, v = rng.normal(size=9), rng.normal(size=9)
    deltas = r + gamma * np.append(v[1:], after) - v
    expected = [sum((gamma * lam) ** k * deltas[t + k] for k in range(9 - t)) for t in range(9)]
    advantages, returns = gae(r, v, gamma=gamma, lam=lam, after=after)
    np.testing.assert_allclose(advantages, expected, atol=1e-12)
    np.testing.assert_allclose(returns, advantages + v)


def test_without_values_advantages_are_rewards_to_come():
    """REINFORCE with penalties at every token is this case."""
    rewards = token_rewards(2.0, [-1.0, -2.0, -3.0], [-1.5, -1.0, -3.0], kl_weight=0.1)
    np.testing.assert_allclose(rewards, [-0.05, 0.1, 2.0], atol=1e-12)
    np.testing.assert_allclose(gae(rewards, np.zeros(3), lam=1.0)[0], [2.05, 2.1, 2.0], atol=1e-12)


def test_the_penalty_is_k1_of_every_token_and_the_reward_comes_last():
    """Guards the sign: what the policy makes likelier than the reference costs."""
    assert token_rewards(1.0, [-0.1, -0.2]).tolist() == [0.0, 1.0]
    assert token_rewards(0.0, [-0.1], [-2.1], kl_weight=0.5).tolist() == [-1.0]
    assert token_rewards(1.0, []).tolist() == []


def test_the_penalty_by_other_estimators():
    """Guards against an estimator that is asked for and not used: half the square, and q/p - 1 - log q/p."""
    assert token_rewards(0.0, [-0.1], [-2.1], kl_weight=0.5, estimator="k2").tolist() == pytest.approx([-1.0])
    expected = -0.5 * (math.exp(-2.0) - 1 + 2.0)
    np.testing.assert_allclose(token_rewards(0.0, [-0.1], [-2.1], kl_weight=0.5, estimator="k3"), [expected])
