"""The promises with an adapter: killed and resumed, whole and accumulated, every objective with every kind, frozen tensors."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.guarantees import tiny
from tests.guarantees.objectives import case
from tutelage.config.adapter import Adapter
from tutelage.config.train import Optimizer
from tutelage.models.adapters.attach import adapter_disabled, attach_adapter, trainable
from tutelage.objectives import TABLE, objective
from tutelage.train.loop import train
from tutelage.train.optim import Optimizers
from tutelage.train.step import StepConfig, gradients, train_step

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4}, "dora": {"kind": "dora", "rank": 4}, "ia3": {"kind": "ia3"},
    "prompt": {"kind": "prompt", "tokens": 4}, "prefix": {"kind": "prefix", "tokens": 4},
    "qlora": {"kind": "lora", "rank": 4, "quantize": "nf4"}, "tables": {"kind": "lora", "rank": 4, "embeddings": True},
}  # fmt: skip


def worn(kind: str) -> Any:
    return attach_adapter(tiny.model(), Adapter(**KINDS[kind]), 0)


# Resume


def settings(kind: str) -> dict[str, Any]:
    given = {f"adapter.{key}": value for key, value in KINDS[kind].items()}
    return {"stage": "sft", "model": tiny.checkpoint(), "data": tiny.records("conversations"), **given}


@pytest.mark.parametrize("kind", ["lora", "prefix", "qlora", "tables"])
def test_a_killed_run_with_an_adapter_is_the_unbroken_one(tmp_path: Path, kind: str) -> None:
    """Guards against an adapter that begins anew after a resume, a base that a checkpoint has to hold, state that is lost."""
    whole = tiny.start(tmp_path / "whole", **settings(kind))
    assert whole.wait() == 0, whole.said
    for place in ({"at": "update", "count": 4}, {"at": "checkpoint", "count": 2}):
        killed = tiny.start(tmp_path / "broken", die=place, **settings(kind))
        assert killed.wait() == -signal.SIGKILL, killed.said
    last = tiny.start(tmp_path / "broken", **settings(kind))
    assert last.wait() == 0 and "resuming after step" in last.said, last.said
    one, two = (tiny.run_folder(tmp_path / name, "sft") for name in ("whole", "broken"))
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step_000010/optimizer.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert tiny.metrics(one) == tiny.metrics(two)


@pytest.mark.parametrize(("kind", "shard"), [("lora", "full"), ("prefix", "full"), ("qlora", "none")])
def test_two_ranks_train_the_adapter_of_one(tmp_path: Path, kind: str, shard: str) -> None:
    """Guards against gradients of an adapter that are not added over ranks, and against folders with half of each tensor."""
    alone = tiny.start(tmp_path / "one", **settings(kind))
    pair = [tiny.start(tmp_path / "two", env=env, shard=shard, **settings(kind)) for env in tiny.ranks(2)]
    for process in (alone, *pair):
        assert process.wait() == 0, process.said
    one, two = (load_file(tiny.run_folder(tmp_path / n, "sft") / "adapter" / "adapter_model.safetensors") for n in ("one", "two"))
    assert tiny.furthest(one, two) < 1e-4


# Accumulation


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_is_whole(kind: str) -> None:
    """Guards against a change that is counted once a micro-batch."""
    found = []
    for micro in (1, 2, 4):
        model = worn(kind)
        with torch.no_grad():
            for i, (_, p) in enumerate(trainable(model)):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
        gradients(StepConfig({"policy": model}, objective("next_token")), tiny.source("conversations", micro_rows=micro).next(0))
        found.append(tiny.gradients_of(model))
    assert found[0].keys() == dict(trainable(model)).keys()
    assert max(tiny.furthest(found[0], other) for other in found[1:]) < 1e-4


# Every objective


EXAMPLES = [name for name, row in TABLE.items() if row.data == "examples"]
LAYOUTS = [(name, "packed" if name in EXAMPLES else "tree") for name in TABLE]
LAYOUTS += [(name, way) for name in ("dpo", "grpo", "reward") for way in ("packed", "rows")]
CASES = [(*case, kind) for case in LAYOUTS for kind in KINDS]


@pytest.mark.parametrize(("name", "layout", "kind"), CASES)
def test_every_objective_trains_every_kind(name: str, kind: str, layout: str) -> None:
    """Guards against methods that reach past the adapter, or that some layout does without it: two steps move every tensor of it
    and none of the base, and layouts agree."""
    parts, batch = case(name, Adapter(**KINDS[kind]), layout)
    recipe = StepConfig(parts, objective(name), clip=1.0)
    every = {f"{name}.{n}": p for name, part in parts.items() for n, p in part.named_parameters()}
    before = {n: p.detach().clone() for n, p in every.items()}
    optimizers = Optimizers(parts, Optimizer(), tiny.RATES)
    first = train_step(recipe, batch, optimizers)
    second = train_step(recipe, batch, optimizers)
    if layout != "tree" and name not in EXAMPLES:
        tree = case(name, Adapter(**KINDS[kind]), "tree")
        expected = train_step(
            StepConfig(tree[0], objective(name), clip=1.0), tree[1], Optimizers(tree[0], Optimizer(), tiny.RATES)
        )
        assert first.loss == pytest.approx(expected.loss, rel=1e-4)
        assert first.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
    assert np.isfinite(second.loss)
    for n, p in every.items():
        assert torch.equal(p, before[n]) != p.requires_grad, f"{n} {'stays' if p.requires_grad else 'moves'}"


# Frozen and trained


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_watch_knows_that_half_of_a_low_rank_change_moves_later(tmp_path: Path, kind: str, steps: int) -> None:
    """Guards against a false alarm: while B is zero, A has no gradient."""
    model = worn(kind)
    with adapter_disabled(model), torch.no_grad():
        batch = tiny.source().next(0).micro[0]
        base = model.logits(batch)
    assert train(tiny.job(tmp_path, parts={"policy": model}, steps=steps)).progress.step == steps
    with adapter_disabled(model), torch.no_grad():
        assert torch.equal(model.logits(batch), base)
