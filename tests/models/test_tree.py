"""Texts that share their beginnings in one forward pass: the same hidden states, and the same gradients, as text by text."""

from __future__ import annotations

import pytest
import torch

from tests.models.shapes import CASES
from tutelage.models import kernels
from tutelage.models.config import DecoderConfig
from tutelage.models.init import build
from tutelage.models.interface import Batch

GROUPS = [([5, 9, 40, 3], [[77, 12], [8, 60, 31, 2], []]), ([90, 14], []), ([22, 7, 1, 55, 48], [[19], [33, 70, 6]])] * 4


def texts() -> list[list[int]]:
    return [beginning + completion for beginning, completions in GROUPS for completion in completions or [[]]]


def places() -> list[list[int]]:
    """For each text the places of its tokens in the row."""
    out, first = [], 0
    for beginning, completions in GROUPS:
        at = first + len(beginning)
        for completion in completions or [[]]:
            out.append([*range(first, first + len(beginning)), *range(at, at + len(completion))])
            at += len(completion)
        first = at
    return out


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("case", ["qwen3", "gemma3", "gpt2", "olmo2", "mistral"])
def test_a_tree_equals_its_texts(case: str, compiled: bool) -> None:
    """A completion that sees its sibling, a position counted on from it, a gradient that a shared token gets once."""
    model = build(DecoderConfig.from_hf(CASES[case]), 1)
    batch = Batch.of_groups(GROUPS)
    assert batch.tree is not None and batch.shape[1] == sum(len(b) + sum(map(len, e)) for b, e in GROUPS)
    torch.manual_seed(0)
    pull = {i: torch.randn(len(t), model.config.hidden_size) for i, t in enumerate(texts())}

    def gradients() -> list[torch.Tensor]:
        out = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return out

    def run() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        hidden = model(batch).hidden[0]
        states = [hidden[torch.tensor(at)] for at in places()]
        sum((s * pull[i]).sum() for i, s in enumerate(states)).backward()  # type: ignore[union-attr]
        return [s.detach() for s in states], gradients()

    if compiled:
        got, got_gradients = run()
    else:
        with kernels.disabled():
            got, got_gradients = run()
    want = []
    for i, text in enumerate(texts()):
        hidden = model(Batch.of([text])).hidden[0]
        (hidden * pull[i]).sum().backward()
        want.append(hidden.detach())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    for a, b in zip(got_gradients, gradients(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4 * max(1, float(b.abs().max())), rtol=1e-3)


def test_families_of_one_need_no_tree() -> None:
    batch = Batch.of_groups([([5, 9], []), ([3], [[4, 7]])])
    assert batch.tree is None and batch.segments.tolist() == [[1, 1, 2, 2, 2]] and batch.positions.tolist() == [[0, 1, 0, 1, 2]]
