"""Normalisers, cut answers, and the importance of tokens that another arithmetic made."""

from __future__ import annotations

import numpy as np
import pytest

from tutelage.objectives import TABLE
from tutelage.rollout.correction import correction, mismatch
from tutelage.rollout.metric_sums import MetricSums
from tutelage.rollout.weights import ADVANTAGE_SPECS, UNITS, cut, weights


@pytest.mark.parametrize(("normaliser", "expected"), [
    ("length", [1 / 2, 1 / 5, 1]), ("longest", [1 / 8] * 3), ("sum", [1, 1, 1]), ("token", [1, 1, 1]),
])  # fmt: skip
def test_weights(normaliser, expected):
    """What tells GRPO, Dr. GRPO and DAPO apart. An answer without tokens (masked) divides by nothing."""
    np.testing.assert_allclose(weights(normaliser, [2, 5, 0], 8), expected)


def test_every_method_has_the_unit_of_its_normaliser():
    """Guards against weights of 1/length that are divided by a count of tokens once more."""
    with_streams = {name for name, row in TABLE.items() if row.data == "rollouts"} - {"ppo"}
    assert with_streams == set(ADVANTAGE_SPECS)
    for name, spec in ADVANTAGE_SPECS.items():
        assert TABLE[name].fixed["unit"] == UNITS[spec.normaliser], name


def test_cut_answers():
    """Each policy does what it says, and the number of cut answers is known under all of them."""
    rewards, reasons = [1.0, 0.5, 0.0], ["stop", "length", "length"]
    for policy, after, kept in (
        ("keep", rewards, [True] * 3), ("mask", rewards, [True, False, False]), ("penalise", [1.0, 0.0, -0.5], [True] * 3),
    ):  # fmt: skip
        found = cut(policy, rewards, reasons, penalty=0.5)
        assert found.rewards.tolist() == after
        assert found.kept.tolist() == kept
        assert found.count == 2


@pytest.mark.parametrize(("mode", "level", "expected"), [
    ("truncate", "token", [1.0, 2.0, 0.5]), ("mask", "token", [1.0, 0.0, 0.5]),
    ("truncate", "sequence", [1.5, 1.5, 1.5]), ("mask", "sequence", [1.5, 1.5, 1.5]),
])  # fmt: skip
def test_correction(mode, level, expected):
    """Ratios 1, 3 and 0.5 of a trainer that finds tokens likelier or less likely than the engine did; together 1.5."""
    trainer = np.log([0.2, 0.6, 0.1])
    np.testing.assert_allclose(correction(trainer, np.log([0.2, 0.2, 0.2]), mode=mode, level=level, cap=2.0), expected)


def test_bounds_of_a_correction():
    """Guards the lower bound, and a ratio too large for a float."""
    assert correction([-3.0], [0.0], floor=0.1).tolist() == [0.1]
    assert correction([-3.0], [0.0], floor=0.1, mode="mask").tolist() == [0.0]
    assert correction([0.0], [-2000.0]).tolist() == [2.0]
    assert correction([0.0], [-2000.0], mode="mask").tolist() == [0.0]
    assert correction([-1.0, -1.0], [-2.0, -2.0], level="sequence", cap=5.0).tolist() == [5.0, 5.0]


def test_mismatch_adds_up():
    """Promise 16 is a number in the log: guards against a maximum that is averaged, and a mean of means."""
    one, two = mismatch([[-1.0, -2.0]], [[-1.5, -2.0]]), mismatch([[-1.0], []], [[-0.9], []])
    both = one + two
    assert both.metrics()["mismatch_mean"] == pytest.approx(0.2)
    assert both.metrics()["mismatch_max"] == pytest.approx(0.5)
    assert both.metrics()["mismatch_kl"] == pytest.approx((np.expm1(0.5) - 0.5 + np.expm1(-0.1) + 0.1) / 3)
    whole = mismatch([[-1.0, -2.0], [-1.0]], [[-1.5, -2.0], [-0.9]])
    assert both.metrics() == pytest.approx(whole.metrics()) and (MetricSums() + both).metrics() == both.metrics()
    assert mismatch([], []).metrics() == {"mismatch_mean": 0.0, "mismatch_max": 0.0, "mismatch_kl": 0.0}
