"""Prompt groups of answers as batches: whatever the layout, an objective sees the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import tiny
from tutelage.data.groups.groups import Completion, PromptGroup, bins, collate
from tutelage.models.config import DecoderConfig
from tutelage.models.init import build
from tutelage.objectives import objective
from tutelage.objectives.answers import token_logprobs

SHAPE = tiny.shape(vocab_size=100, intermediate_size=64)


@pytest.fixture(scope="module")
def model():
    return build(DecoderConfig.from_hf(SHAPE), 0)


def prompt_groups(count: int = 4, masked: bool = False) -> list[PromptGroup]:
    rng = np.random.default_rng(1)

    def completion() -> Completion:
        ids = rng.integers(0, 100, rng.integers(2, 9))
        mask = rng.integers(0, 2, len(ids)).astype(np.uint8) if masked else None
        return Completion(ids, mask, {"old": rng.normal(size=len(ids))}, {"reference": float(rng.normal() - 20)})

    return [PromptGroup(f"r{i}", rng.integers(0, 100, rng.integers(1, 20)), (completion(), completion())) for i in range(count)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_every_layout_gives_one_loss_and_one_gradient(model, layout, masked):
    """Guards against packing that leaks: prompts read once and shared give what padded rows of their own give."""
    found = {}
    for how in ("tree", layout):
        model.zero_grad()
        terms = objective("dpo", beta=0.5)({"policy": model}, collate(prompt_groups(masked=masked), how))
        terms["loss"].sum.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found[how] = terms["loss"].sum.item(), gradient
    assert found["tree"][0] == pytest.approx(found[layout][0], abs=1e-5)
    torch.testing.assert_close(found["tree"][1], found[layout][1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["tree", "packed", "rows"])
def test_logprobs_are_those_of_each_text_alone(model, layout):
    """Against a plain forward pass over each text by itself; only what the mask names is scored, in order, with its streams."""
    made = prompt_groups(masked=True)
    batch = collate(made, layout)
    got = token_logprobs(model, batch)
    expected, streams = [], []
    for prompt_group in made:
        for completion in prompt_group.completions:
            text = torch.from_numpy(np.concatenate([prompt_group.prompt, completion.ids]))[None]
            plain = replace(batch, ids=text, segments=torch.ones_like(text, dtype=torch.int32), tree=None,
                            positions=torch.arange(text.shape[1])[None], answers=None)  # fmt: skip
            rows = model.logits(plain).log_softmax(-1)[0]
            for at in np.flatnonzero(completion.mask):
                expected.append(rows[len(prompt_group.prompt) + at - 1, completion.ids[at]])
                streams.append(completion.tokens["old"][at])
    torch.testing.assert_close(got, torch.stack(expected), atol=1e-5, rtol=0)
    np.testing.assert_allclose(batch.answers.tokens["old"].numpy(), np.array(streams), rtol=1e-6)
    last = [(f.prompt.tolist() + e.ids.tolist())[-1] for f in made for e in f.completions]
    assert batch.ids.flatten()[batch.answers.last_position].tolist() == last


def test_bins_fit_and_every_rank_has_as_many():
    """Guards against ranks that wait for one another: sharded models run their layers equally often on each."""
    sizes = [5, 3, 9, 2, 2, 1, 7]
    for ranks in (1, 2, 3):
        groups = bins(sizes, 10, ranks)
        assert len({len(g) for g in groups}) == 1
        assert sorted(i for rank in groups for g in rank for i in g) == list(range(len(sizes)))
        assert all(g and sum(sizes[i] for i in g) <= 10 for rank in groups for g in rank)
        assert all(i % ranks == rank for rank, own in enumerate(groups) for g in own for i in g)
    assert bins([50, 1], 10) == [[[0], [1]]]  # a prompt group larger than the room goes alone
