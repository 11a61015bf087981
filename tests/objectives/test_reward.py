"""Reward models: the losses of the papers, of TRL and of a table by hand, whatever the layout and the accumulation.

Golden losses are in tests/golden/reward.json; to make them anew after a change that is meant:
`python -m tests.objectives.test_reward`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.data.test_family_batches import SHAPE
from tutelage.config.train import Optimizer
from tutelage.data.groups.groups import Completion, PromptGroup, collate
from tutelage.data.groups.source import count, group_batch
from tutelage.models import kernels
from tutelage.models.config import DecoderConfig
from tutelage.models.init import build
from tutelage.models.interface import Batch
from tutelage.models.scorer import Scorer, build_scorer
from tutelage.objectives import objective
from tutelage.train.optim import LearningRates, Optimizers
from tutelage.train.step import StepConfig, gradients, train_step

GOLDEN = Path(__file__).parent.parent / "golden" / "reward.json"
METHODS: dict[str, dict[str, Any]] = {
    "reward": {"centring": 0.1}, "rating": {"loss": "huber", "delta": 0.5}, "process": {},
}  # fmt: skip
OUTPUTS = {"reward": 1, "rating": 3, "process": 2}


def scorer(outputs: int, dtype: torch.dtype = torch.float32) -> Scorer:
    made = build_scorer(build(DecoderConfig.from_hf({**SHAPE, "initializer_range": 0.3}), 0), outputs, seed=1)
    with torch.no_grad():
        made.score.weight.mul_(10)
    return made.to(dtype)


def prompt_groups(count: int = 5, masked: bool = False) -> list[PromptGroup]:
    """Two answers a prompt, with everything that any of the methods reads; steps end at irregular places."""
    rng = np.random.default_rng(4)

    def completion(margin: float) -> Completion:
        ids = rng.integers(0, 100, rng.integers(3, 12))
        mask = rng.integers(0, 2, len(ids)).astype(np.uint8) if masked else None
        steps = np.where(rng.random(len(ids)) < 0.5, rng.choice([0.0, 1.0, 0.3], len(ids)), np.nan).astype(np.float32)
        steps[rng.integers(0, len(ids))] = 1.0
        if mask is not None:
            mask[np.isfinite(steps)] = 1
        ratings = np.where(rng.random(3) < 0.4, np.nan, rng.normal(size=3) * 2).astype(np.float32)
        ratings[rng.integers(0, 3)] = 0.5
        return Completion(ids, mask, {"step_score": steps}, {"margin": margin, "ratings": ratings.tolist()})

    made = []
    for i in range(count):
        margin = float(rng.random())
        made.append(PromptGroup(f"r{i}", rng.integers(0, 100, rng.integers(1, 20)), (completion(margin), completion(margin))))
    return made


def counts(made: list[PromptGroup]) -> dict[str, float]:
    return count(made, "tree") | {"pairs": float(len(made))}


class Table(nn.Module):
    """Gives each token the scores of its row."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows, dtype=torch.float64))

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.rows[batch.ids.flatten()]


def pair(chosen: Completion, rejected: Completion) -> Batch:
    return collate([PromptGroup("r", np.array([0]), (chosen, rejected))], "tree")


def values(name: str, rows: list[list[float]], batch: Batch, **settings: Any) -> dict[str, float]:
    return {k: t.sum.item() for k, t in objective(name, **settings)({"reward": Table(rows)}, batch).items()}


def test_preferences_by_hand() -> None:
    """Rewards 2 and 1: -log sigmoid(1) = 0.31326; with a margin of 1, log 2; centring 0.01 * 3^2.
    Tokens before an answer's last one say nothing."""
    rows = [[9.0], [2.0], [1.0], [-5.0]]
    batch = pair(Completion(np.array([3, 1])), Completion(np.array([2])))
    found = values("reward", rows, batch, centring=0.01)
    assert found["loss"] == pytest.approx(0.3132616875182228, abs=1e-12) and found["centring"] == pytest.approx(0.09)
    assert (found["_accuracy"], found["_margin"], found["_reward"]) == (1.0, 1.0, 3.0)
    far = pair(
        Completion(np.array([1]), per_completion={"margin": 1.0}), Completion(np.array([2]), per_completion={"margin": 1.0})
    )
    assert values("reward", rows, far)["loss"] == pytest.approx(math.log(2))
    assert "centring" not in values("reward", rows, far, centring=0.0)


