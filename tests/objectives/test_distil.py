"""Distillation as an objective: the same whatever layout, accumulation or source of the teacher's words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.guarantees import tiny
from tutelage.data.groups.groups import Completion, PromptGroup, collate
from tutelage.data.tokens.loader import GlobalBatch
from tutelage.errors import ConfigError
from tutelage.models import kernels
from tutelage.models.interface import Batch
from tutelage.objectives import objective
from tutelage.objectives.distil import check_vocabularies
from tutelage.train.optim import Optimizers
from tutelage.train.step import StepConfig, gradients, train_step
from tutelage.train.watch import UpdateWatch

GOLDEN = Path(__file__).parent.parent / "golden" / "distil.json"
METHODS: dict[str, dict[str, Any]] = {
    "forward_kl": {"temperature": 2.0, "cross_entropy": 0.3},
    "reverse_kl": {"temperature": 1.0},
    "jsd": {"beta": 0.3, "temperature": 1.5, "cross_entropy": 0.1},
}
SHAPE = {"vocab_size": 97, "max_position_embeddings": 64}


def parts(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Module]:
    teacher = tiny.model(seed=5, dtype=dtype, hidden_size=48, head_dim=24, initializer_range=0.3, **SHAPE)
    return {"policy": tiny.model(seed=3, dtype=dtype, **SHAPE), "teacher": teacher.requires_grad_(False).eval()}


def prompt_groups(top: int = 0) -> list[PromptGroup]:
    """Ids and masks from arithmetic; with `top`, the teacher's likeliest tokens at each place."""
    teacher = parts()["teacher"]

    def completion(prompt: list[int], number: int) -> Completion:
        ids = np.array([(number * 37 + i * i * 7 + 3) % 97 for i in range(2 + number % 6)])
        mask = np.array([(i + number) % 3 != 1 for i in range(len(ids))], np.uint8)
        if not top:
            return Completion(ids, mask)
        rows = teacher.logits(Batch.of([prompt + ids.tolist()]))[0, len(prompt) - 1 : -1]
        logprobs, best = rows.detach().log_softmax(-1).topk(top)
        return Completion(ids, mask, {"top_ids": best.numpy(), "top_logprobs": logprobs.numpy()})

    prompts = [[(r * 11 + i * 5) % 97 for i in range(3 + 4 * r)] for r in range(4)]
    return [
        PromptGroup(f"r{r}", np.array(p), tuple(completion(p, 3 * r + i) for i in range(1 + r % 3)))
        for r, p in enumerate(prompts)
    ]


def batch(layout: str = "tree", sizes: tuple[int, ...] = (4,), top: int = 0) -> GlobalBatch:
    rest, micro = prompt_groups(top), []
    counts = {"tokens": float(sum(e.supervised for f in rest for e in f.completions))}
    for size in sizes:
        micro.append(collate(rest[:size], layout))  # type: ignore[arg-type]
        rest = rest[size:]
    return GlobalBatch(micro, counts, [])


def found(name: str, made: GlobalBatch, **change: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    trained = parts()
    result = gradients(StepConfig(trained, objective(name, **METHODS[name], **change)), made)
    return tiny.gradients_of(trained["policy"]), {"loss": result.loss, **result.terms}


@pytest.mark.parametrize("top", [0, 7])
@pytest.mark.parametrize("name", METHODS)
def test_layout_and_accumulation_change_nothing(name: str, top: int) -> None:
    """Guards against teacher and student that look at different places, and against means of means: promise 5 and 6."""
    whole, terms = found(name, batch(top=top))
    for layout in ("tree", "packed", "rows"):
        for sizes in ((4,), (1, 3), (1, 1, 1, 1)):
            again, also = found(name, batch(layout, sizes, top))
            assert tiny.furthest(whole, again) < 5e-6
            assert also == pytest.approx(terms, rel=1e-5)


@pytest.mark.parametrize("own_kernels", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_against_a_dense_calculation(name: str, own_kernels: bool) -> None:
    """Guards the whole path from places to terms: each text alone through both models, sums in float64 by the definitions."""
    settings = {"beta": 0.5, "cross_entropy": 0.0, **METHODS[name]}
    trained, heat, beta, share = parts(), settings["temperature"], settings["beta"], settings["cross_entropy"]
    distance = entropy = count = 0.0
    for group in prompt_groups():
        for completion in group.completions:
            text = Batch.of([group.prompt.tolist() + completion.ids.tolist()])
            z, t = (
                trained[n].logits(text)[0, len(group.prompt) - 1 : -1].detach().double().numpy() for n in ("policy", "teacher")
            )
            q, p = (np.exp(x / heat) / np.exp(x / heat).sum(1, keepdims=True) for x in (z, t))
            m = beta * p + (1 - beta) * q
            kl = lambda a, b: (a * np.log(a / b)).sum(1)  # noqa: E731
            each = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m)}[name]
            chosen = np.exp(z)[np.arange(len(z)), completion.ids] / np.exp(z).sum(1)
            distance += (each * completion.mask).sum()
            entropy += (-np.log(chosen) * completion.mask).sum()
            count += completion.mask.sum()
    kernels.use(own_kernels)
    _, terms = found(name, batch())
    assert terms["_divergence"] == pytest.approx(distance / count, rel=1e-5)
    assert terms["_cross_entropy"] == pytest.approx(entropy / count, rel=1e-5)
    assert terms["loss"] == pytest.approx(((1 - share) * distance + share * entropy) / count, rel=1e-5)


