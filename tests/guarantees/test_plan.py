"""Promise 11: what a run will take is said before its first step, and what does not fit fails in its first second."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.guarantees import tiny
from tutelage.data.tokens.loader import GlobalBatch
from tutelage.errors import TrainingStopped
from tutelage.objectives import Objective
from tutelage.objectives.next_token import next_token
from tutelage.train import hooks
from tutelage.train.loop import train
from tutelage.train.step import StepConfig


def test_time_and_memory_are_said_before_the_first_step():
    """Guards against a plan that comes with the result: a real run prints both with their formulas before step 0's validation."""
    log = (tiny.straight() / "logs" / "attempt_1.log").read_text(encoding="utf-8")
    before, _, after = log.partition("step 0  validation loss")
    assert after
    (time,) = [line for line in before.splitlines() if " time: " in line]
    (memory,) = [line for line in before.splitlines() if " memory: " in line]
    assert " FLOPs / (" in time and " to " in time
    assert " GB (" in memory and "activations" in memory and memory.endswith("; 9 GB here")


class Huge:
    """A source whose largest batch is marked; what is asked for is kept."""

    def __init__(self) -> None:
        self.inner, self.asked = tiny.source(), []

    def largest(self) -> GlobalBatch:
        self.asked.append("largest")
        return self.inner.largest()

    def next(self, step: int) -> GlobalBatch:
        self.asked.append(step)
        return self.inner.next(step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def refuse() -> None:
    raise MemoryError


def allocate() -> None:
    torch.empty(1 << 60)


@pytest.mark.parametrize("fail", [refuse, allocate])
def test_a_largest_batch_that_does_not_fit_stops_before_step_1(tmp_path, fail):
    """Guards against running out of memory hours later, at the first long row; torch's CPU allocator raises a RuntimeError."""
    model, data = tiny.model(), Huge()

    def objective(parts, batch):
        fail()
        return next_token(parts, batch)

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(TrainingStopped, match="the largest batch does not fit in memory") as error:
        validate = {"validate": hooks.Validate([data.inner.next(0).micro[0]], {"tokens": 1.0}, every=1)}
        recipe = StepConfig({"policy": model}, Objective("given", objective))
        train(tiny.job(tmp_path, parts={"policy": model}, data=data, recipe=recipe, hooks=validate))
    assert tiny.metrics(tmp_path) == []
    assert "micro_rows" in str(error.value) and "checkpointing=layer" in str(error.value)
    assert data.asked == ["largest"]
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())


def test_other_errors_of_the_largest_batch_are_not_called_memory(tmp_path):
    """Guards against blaming memory for a bug."""
    model = tiny.model()

    def broken(parts, batch):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(tiny.job(tmp_path, parts={"policy": model}, recipe=StepConfig({"policy": model}, Objective("broken", broken))))


def test_the_largest_batch_runs_backward_and_leaves_no_trace(tmp_path):
    """Guards against a dry run that only goes forward (the backward pass is the peak), or that changes the run it precedes."""
    seen = []

    def spying(parts, batch):
        terms = next_token(parts, batch)
        tokens = int((batch.segments > 0).sum())
        terms["loss"].sum.register_hook(lambda g: seen.append(tokens))
        return terms

    model, data = tiny.model(), Huge()
    train(
        tiny.job(
            tmp_path / "a",
            parts={"policy": model},
            data=data,
            steps=2,
            recipe=StepConfig({"policy": model}, Objective("spying", spying)),
        )
    )
    assert data.asked == ["largest", 0, 1]
    sizes = [sum(int((m.segments > 0).sum()) for m in data.inner.next(s).micro) for s in range(data.inner.rows_per_epoch // 4)]
    assert sum(seen[:2]) >= max(sizes)  # two micro-batches, their backward passes first of all
    plain = tiny.model()
    job = tiny.job(tmp_path / "b", parts={"policy": plain}, steps=2)
    job.source.largest = lambda: job.source.next(5)
    train(job)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
