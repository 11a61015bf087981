"""Golden losses at full precision: a refactor that changes a result is seen. Plain torch, float64, one fixed tiny model.

The numbers in tests/golden are compared with an independent calculation here (initial loss) and pin the rest. To make them anew
after a change that is meant: `python -m tests.train.test_golden`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from tests.guarantees import tiny
from tutelage.config.train import Optimizer, Schedule
from tutelage.data.tokens.loader import GlobalBatch
from tutelage.models import kernels
from tutelage.models.interface import Batch
from tutelage.objectives import objective
from tutelage.train.optim import Optimizers
from tutelage.train.schedule import factor
from tutelage.train.step import StepConfig, train_step

GOLDEN = Path(__file__).parent.parent / "golden" / "next_token.json"
STEPS = 5


def batches() -> list[GlobalBatch]:
    """Ids and weights from arithmetic, so that no generator or tokenizer stands behind them."""
    out = []
    for step in range(STEPS):
        texts = [[(r * 37 + i * i * 7 + 3) % 97 for i in range(9 + 5 * r)] for r in range(4)]
        supervised = [[float((i + r + step) % 3 != 0) for i in range(len(t))] for r, t in enumerate(texts)]
        micro = [Batch.of(texts[i : i + 2], supervised=supervised[i : i + 2]) for i in (0, 2)]
        out.append(GlobalBatch(micro, {"tokens": float(sum(m.weights.sum() for m in micro))}, []))
    return out


def model():
    return tiny.model(seed=3, dtype=torch.float64, vocab_size=97, max_position_embeddings=64)


def losses(name: str) -> list[dict[str, float]]:
    """Loss and gradient norm of each step."""
    parts = {"policy": model()}
    optimizers = Optimizers(parts, Optimizer(name=name), tiny.RATES)
    out = []
    with kernels.disabled():
        for step, batch in enumerate(batches()):
            optimizers.set_factor(factor(Schedule(warmup=2), step, STEPS))
            result = train_step(StepConfig(parts, objective("next_token")), batch, optimizers)
            out.append({"loss": result.loss, "grad_norm": result.grad_norm})
    return out


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_five_steps_are_the_golden_ones(name):
    """Guards against any silent change of model, objective, division, clipping, schedule or optimizer."""
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    found = losses(name)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=1e-6, abs=1e-6), key
    assert found[-1]["loss"] < found[0]["loss"]


def test_the_first_golden_loss_is_plain_cross_entropy():
    """Guards against golden numbers that were wrong when they were written."""
    total = count = 0.0
    with kernels.disabled(), torch.no_grad():
        for micro in batches()[0].micro:
            z = model().logits(micro).flatten(0, 1)
            each = functional.cross_entropy(z, micro.targets.flatten(), reduction="none")
            total += float((each * micro.weights.flatten()).sum())
            count += float(micro.weights.sum())
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert expected["adamw"][0]["loss"] == expected["muon"][0]["loss"] == pytest.approx(total / count, rel=1e-6)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: losses(name) for name in ("adamw", "muon")}, indent=1) + "\n", encoding="utf-8")


def test_bfloat16_trains_as_float32_does_to_its_rounding() -> None:
    """Products in bfloat16, weights and sums in float32: a head that mixes the two types fails in its first step."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        parts = {"policy": model().float()}
        recipe = StepConfig(parts, objective("next_token"), dtype=dtype)
        optimizers = Optimizers(parts, Optimizer(name="adamw"), tiny.RATES)
        optimizers.set_factor(1.0)
        found[dtype] = [train_step(recipe, batch, optimizers).loss for batch in batches()]
        assert all(p.dtype == torch.float32 for p in parts["policy"].parameters())
    assert found[torch.bfloat16] == pytest.approx(found[torch.float32], rel=0.02)
    assert found[torch.bfloat16] != found[torch.float32]
