"""Promise 12: metrics stream, and the logits of a whole evaluation are never held."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.guarantees import tiny
from tutelage.data.tokens.loader import eval_batches
from tutelage.models import heads, kernels
from tutelage.models.interface import Batch
from tutelage.objectives import Objective, objective
from tutelage.objectives.next_token import next_token
from tutelage.train.hooks import Validate
from tutelage.train.loop import Job, State
from tutelage.train.step import StepConfig, measure


class Watching(TorchDispatchMode):
    """Sizes of the tensors that operations make: the largest, and the most that were alive at a time (values)."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                self.alive += x.numel()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(x, self._gone, x.numel())
        return out

    def _gone(self, size: int) -> None:
        self.alive -= size


def batches(count: int) -> tuple[list[Batch], dict[str, float]]:
    made = eval_batches(tiny.segments("documents"), row_length=tiny.ROW, stride=tiny.ROW // 2, micro_rows=4)
    (one, *_) = [e.batch for e in made]
    return [one] * count, {"tokens": float(one.weights.sum()) * count}


def evaluated(count: int, function: Any = None) -> Watching:
    many, counts = batches(count)
    recipe = StepConfig({"policy": tiny.model()}, Objective("kept", function) if function else objective("next_token"))
    with Watching() as watching:
        measure(recipe, many, counts)
    return watching


@pytest.mark.parametrize("own_kernels", [True, False])
def test_logits_of_an_evaluation_are_never_held(monkeypatch, own_kernels):
    """Guards against evaluation that runs out of memory: no tensor is as large as one batch's logits, and ten batches hold no
    more than two. (The measurement itself is tried on an objective that does keep its logits.)"""
    monkeypatch.setattr(heads, "CHUNK_LOGITS", 64 * tiny.VOCABULARY)
    before = kernels.available()
    kernels.use(own_kernels)
    try:
        few, many = evaluated(2), evaluated(10)
        logits = 4 * tiny.ROW * tiny.VOCABULARY  # of one batch
        assert many.largest <= 64 * tiny.VOCABULARY < logits / 2
        assert many.peak == few.peak < 5 * logits  # a few chunks, and the layers' own
        kept = []

        def keeping(parts, batch):
            kept.append(parts["policy"].logits(batch))
            return next_token(parts, batch)

        assert evaluated(10, keeping).peak > many.peak + 9 * logits
    finally:
        kernels.use(before)


def test_evaluation_keeps_no_graph():
    """Guards against activations kept for a backward pass that never comes."""
    seen = []

    def spying(parts, batch):
        terms = next_token(parts, batch)
        seen.append(terms["loss"].sum.requires_grad or parts["policy"].training)
        return terms

    model = tiny.model().train()
    many, counts = batches(2)
    measure(StepConfig({"policy": model}, Objective("spying", spying)), many, counts)
    assert seen == [False, False] and model.training


def test_each_metric_is_on_disk_when_it_is_known(tmp_path):
    """Guards against metrics that are collected until the end, and lost with a killed run."""
    many, counts = batches(2)
    job: Job = tiny.job(tmp_path)
    validate = Validate(many, counts, every=1)
    for number in (1, 2):
        validate.run(State(job, tiny.loop.Progress(step=number)))
        rows = tiny.metrics(tmp_path)
        assert len(rows) == number and rows[-1]["validation_loss"] == validate.latest
