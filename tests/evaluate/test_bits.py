"""Bits per byte through a model: exact, streaming, one document at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tutelage.errors import DataError, TrainingStopped
from tutelage.evaluate.bits import Encoded, measure
from tutelage.models.heads import LmHead
from tutelage.models.interface import Batch, Output

VOCABULARY = 11


class Running(nn.Module):
    """The hidden state is a decayed sum of the embeddings of a segment so far: causal, isolated."""

    def __init__(self, decay: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.lm_head = LmHead(nn.Parameter(torch.randn(VOCABULARY, 8)))
        self.decay = decay
        self.shapes: list[tuple[int, int]] = []

    def forward(self, batch: Batch) -> Output:
        self.shapes.append(batch.shape)
        x = self.embed(batch.ids)
        out = torch.zeros_like(x)
        for t in range(x.shape[1]):
            same = (batch.segments[:, t] == batch.segments[:, t - 1])[:, None] if t else torch.zeros(x.shape[0], 1)
            out[:, t] = x[:, t] + (self.decay * out[:, t - 1] * same if t else 0)
        return Output(out)

    def alone(self, ids: list[int]) -> float:
        """Nats of a whole document, read in one piece."""
        batch = Batch.of([ids])
        logits = self.lm_head.logits(self(batch).hidden[0, :-1])
        return nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()


def documents(count: int = 12, seed: int = 0, longest: int = 70) -> list[Encoded]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, longest, size=count)
    return [Encoded(np.array([0, *rng.integers(1, VOCABULARY, size=s)]), int(s) * 3, f"d{i}") for i, s in enumerate(sizes)]


def test_packed_rows_give_the_bits_of_documents_read_alone() -> None:
    """Attention across documents, a target of the next document, or padding counted would change a sum."""
    model, docs = Running(), documents()
    sums = measure(model, docs, row_length=80, batch_tokens=160)
    assert sums.nats == pytest.approx([model.alone(d.ids.tolist()) for d in docs], rel=1e-5)
    assert sums.tokens == [len(d.ids) - 1 for d in docs]
    assert sums.names == [d.name for d in docs]
    nats, size = sum(sums.nats), sum(d.bytes for d in docs)
    assert sums.bits_per_byte().value == pytest.approx(nats / math.log(2) / size)
    assert sums.perplexity().value == pytest.approx(math.exp(nats / sum(sums.tokens)))


@pytest.mark.parametrize(("row_length", "stride"), [(16, 8), (16, 15), (16, 1), (9, 4), (2, 1)])
def test_windows_predict_every_token_once(row_length: int, stride: int) -> None:
    """Overlaps counted twice, or the end of a document left out, are the usual errors. This model forgets at once, so any window
    must give the same nats."""
    model, docs = Running(decay=0.0), documents()
    sums = measure(model, docs, row_length=row_length, stride=stride, batch_tokens=64)
    assert sums.tokens == [len(d.ids) - 1 for d in docs]
    assert sums.nats == pytest.approx([model.alone(d.ids.tolist()) for d in docs], rel=1e-5)


def test_windows_keep_their_context() -> None:
    """Windows without overlap restart cold; with stride 8 of 32 what the model sees differs from the whole by under decay^24."""
    model, docs = Running(decay=0.6), documents(longest=200)
    whole = [model.alone(d.ids.tolist()) for d in docs]
    warm = measure(model, docs, row_length=32, stride=8).nats
    cold = measure(model, docs, row_length=32, stride=31).nats
    assert warm == pytest.approx(whole, rel=1e-4)
    assert abs(sum(cold) - sum(whole)) > 100 * abs(sum(warm) - sum(whole))


def test_batches_stay_small_and_logits_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 12: a batch never exceeds its budget, and only log-probabilities leave the head."""
    model, docs = Running(), documents(count=60)
    monkeypatch.setattr(LmHead, "logits", lambda *_: pytest.fail("logits of a batch were made"))
    seen: list[int] = []
    original = LmHead.logprobs

    def spy(self: LmHead, hidden: torch.Tensor, targets: torch.Tensor) -> Any:
        seen.append(len(targets))
        return original(self, hidden, targets)

    monkeypatch.setattr(LmHead, "logprobs", spy)
    sums = measure(model, iter(docs), row_length=32, batch_tokens=64)
    assert max(a * b for a, b in model.shapes) <= 64
    assert sum(seen) == sum(sums.tokens) and max(seen) < 64
    assert model.training is True


def test_end_mark_is_paid_for_and_a_missing_begin_mark_too() -> None:
    """Leaving the end out flatters; leaving the first token out flatters a tokenizer without a begin mark."""
    model = Running()
    ids = np.array([0, 3, 4, 5, 1])
    free = measure(model, [Encoded(ids, 9)], row_length=16)
    paid = measure(model, [Encoded(ids, 9, first_nats=math.log(VOCABULARY))], row_length=16)
    assert paid.nats[0] - free.nats[0] == pytest.approx(math.log(VOCABULARY))
    assert (free.tokens, paid.tokens) == ([4], [5])
    assert measure(model, [Encoded(ids[:-1], 9)], row_length=16).nats[0] < free.nats[0]


def test_damaged_weights_and_empty_documents_are_named() -> None:
    """NaN must not become a score."""
    model = Running()
    with torch.no_grad():
        model.embed.weight[7] = float("nan")
    with pytest.raises(TrainingStopped, match="broken"):
        measure(model, [Encoded(np.array([0, 1, 2]), 3, "fine"), Encoded(np.array([0, 7, 2]), 3, "broken")], row_length=8)
    with pytest.raises(DataError, match="no token to predict"):
        measure(Running(), [Encoded(np.array([0]), 0, "empty")], row_length=8)
    with pytest.raises(DataError, match="no held-out document"):
        measure(Running(), [], row_length=8)
