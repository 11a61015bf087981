"""Golden losses of the preference methods: three steps on one tiny model, plain torch, weights in float64.

The first of each is compared with an independent calculation here; the rest pin gradients and updates. To make them anew after a
change that is meant: `python -m tests.objectives.test_golden`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.objectives import formulas, small
from tutelage.config.train import Optimizer
from tutelage.models import kernels
from tutelage.objectives import objective
from tutelage.train.optim import LearningRates, Optimizers
from tutelage.train.step import StepConfig, train_step

GOLDEN = Path(__file__).parent.parent / "golden" / "preferences.json"
STEPS = 3


def steps(method: str) -> list[dict[str, float]]:
    """Loss and gradient norm of each step, four of eight prompt groups at a time, in two micro-batches or more."""
    parts = {"policy": small.decoder()}
    recipe = StepConfig(parts, objective(method, **small.METHODS[method]))
    optimizers = Optimizers(parts, Optimizer(name="adamw"), LearningRates(lr=1e-2, matrix_lr=1e-2, embedding_lr=1e-2))
    optimizers.set_factor(1.0)
    source = small.source(method, per_step=4, micro_tokens=30)
    out = []
    with kernels.disabled():
        for step in range(STEPS):
            result = train_step(recipe, source.next(step), optimizers)
            out.append({"loss": result.loss, "grad_norm": result.grad_norm})
    return out


@pytest.mark.parametrize("method", small.METHODS)
def test_three_steps_are_the_golden_ones(method):
    """Guards against any silent change of an objective, its division or its gradient."""
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[method]
    got = steps(method)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in got] == pytest.approx([row[key] for row in expected], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("method", small.METHODS)
def test_the_first_golden_loss_is_the_formula(method):
    """Guards against golden numbers that were wrong when they were written."""
    policy, source = small.decoder(), small.source(method, per_step=4)
    made = [source.prompt_groups[i] for i in source.numbers(0)]
    with kernels.disabled():
        logs = {(f.name, k): small.logprobs(policy, f, k) for f in made for k in (-1, 0, 1)}
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[method][0]["loss"]
    got = formulas.loss(method, made, lambda f, k: logs[f.name, k], **small.METHODS[method])
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: steps(name) for name in small.METHODS}, indent=1) + "\n", encoding="utf-8")