def test_ratings_by_hand() -> None:
    """Errors 1 and -3 and two that are missing: squares 1 + 9; Huber with delta 2: 1/2 + 2 * (3 - 1). NaN must stay out of sums
    and gradients alike."""
    rows = [[0.0, 0.0], [3.0, 1.0], [1.0, 7.0]]
    missing = math.nan
    batch = pair(
        Completion(np.array([1]), per_completion={"ratings": [2.0, missing]}),
        Completion(np.array([2]), per_completion={"ratings": [4.0, missing]}),
    )
    assert values("rating", rows, batch)["loss"] == 10.0
    assert values("rating", rows, batch)["_error"] == 4.0
    assert values("rating", rows, batch, loss="huber", delta=2.0)["loss"] == 4.5
    table = Table(rows)
    objective("rating")({"reward": table}, batch)["loss"].sum.backward()
    assert table.rows.grad is not None and table.rows.grad.tolist() == [[0.0, 0.0], [2.0, 0.0], [-6.0, 0.0]]


@pytest.mark.parametrize("layout", ["tree", "packed", "rows"])
def test_steps_by_hand(layout: Any) -> None:
    """Two solutions of a problem; steps end at tokens 1, 2 | 3, 1. The score of a step is that of its own last token, which in a
    shared layout is not the place after the prompt's: log-odds 0, 2, -1, 0 for right, wrong, right, wrong."""
    rows = [[50.0], [0.0], [2.0], [-1.0]]
    nothing = math.nan
    made = PromptGroup("r", np.array([0, 0]), (
        Completion(np.array([1, 0, 2]), tokens={"step_score": np.array([1, nothing, 0], np.float32)}),
        Completion(np.array([3, 0, 1]), tokens={"step_score": np.array([1, nothing, 0], np.float32)}),
    ))  # fmt: skip
    found = values("process", rows, collate([made], layout))
    soft = lambda x: math.log1p(math.exp(x))  # noqa: E731
    assert found["loss"] == pytest.approx(soft(0) + soft(2) + soft(1) + soft(0), abs=1e-9)
    assert found["_accuracy"] == 1.0
    assert counts([made])["steps"] == 4.0


def test_two_outputs_are_cross_entropy() -> None:
    """A judge of steps with two classes, as token classifiers have: softmax cross-entropy, soft targets too."""
    rows = [[0.0, 0.0], [0.3, -0.8], [1.5, 0.2]]
    tokens = {"step_score": np.array([1.0, 0.25], np.float32)}
    batch = collate([PromptGroup("r", np.array([0]), (Completion(np.array([1, 2]), tokens=tokens),))], "tree")
    logs = torch.tensor(rows[1:], dtype=torch.float64).log_softmax(-1)
    expected = -(logs[0, 1] + 0.25 * logs[1, 1] + 0.75 * logs[1, 0])
    assert values("process", rows, batch)["loss"] == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_against_numpy_one_text_at_a_time(name: str, masked: bool) -> None:
    """An independent calculation: each text alone through the model, the losses written out in numpy."""
    part, made = scorer(OUTPUTS[name]), prompt_groups(masked=masked)
    total, terms = 0.0, objective(name, **METHODS[name])({"reward": part}, collate(made, "tree"))
    for prompt_group in made:
        at = []
        for completion in prompt_group.completions:
            text = np.concatenate([prompt_group.prompt, completion.ids]).tolist()
            with torch.no_grad():
                at.append(part(Batch.of([text])).double().numpy()[len(prompt_group.prompt) :])
        if name == "reward":
            chosen, rejected = at[0][-1, 0], at[1][-1, 0]
            total += np.log1p(np.exp(-(chosen - rejected - prompt_group.completions[0].per_completion["margin"])))
        for scores, completion in zip(at, prompt_group.completions, strict=True):
            if name == "rating":
                errors = np.abs(scores[-1] - np.array(completion.per_completion["ratings"]))
                total += np.nansum(np.where(errors <= 0.5, errors**2 / 2, 0.5 * (errors - 0.25)))
            if name == "process":
                for row, wanted in zip(scores, completion.tokens["step_score"], strict=True):
                    if not np.isnan(wanted):
                        total += np.log(np.exp(row).sum()) - wanted * row[1] - (1 - wanted) * row[0]
    assert terms["loss"].sum.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_layout_and_accumulation_change_nothing(name: str) -> None:
    """One gradient, whether prompts are shared, packed or padded, and in whatever groups the prompt groups go through the model:
    missing ratings and the number of steps differ from group to group, so that a mean of means shows."""
    part, made = scorer(OUTPUTS[name]), prompt_groups()
    found: list[tuple[float, torch.Tensor]] = []
    for layout, groups in (("tree", [made]), ("packed", [made]), ("rows", [made]), ("tree", [made[:1], made[1:]]),
                           ("packed", [[f] for f in made])):  # fmt: skip
        part.zero_grad()
        result = gradients(
            StepConfig({"reward": part}, objective(name, **METHODS[name])), group_batch(groups, counts(made), layout)
        )
        found.append((result.loss, torch.cat([p.grad.flatten() for p in part.parameters()])))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-6)
        torch.testing.assert_close(gradient, found[0][1], atol=2e-6, rtol=1e-4)
    assert found[0][1].abs().max() > 1e-3


