"""Scoring requests that share their beginnings: read once, the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.engine import small
from tutelage.engine import Engine
from tutelage.models.interface import Batch

VOCAB = 97


def questions(count: int, choices: int = 4) -> list[tuple[list[int], int]]:
    """Multiple choice: completions of 1 to 9 tokens, some questions longer than others, one too short to be worth it."""
    g = torch.Generator().manual_seed(0)
    out = []
    for q in range(count):
        asked = torch.randint(0, VOCAB, (20 + 7 * q if q else 5,), generator=g).tolist()
        out += [(asked + torch.randint(0, VOCAB, (1 + 2 * c,), generator=g).tolist(), len(asked)) for c in range(choices)]
    return out


@pytest.mark.parametrize("head", [16, 8])
def test_shared_beginnings_change_no_number(head: int) -> None:
    """A completion that sees another completion, or a first token predicted from the wrong place."""
    model, requests = small.model(VOCAB, head=head), questions(5)
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(1)).tolist()
    found = Engine(model).score_top([requests[i] for i in order], 3)
    with torch.inference_mode():
        for i, scored in zip(order, found, strict=True):
            ids, start = requests[i]
            want = model.logits(Batch.of([ids]))[0].log_softmax(-1)[start - 1 : -1]
            np.testing.assert_allclose(scored.logprobs, want[torch.arange(len(want)), torch.tensor(ids[start:])], atol=1e-4)
            np.testing.assert_allclose(scored.top_logprobs, want.topk(3).values, atol=1e-4)
            assert scored.top_ids.tolist() == want.topk(3).indices.tolist()


def test_a_shared_beginning_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four choices that read their question four times."""
    model, requests = small.model(VOCAB), questions(5)[4:]
    read: list[int] = []
    forward = type(model).forward

    def counted(self: Any, batch: Batch, keep_layers: bool = False) -> Any:
        read.append(int((batch.segments != 0).sum()))
        return forward(self, batch, keep_layers)

    monkeypatch.setattr(type(model), "forward", counted)
    Engine(model).score(requests)
    asked = {tuple(ids[:start]) for ids, start in requests}
    assert sum(read) == sum(map(len, asked)) + sum(len(ids) - start - 1 for ids, start in requests)
