"""Promise 13: a run that does not train what it should, or trains what it should not, stops and names the tensors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.guarantees import tiny
from tutelage.config.train import Optimizer, Schedule
from tutelage.errors import TrainingStopped
from tutelage.train import distributed
from tutelage.train.loop import Job, train
from tutelage.train.optim import Optimizers
from tutelage.train.watch import UpdateWatch, digest


def with_dead_tensor() -> nn.Module:
    """A model with a trainable matrix that no loss reaches."""
    model = tiny.model()
    model.adapter = nn.Linear(4, 4, bias=False)
    return model


def test_a_sound_run_passes(tmp_path):
    """Guards against false alarms, with a frozen tensor among the trained ones."""
    model = tiny.model()
    model.model.embed_tokens.weight.requires_grad_(False)
    state = train(tiny.job(tmp_path, parts={"policy": model}))
    assert state.progress.step == 6


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_trainable_tensor_without_gradient_stops_the_run(tmp_path, steps):
    """Guards against training nothing (an adapter that is not attached, a detached head), however short the run is."""
    with pytest.raises(TrainingStopped, match=r"1 of \d+ tensors should have been trained") as error:
        train(tiny.job(tmp_path, parts={"policy": with_dead_tensor()}, steps=steps))
    assert "policy.adapter.weight" in str(error.value)
    assert not (tmp_path / "checkpoints" / f"step_{steps:06d}").exists()


class Meddling(Optimizers):
    """Optimizers that change a frozen tensor in their step number `at`."""

    frozen: nn.Parameter
    at = 1
    done = 0

    def step(self) -> None:
        super().step()
        self.done += 1
        if self.done == self.at:
            with torch.no_grad():
                self.frozen[0, 0] += 0.125


@pytest.mark.parametrize("at", [1, 6])
def test_a_frozen_tensor_that_changes_stops_the_run(tmp_path, at):
    """Guards against a base model that drifts while only its adapter should train, in the first step or in the last."""
    model = tiny.model()
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    optimizers = Meddling({"policy": model}, Optimizer(), tiny.RATES)
    optimizers.frozen, optimizers.at = frozen, at
    with pytest.raises(TrainingStopped, match="1 frozen tensors changed") as error:
        train(tiny.job(tmp_path, parts={"policy": model}, optimizers=optimizers))
    assert "policy.model.embed_tokens.weight" in str(error.value)


def test_a_zero_learning_rate_is_noticed(tmp_path):
    """Guards against updates that are lost: rates so small that no float32 weight changes."""
    model = tiny.model()
    rates = tiny.LearningRates(1e-30, 1e-30, 1e-30)
    with pytest.raises(TrainingStopped, match=r"(\d+) of \1 tensors should have been trained"):
        train(tiny.job(tmp_path, parts={"policy": model}, optimizers=Optimizers({"policy": model}, Optimizer(), rates)))


def slow_job(folder: Path, peak: float, steps: int = 60, model: nn.Module | None = None) -> Job:
    """A long warm-up, whose first updates of the norms' weights, which are 1, are lost in rounding."""
    parts = {"policy": model or tiny.model()}
    with torch.no_grad():
        parts["policy"].model.norm.weight.fill_(1.0)
    rates = tiny.LearningRates(peak, peak, peak)
    schedule = Schedule(name="linear", warmup=40.0, final=0.0)
    optimizers = Optimizers(parts, Optimizer(name="adamw", weight_decay=0.0), rates)
    return tiny.job(folder, parts=parts, optimizers=optimizers, steps=steps, schedule=schedule)


def test_a_warm_up_is_no_reason_to_stop(tmp_path: Path) -> None:
    """Guards against false alarms: rates that are common for preferences, whose warm-up begins below float32's resolution."""
    assert train(slow_job(tmp_path, 1e-7)).progress.step == 60


def test_a_run_goes_on_where_its_rate_has_decayed(tmp_path: Path) -> None:
    """Guards against a sound run that was killed near its end and can never end: its last rates are too small to move all."""
    job = slow_job(tmp_path, 1e-7)
    job.checkpoint_every = 58
    train(job)
    shutil.rmtree(tmp_path / "checkpoints" / "step_000060")
    assert train(slow_job(tmp_path, 1e-7)).progress.step == 60


def test_updates_that_are_lost_at_the_peak_stop_the_run(tmp_path: Path) -> None:
    """Guards against a watch that waits for ever: after the warm-up, not after all steps."""
    with pytest.raises(TrainingStopped, match=r"did not change in 45 steps") as error:
        train(slow_job(tmp_path, 1e-30))
    assert "raise the learning rate" in str(error.value)


def test_a_dead_tensor_is_named_in_the_warm_up(tmp_path: Path) -> None:
    """Guards against a mistake that is told an hour later."""
    with pytest.raises(TrainingStopped, match=r"1 of \d+ tensors .* in 5 steps"):
        train(slow_job(tmp_path, 5e-7, model=with_dead_tensor()))


def test_weight_decay_on_ranks_does_not_hide_a_dead_tensor(monkeypatch):
    """Guards against gradients of zeros, made up so that ranks can be summed, through which decay moves what no loss reaches."""
    model = with_dead_tensor()
    touched = model.model.norm.weight
    touched.grad = torch.ones_like(touched)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    distributed.sum_gradients(model.parameters())
    assert model.adapter.weight.grad is None
    assert torch.equal(touched.grad, torch.full_like(touched, 2.0))


def test_equal_changes_do_not_hide_each_other():
    """Guards against digests in which changes cancel: AdamW's first step moves weights that are all 1 by one amount."""
    ones = torch.ones(32)
    up = torch.where(torch.arange(32) < 16, 1.01, 0.99)
    swapped = torch.arange(32.0)
    swapped[[3, 4]] = swapped[[4, 3]]
    assert len({digest(x) for x in (ones, up, up.flip(0), torch.full((32,), 1.01))}) == 4
    assert digest(swapped) != digest(torch.arange(32.0))
    assert digest(ones.bfloat16()) == digest(ones.clone().bfloat16()) != digest(torch.ones(33).bfloat16())


def test_the_watch_looks_at_bits():
    """Guards against comparing norms or means, which a change can leave as they were."""
    layer = nn.Linear(4, 4, bias=False).requires_grad_(False)
    watch = UpdateWatch({"part": layer})
    watch.check_frozen()
    with torch.no_grad():
        layer.weight[1, 2] = torch.nextafter(layer.weight[1, 2], torch.tensor(9.0))
    with pytest.raises(TrainingStopped, match=r"(?s)frozen.*part\.weight"):
        watch.check_frozen()