def losses(name: str) -> list[float]:
    """Of five steps at full precision, plain torch."""
    parts, made = {"reward": scorer(OUTPUTS[name], torch.float64)}, prompt_groups()
    optimizers, out = Optimizers(parts, Optimizer(name="adamw"), LearningRates(1e-2, 1e-2, 1e-2)), []
    with kernels.disabled():
        for step in range(5):
            some = [made[(step + i) % len(made)] for i in range(3)]
            optimizers.set_factor(1.0)
            batch = group_batch([some[:1], some[1:]], counts(some), "tree")
            out.append(train_step(StepConfig(parts, objective(name, **METHODS[name])), batch, optimizers).loss)
    return out


@pytest.mark.parametrize("name", METHODS)
def test_five_steps_are_the_golden_ones(name: str) -> None:
    """Guards against any silent change of scorer, objective, division or optimizer."""
    assert losses(name) == pytest.approx(json.loads(GOLDEN.read_text(encoding="utf-8"))[name], rel=1e-6, abs=1e-6)


@pytest.mark.peers
@pytest.mark.parametrize("centring", [None, 0.05])
@pytest.mark.parametrize("margin", [False, True])
def test_as_in_trl(centring: float | None, margin: bool, tmp_path: Path) -> None:
    """Loss and every gradient of TRL's RewardTrainer on the same padded batch."""
    trl = pytest.importorskip("trl", reason="trl is not installed: parity with RewardTrainer was not checked")
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from tutelage.models.scorer_export import save_scorer
    from tutelage.tokenizer.train import train

    part, made = scorer(1), prompt_groups()
    train(["a text, and another one"] * 9, vocab_size=270, out=tmp_path / "words", template="default")
    save_scorer(part, tmp_path / "m")
    rows: list[dict[str, Any]] = []
    for prompt_group in made:
        texts = [np.concatenate([prompt_group.prompt, e.ids]).tolist() for e in prompt_group.completions]
        rows.append({"chosen_ids": texts[0], "rejected_ids": texts[1]})
        if margin:
            rows[-1]["margin"] = prompt_group.completions[0].per_completion["margin"]
    settings = trl.RewardConfig(
        output_dir=str(tmp_path / "out"), center_rewards_coefficient=centring, report_to="none", bf16=False, use_cpu=True,
        gradient_checkpointing=False, disable_dropout=True, max_length=None,
    )  # fmt: skip
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    trainer = trl.RewardTrainer(
        theirs, args=settings, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "words"),
    )  # fmt: skip
    inputs = trainer.data_collator(rows)
    pad = theirs.config.pad_token_id  # a token of the vocabulary here: texts must not hold it where they end
    assert all(row[key][-1] != pad for row in rows for key in ("chosen_ids", "rejected_ids"))
    inputs["input_ids"] = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], pad)
    expected = trainer.compute_loss(theirs, inputs)
    expected.backward()
    if not margin:
        for prompt_group in made:
            for completion in prompt_group.completions:
                del completion.per_completion["margin"]  # type: ignore[attr-defined]
    result = gradients(
        StepConfig({"reward": part}, objective("reward", centring=centring or 0.0)), group_batch([made], counts(made), "tree")
    )
    assert result.loss == pytest.approx(expected.item(), abs=1e-5)
    wanted = {n: p.grad for n, p in theirs.named_parameters()}
    for name, p in part.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], atol=1e-5, rtol=1e-3, msg=name)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: losses(name) for name in METHODS}, indent=1) + "\n", encoding="utf-8")
