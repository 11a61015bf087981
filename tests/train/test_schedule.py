"""Learning rate over time."""

from __future__ import annotations

import itertools
import math

import pytest

from tutelage.config.train import Schedule
from tutelage.train.schedule import factor, warmup_steps

STEPS = 100


def curve(**settings) -> list[float]:
    schedule = Schedule(**{"warmup": 10, **settings})
    return [factor(schedule, step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_every_shape_warms_up_in_a_line_and_never_is_zero(name):
    """Guards against a first step at rate 0 (nothing is trained, and the watch would be right to stop) and off-by-one warm-up."""
    values = curve(name=name, final=0.0)
    assert values[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert values[10] == 1.0
    assert min(values) > 0.0 and max(values) == 1.0


def test_cosine_ends_near_its_final_share():
    """Guards against a decay that stops half-way or goes below the floor."""
    values = curve(name="cosine", final=0.1)
    assert values[55] == pytest.approx(0.1 + 0.9 / 2)
    assert values[-1] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 89 / 90)))
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))


def test_linear_falls_by_equal_steps():
    """Guards against a slope that depends on the warm-up."""
    values = curve(name="linear", final=0.0)
    falls = [a - b for a, b in itertools.pairwise(values[10:])]
    assert falls == pytest.approx([1 / 90] * 89)


def test_wsd_is_stable_then_falls():
    """Guards against a decay phase that starts at the wrong step: flat until the last fifth, then a line to the final share."""
    values = curve(name="wsd", decay=0.2, final=0.1)
    assert values[10:80] == [1.0] * 70
    assert values[80:] == pytest.approx([0.1 + 0.9 * (20 - i) / 20 for i in range(20)])


def test_warm_up_is_a_share_below_one_and_steps_above():
    """Guards against reading 0.02 as no step at all, or 10 as a thousand per cent."""
    assert warmup_steps(Schedule(warmup=0.05), 200) == 10
    assert warmup_steps(Schedule(warmup=10), 200) == 10
    assert factor(Schedule(warmup=50), 0, 1) == 1.0  # one step: at the full rate
