"""Distillation beside TRL's GKD: needs an environment with trl 1.16 (make test-peers)."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tutelage.models.config import DecoderConfig
from tutelage.models.init import build
from tutelage.models.interface import Batch
from tutelage.objectives import objective

pytestmark = pytest.mark.peers
SHAPE = tiny.shape(vocab_size=97, intermediate_size=64, max_position_embeddings=64, initializer_range=0.2)


@pytest.mark.parametrize(("name", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.3), ("jsd", 0.5)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_parity_with_gkd(name: str, beta: float, temperature: float) -> None:
    """The same loss and gradients as `generalized_jsd_loss` on one padded batch: guards which side is whose, and the scale."""
    gkd = pytest.importorskip("trl.experimental.gkd", reason="needs trl 1.16")
    texts = [[(r * 37 + i * i * 7 + 3) % 97 for i in range(9 + 5 * r)] for r in range(4)]
    batch = Batch.of(texts, supervised=[[float((i + r) % 3 != 0) for i in range(len(t))] for r, t in enumerate(texts)])
    parts = {"policy": build(DecoderConfig.from_hf(SHAPE), 0), "teacher": build(DecoderConfig.from_hf(SHAPE), 1)}
    parts["teacher"].requires_grad_(False)
    labels = torch.where(batch.weights > 0, batch.targets, -100)
    logits = (parts[n].logits(batch) for n in ("policy", "teacher"))
    theirs = gkd.GKDTrainer.generalized_jsd_loss(*logits, labels, beta, temperature, num_items_in_batch=int((labels >= 0).sum()))
    theirs.backward()
    expected = {n: p.grad.clone() for n, p in parts["policy"].named_parameters()}  # type: ignore[union-attr]
    parts["policy"].zero_grad()
    settings = {"beta": beta} if name == "jsd" else {}
    ours = objective(name, temperature=temperature, **settings)(parts, batch)["loss"].sum / batch.weights.sum()
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    for n, p in parts["policy"].named_parameters():
        torch.testing.assert_close(p.grad, expected[n], rtol=1e-4, atol=1e-5)
