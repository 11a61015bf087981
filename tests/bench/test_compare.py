"""What the benchmark makes of its records."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
compare: Any = pytest.importorskip("compare")
sys.path.pop(0)


def record(peer: str, number: int, speed: float, **more: Any) -> dict[str, Any]:
    base = {
        "job": "pretrain",
        "peer": peer,
        "round": number,
        "tokens_per_s_median": speed,
        "disturbed": False,
        "peak_rss_mb": 1000.0,
    }
    return {**base, **more}


def test_ratio_is_of_rounds() -> None:
    """Guards against a ratio of medians: on a machine whose speed drifts, only runs of one round may be compared."""
    speeds = [(100, 50), (300, 200), (900, 300), (90, 45), (60, 30)]
    rows = [r for n, (a, b) in enumerate(speeds) for r in (record("tutelage", n, a), record("peer", n, b))]
    (found,) = compare.ratios(rows, "pretrain", "tokens_per_s_median")
    assert found.median == 2.0 and found.rounds == 5 and found.low <= 2.0 <= found.high and found.high <= 3.0


def test_disturbed_rounds_are_left_out_only_where_enough_remain() -> None:
    """Guards the rule for noise: five clean rounds are used alone, else all count."""
    rows = [r for n in range(6) for r in (record("tutelage", n, 100, disturbed=n == 0), record("peer", n, 50 if n else 1))]
    assert [r.rounds for r in compare.ratios(rows, "pretrain", "tokens_per_s_median")] == [5]
    assert [r.rounds for r in compare.ratios(rows[:6], "pretrain", "tokens_per_s_median")] == [3]


def test_memory_less_base_and_share() -> None:
    """Guards the memory ratio (libraries are not the model) and the share of the rate of the same round."""
    rows: list[dict[str, Any]] = []
    for n in range(5):
        rows.append({"job": "rate", "round": n, "flops_per_s": 1000.0})
        rows.append(record("tutelage", n, 10, base_rss_mb=400.0, flops_per_token=60.0))
        rows.append(record("peer", n, 5, base_rss_mb=200.0, flops_per_token=60.0))
    (memory,) = compare.ratios(rows, "pretrain", "less_base_mb")
    assert memory.median == pytest.approx(600 / 800)
    first = compare.summary(rows, "pretrain")[0]
    assert first["contender"] == "tutelage" and first["mfu"] == pytest.approx(0.6) and first["less_base_mb"] == 600
