"""Time and memory of what is not training: ranges with formulas, checked against a quickstart that was measured."""

from __future__ import annotations

import pytest

from tutelage.plan import stages as parts
from tutelage.plan.shape import derive
from tutelage.plan.time import Span
from tutelage.recipe import Estimate

SHAPE = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
         "intermediate_size": 768, "max_position_embeddings": 256}  # fmt: skip
MODEL = derive("4.2m", 4096, architecture=SHAPE).architecture
PEAK = 191e9  # FLOP/s of the machine that the figures below are from


def exactly(value: float) -> Span:
    return Span(value, value)


@pytest.mark.parametrize(
    ("estimate", "seconds"),
    [
        (parts.collect(exactly(2_548_328), "documents", 0), 0.6),
        (parts.learn(exactly(2_338_698)), 0.92),
        (parts.encode(exactly(2_566_832), 1), 1.18),
        (parts.encode(exactly(4_281_621), 1), 1.24),
        (parts.read(MODEL, exactly(45_307), 0.5, PEAK, "cpu"), 7.8),
        (parts.baselines(exactly(2_169_520), exactly(169_178)), 13.2),
        (parts.answer(MODEL, exactly(500), 64, PEAK, "cpu"), 2.52),
        (parts.REPORT, 1.26),
    ],
)
def test_measured_parts_lie_inside(estimate: Estimate, seconds: float) -> None:
    """Guards the rates: a constant in another unit, or upside down."""
    assert estimate.seconds.low < seconds < estimate.seconds.high < 60 * estimate.seconds.low
    assert 0 <= estimate.memory_bytes.low <= estimate.memory_bytes.high


def test_estimates_grow_with_what_they_depend_on() -> None:
    """Guards against a figure that ignores its input, and against baselines that read more than they do."""
    small, large = (parts.collect(exactly(n), "documents", n) for n in (1e6, 2e6))
    assert large.seconds.low == 2 * small.seconds.low and large.memory_bytes.high == 2 * small.memory_bytes.high
    assert parts.encode(exactly(1e9), 4).seconds.low == parts.encode(exactly(1e9), 1).seconds.low / 4
    assert parts.baselines(exactly(1e9), exactly(1)) == parts.baselines(exactly(32e6), exactly(1))
    once, twice = (parts.read(MODEL, exactly(1e6), stride, PEAK, "cpu").seconds for stride in (0.0, 0.5))
    assert once.low == twice.low and twice.high == pytest.approx(2 * once.high)
    assert "GFLOP/s measured" in parts.read(MODEL, exactly(1e6), 0.5, PEAK, "cpu").because


@pytest.mark.parametrize(
    ("vocabulary", "own", "other"), [(300, 1.38, 1.27), (1024, 2.69, 2.16), (4096, 3.72, 2.76), (10905, 4.13, 3.06)]
)
def test_bytes_per_token(vocabulary: int, own: float, other: float) -> None:
    """Guards a curve against the tokenizers that it was drawn through: the text that they learnt, and web pages."""
    found = parts.bytes_per_token(vocabulary)
    assert found.low < other < own < found.high < 2 * found.low


def test_spans() -> None:
    """Guards against a range turned round by a division, and against `0.025 to 1k`."""
    assert Span(2, 6) / Span(1, 2) == Span(1, 6) and Span(1, 2) * 3 + Span(0, 1) == Span(3, 7)
    assert Span(2.1e6, 2.6e6).said("B") == "2.1 to 2.6 MB" and Span(25, 1000).said("passes") == "25 to 1000 passes"
    assert Span(45_300, 83_000).said("tokens") == "45 to 83k tokens" and Span(500, 500).said("questions") == "500 questions"
