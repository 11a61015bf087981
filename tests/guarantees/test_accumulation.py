"""Promise 6: how a global batch is cut into micro-batches does not change its gradient."""

from __future__ import annotations

import pytest
import torch

from tests.guarantees import tiny
from tutelage.models import kernels
from tutelage.objectives import objective
from tutelage.train.step import StepConfig, gradients

ROWS = 8


def gradient_of(micro_rows: int, kind: str = "conversations") -> tuple[dict[str, torch.Tensor], float]:
    model = tiny.model()
    batch = tiny.source(kind, rows_per_step=ROWS, micro_rows=micro_rows, row_length=32).next(0)
    assert len(batch.micro) == -(-ROWS // micro_rows)
    result = gradients(StepConfig({"policy": model}, objective("next_token")), batch)
    return tiny.gradients_of(model), result.loss


@pytest.mark.parametrize("own_kernels", [True, False])
def test_any_accumulation_gives_one_gradient(own_kernels):
    """Guards against dividing each micro-batch by its own count (a mean of means), and against a last micro-batch of fewer rows
    that counts as much as a full one."""
    before = kernels.available()
    kernels.use(own_kernels)
    try:
        whole, loss = gradient_of(8)
        for micro_rows in (4, 3, 2, 1):
            parts, again = gradient_of(micro_rows)
            assert tiny.furthest(whole, parts) < 2e-6
            assert again == pytest.approx(loss, rel=1e-6)
    finally:
        kernels.use(before)


def test_a_mean_of_means_would_be_seen():
    """Guards the test above: its micro-batches differ so much in supervised tokens that the usual mistake is no rounding."""
    whole, _ = gradient_of(8)
    model = tiny.model()
    batch = tiny.source("conversations", rows_per_step=ROWS, micro_rows=1, row_length=32).next(0)
    for micro in batch.micro:
        term = objective("next_token")({"policy": model}, micro)["loss"]
        (term.sum / micro.weights.sum() / len(batch.micro)).backward()
    assert tiny.furthest(whole, tiny.gradients_of(model)) > 1e-2


def test_the_loss_is_the_mean_over_all_supervised_tokens():
    """Guards against a loss that is divided by rows, pieces or padded tokens instead of supervised targets."""
    model = tiny.model()
    batch = tiny.source("conversations", rows_per_step=ROWS, micro_rows=2, row_length=32).next(0)
    logits = [torch.log_softmax(model.logits(m), -1) for m in batch.micro]
    terms = [-(z.gather(-1, m.targets[..., None])[..., 0] * m.weights) for z, m in zip(logits, batch.micro, strict=True)]
    expected = sum(t.sum().item() for t in terms) / sum(m.weights.sum().item() for m in batch.micro)
    assert gradient_of(2)[1] == pytest.approx(expected, rel=1e-5)