def test_rows_of_texts_are_families_of_one_answer() -> None:
    """Off-policy texts come as packed rows too: the same tokens have to give the same loss there."""
    made = batch("rows")
    (micro,) = made.micro
    weights = torch.zeros(micro.ids.numel())
    targets = torch.zeros(micro.ids.numel(), dtype=torch.int64)
    weights[micro.answers.positions], targets[micro.answers.positions] = 1.0, micro.answers.targets  # type: ignore[union-attr]
    plain = replace(micro, weights=weights.view_as(micro.ids), targets=targets.view_as(micro.ids), answers=None)
    whole, terms = found("jsd", made)
    again, also = found("jsd", replace(made, micro=[plain]))
    assert tiny.furthest(whole, again) < 1e-6
    assert also == pytest.approx(terms, rel=1e-6)


@pytest.mark.parametrize("rest", ["bucket", "renormalise"])
@pytest.mark.parametrize("name", METHODS)
def test_all_but_one_token_kept_is_nearly_the_whole_vocabulary(name: str, rest: str) -> None:
    """Guards the kept streams: with 96 of 97 tokens a bucket of one token is that token."""
    settings = {k: v for k, v in METHODS[name].items() if k != "temperature"}
    results = []
    for top in (0, 96):
        trained = parts()
        result = gradients(StepConfig(trained, objective(name, **settings, rest=rest)), batch(top=top))
        results.append((tiny.gradients_of(trained["policy"]), result.terms))
    near = 1e-4 if rest == "bucket" else 0.05
    assert results[1][1] == pytest.approx(results[0][1], rel=near)
    assert tiny.furthest(results[0][0], results[1][0]) < 20 * near  # the mass of the last one is 1 - others in float32


def losses(name: str) -> list[dict[str, float]]:
    """Loss and gradient norm of three steps, plain torch, float64."""
    from tutelage.config.train import Optimizer

    trained = parts(torch.float64)
    optimizers = Optimizers(trained, Optimizer(name="adamw"), tiny.RATES)
    optimizers.set_factor(1.0)
    out = []
    with kernels.disabled():
        for _ in range(3):
            result = train_step(StepConfig(trained, objective(name, **METHODS[name])), batch(), optimizers)
            out.append({"loss": result.loss, "grad_norm": result.grad_norm})
    return out


@pytest.mark.parametrize("name", METHODS)
def test_three_steps_are_the_golden_ones(name: str) -> None:
    """Guards against any silent change of objective, division and step. To make the numbers anew after a change that is meant:
    `python -m tests.objectives.test_distil`."""
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    for row, wanted in zip(losses(name), expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-6)
    assert expected[-1]["loss"] < expected[0]["loss"]


def test_the_teacher_does_not_move() -> None:
    """Guards against a teacher that learns from its student, or has gradients made for nothing (promise 13)."""
    from tutelage.config.train import Optimizer

    trained = parts()
    optimizers = Optimizers(trained, Optimizer(), tiny.RATES)
    optimizers.set_factor(1.0)
    watch = UpdateWatch(trained, within=1)
    train_step(StepConfig(trained, objective("forward_kl")), batch(), optimizers)
    watch.after_step()
    assert all(p.grad is None for p in trained["teacher"].parameters())
    assert not any(name.startswith("teacher.") for name in optimizers.names.values())


def test_settings_that_cannot_be_are_refused() -> None:
    """A mixture of one distribution has no slope, `beta` means nothing to a KL, other vocabularies nothing at all."""
    with pytest.raises(ConfigError, match="both distributions"):
        objective("jsd", beta=1.0)(parts(), batch().micro[0])
    with pytest.raises(ConfigError, match="beta"):
        objective("forward_kl", beta=0.5)
    with pytest.raises(ConfigError, match="different vocabularies"):
        check_vocabularies(97, 96)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: losses(name) for name in METHODS}, indent=1) + "\n", encoding="utf-8")
