"""Promise 15: a loss or gradient that is not finite stops the run, saves the batch and names the records."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.guarantees import tiny
from tutelage.errors import TrainingStopped
from tutelage.files import read_json
from tutelage.objectives import Objective, Term
from tutelage.objectives.next_token import next_token
from tutelage.train import checkpoint
from tutelage.train.loop import train
from tutelage.train.step import StepConfig


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_one_bad_row_stops_the_run_and_is_named(tmp_path):
    """Guards against NaN that runs on, against an update made from it, and against an error that names the step alone."""
    model = tiny.model()
    data = tiny.Poisoned(tiny.source("conversations"), at=3)
    job = tiny.job(tmp_path, parts={"policy": model}, data=data, checkpoint_every=1)
    with pytest.raises(TrainingStopped, match="the loss of step 3 is not finite; nothing was updated") as error:
        train(job)
    saved = tmp_path / "failure" / "step_000003"
    facts = read_json(saved / "failure.json")
    assert facts["micro_batch"] == 1 and facts["rows"] == [1] and facts["records"] == [list(data.record)]
    assert all(name in str(error.value) for name in data.record)
    batch = load_file(saved / "batch.safetensors")
    expected = data.inner.next(3).micro[1]
    assert torch.equal(batch["ids"], expected.ids) and batch["weights"].isnan().sum() == 1
    last = checkpoint.latest(tmp_path / "checkpoints")
    assert last is not None and last.name == "step_000003"
    before = load_file(last / "policy.safetensors")
    assert all(torch.equal(before[n], p) for n, p in weights(model).items())
    again = tiny.job(tmp_path, parts={"policy": tiny.model(5)}, data=data.inner)  # the data mended, the same command again
    assert train(again).progress.step == 6


def test_a_gradient_alone_that_is_not_finite_stops_too(tmp_path):
    """Guards against looking at the loss alone: a finite loss whose gradient overflows is found, and the row that does it."""
    model = tiny.model()
    data = tiny.source("conversations")
    bad = data.next(0).micro[1].ids[0]

    def overflowing(parts, batch):
        terms = next_token(parts, batch)
        hit = (batch.ids == bad).all(1).any()
        zero = (model.model.norm.weight[0] * 0.0).clamp(min=0.0)
        extra = zero.sqrt() if hit else zero  # 0, with an infinite slope times 0
        return {"loss": Term(terms["loss"].sum + extra, "tokens")}

    before = weights(model)
    job = tiny.job(
        tmp_path, parts={"policy": model}, data=data, recipe=StepConfig({"policy": model}, Objective("overflowing", overflowing))
    )
    with pytest.raises(TrainingStopped, match="the gradient of step 0 is not finite"):
        train(job)
    facts = read_json(tmp_path / "failure" / "step_000000" / "failure.json")
    assert (facts["micro_batch"], facts["rows"]) == (1, [0])
    assert all(torch.equal(before[n], p) for n, p in weights(model).items())


def test_the_rank_with_the_bad_row_is_the_one_that_is_saved(tmp_path):
    """Guards against ranks that overwrite each other's evidence, or accuse rows whose loss is sound: two real processes."""
    pair = [tiny.Process({"call": tiny.poisoned_rank, "args": [str(tmp_path)], "env": env, "die": {}}) for env in tiny.ranks(2)]
    assert [p.wait() for p in pair] == [3, 3], [p.said for p in pair]
    assert [p.name for p in (tmp_path / "failure" / "step_000002").iterdir()] == ["rank_1"]
    record = pair[1].said.rpartition("records (")[2].split("'")[1]
    assert all("the loss of step 2 is not finite" in p.said and record in p.said.partition("\nrecords")[0] for p in pair)
