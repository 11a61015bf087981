"""Every preference method learns a rule that it is shown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.objectives import small
from tutelage.config.train import Optimizer
from tutelage.data.groups.groups import Completion, PromptGroup
from tutelage.objectives import objective
from tutelage.train.optim import LearningRates, Optimizers
from tutelage.train.step import StepConfig, measure, train_step

STEPS = 30
RULE = 16  # good answers are made of tokens below it, bad ones of the others
# SPPO's and NCA's own beta asks for log-ratios of hundreds, which so few steps can't reach; DiscoPOP's own tau holds margins that
# begin at 0 a little below it
SETTINGS = {"sppo_hard": {"beta": 0.1}, "nca_pair": {"beta": 0.1}, "discopop": {"tau": 1.0}}


def written(policy: torch.nn.Module, method: str) -> list[PromptGroup]:
    """Prompt groups by the rule, with the untrained policy as reference."""
    rng = np.random.default_rng(5)

    def answer(good: bool) -> np.ndarray:
        low, high = (0, RULE) if good else (RULE, small.VOCABULARY)
        return rng.integers(low, high, rng.integers(3, 7))

    made, last = [], answer(True)
    for i in range(16):
        good = i % 2 == 0
        pair = (answer(True), answer(False)) if method != "kto" else (answer(good), last)
        last = pair[0]
        whole = {"desirable": float(good)} if method == "kto" else {}
        prompt = rng.integers(0, small.VOCABULARY, 4)
        group = PromptGroup(f"f{i}", prompt, tuple(Completion(ids, per_completion=whole) for ids in pair))
        references = [float(small.logprobs(policy, group, k).sum()) for k in (0, 1)]
        completions = [
            replace(e, per_completion={**e.per_completion, "reference": r})
            for e, r in zip(group.completions, references, strict=True)
        ]
        made.append(replace(group, completions=tuple(completions)))
    return made


@pytest.mark.parametrize("method", small.METHODS)
def test_thirty_steps_teach_the_rule(method):
    """Guards against a loss that falls while it teaches nothing, or the contrary: the margin between good and bad answers of the
    data rises, and nearly every one is in the right order, or on the right side of the reference point."""
    policy = small.decoder(dtype=torch.float32)
    made = written(policy, method)
    parts = {"policy": policy}
    recipe = StepConfig(parts, objective(method, **SETTINGS.get(method, {})))
    optimizers = Optimizers(parts, Optimizer(name="adamw"), LearningRates(lr=5e-3, matrix_lr=5e-3, embedding_lr=5e-3))
    optimizers.set_factor(1.0)
    source = small.source(method, made, per_step=8)
    batches, counts = small.source(method, made).validation()

    def margin(terms: dict[str, float]) -> float:
        return terms["_desirable"] - terms["_undesirable"] if method == "kto" else terms["_margin"]

    before = measure(recipe, batches, counts)
    for step in range(STEPS):
        train_step(recipe, source.next(step), optimizers)
    after = measure(recipe, batches, counts)
    assert recipe.total(after) < recipe.total(before)
    assert before["_accuracy"] < 0.8
    assert after["_accuracy"] > 0.9
    assert margin(after) > margin(before) + 0.1
