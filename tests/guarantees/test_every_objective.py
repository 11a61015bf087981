"""Promises 6, 7 and 8 for every objective of the table: on ranks, killed and resumed, once more with the same seed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.guarantees import tiny
from tests.guarantees.objectives import case
from tutelage import log
from tutelage.config.train import Optimizer
from tutelage.data.tokens.loader import GlobalBatch
from tutelage.objectives import TABLE, objective
from tutelage.train import distributed
from tutelage.train.loop import train
from tutelage.train.optim import Optimizers
from tutelage.train.step import StepConfig, train_step

pytest.importorskip("transformers")  # of encoders
STEPS = 4


class Same:
    """A source that gives one batch again and again."""

    def __init__(self, batch: GlobalBatch) -> None:
        self.batch = batch

    def next(self, step: int) -> GlobalBatch:
        return self.batch

    def largest(self) -> GlobalBatch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def on_weights(self, version: int) -> None: ...


# Ranks


def steps_of(name: str, rank: int | None) -> dict[str, Any]:
    """Two steps on a rank's share of the batch, or on all of it: what is trained, and what is measured."""
    torch.manual_seed(0)
    parts, batch = case(name)
    if rank is not None:
        assert len(batch.micro) == 2
        batch = replace(batch, micro=batch.micro[rank : rank + 1])
    optimizers = Optimizers(parts, Optimizer(name="adamw"), tiny.RATES)
    recipe = StepConfig(parts, objective(name), clip=1.0)
    results = [train_step(recipe, batch, optimizers) for _ in range(2)]
    return {
        "loss": [r.loss for r in results], "norm": [r.grad_norm for r in results], "terms": [r.terms for r in results],
    }  # fmt: skip


def on_a_rank(folder: str) -> None:
    """Every objective, one after another, in this rank."""
    torch.set_num_threads(1)
    distributed.start("cpu")
    try:
        found = {name: steps_of(name, log.rank()) for name in TABLE}
        (Path(folder) / f"rank_{log.rank()}.json").write_text(json.dumps(found))
    finally:
        distributed.stop()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    pair = [tiny.Process({"call": on_a_rank, "args": [str(folder)], "env": env, "die": {}}) for env in tiny.ranks(2)]
    assert [p.wait() for p in pair] == [0, 0], pair[0].said + pair[1].said
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", TABLE)
def test_two_ranks_are_one(two_ranks: list[dict[str, Any]], name: str) -> None:
    """A mean of each rank's mean, a count or a reference point of a rank's own, gradients that are not added, a clip by half a
    norm: every rank has the loss, the norm and the measured terms of one process, in the second step too."""
    alone = steps_of(name, None)
    for rank in two_ranks:
        assert rank[name]["loss"] == pytest.approx(alone["loss"], rel=1e-4, abs=1e-6)
        assert rank[name]["norm"] == pytest.approx(alone["norm"], rel=1e-3, abs=1e-6)
        for found, expected in zip(rank[name]["terms"], alone["terms"], strict=True):
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    one, other = (steps_of(name, rank)["norm"][0] for rank in (0, 1))
    assert one != pytest.approx(other, rel=1e-3), "both ranks have the same share: nothing would be seen"


# Resume, and the same seed


def run(name: str, folder: Path, stop: int | None = None) -> dict[str, torch.Tensor]:
    """Trains in a folder, on from what is there; `stop`: the last checkpoint that is left, as by a kill after it."""
    torch.manual_seed(0)
    parts, batch = case(name)
    job = tiny.job(
        folder, parts=parts, data=Same(batch), steps=STEPS, recipe=StepConfig(parts, objective(name), clip=1.0), checkpoint_every=1,
        keep_checkpoints=STEPS,
    )  # fmt: skip
    train(job)
    for checkpoint in (folder / "checkpoints").glob("step_*") if stop is not None else ():
        if int(checkpoint.name.split("_")[1]) > int(stop or 0):
            shutil.rmtree(checkpoint)
    return {f"{part}.{n}": p.detach().clone() for part, module in parts.items() for n, p in module.named_parameters()}


@pytest.mark.parametrize("name", TABLE)
def test_resumed_is_unbroken_and_the_same_seed_gives_the_same_bits(tmp_path: Path, name: str) -> None:
    """State of an objective or of a part that a checkpoint lacks; sums in an order that changes."""
    whole = run(name, tmp_path / "whole")
    broken = run(name, tmp_path / "broken", stop=2)
    assert all(torch.equal(whole[n], broken[n]) for n in whole), "the same seed gave other weights"
    assert not (tmp_path / "broken" / "checkpoints" / f"step_{STEPS:06d}").exists()
    again = run(name, tmp_path / "broken")
    assert all(torch.equal(whole[n], again[n]) for n in whole)
    one, two = (tiny.metrics(tmp_path / which) for which in ("whole", "broken"))
    assert one == two
