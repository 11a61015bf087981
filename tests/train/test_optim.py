"""Parameter groups: what is decayed, what is trained by what, and state by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.guarantees import tiny
from tutelage.config.train import Optimizer
from tutelage.train.muon import Muon
from tutelage.train.optim import LearningRates, Optimizers, groups

RATES = LearningRates(lr=0.1, matrix_lr=0.2, embedding_lr=0.3)


def settings_of(optimizers: Optimizers) -> dict[str, tuple[str, float, float]]:
    """name -> (optimizer, learning rate, weight decay)."""
    out = {}
    for opt in optimizers.all:
        for group in opt.param_groups:
            for p in group["params"]:
                name = optimizers.names[id(p)]
                assert name not in out, f"{name} is trained twice"
                out[name] = (type(opt).__name__, group["lr"], group["weight_decay"])
    return out


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_matrices_alone_are_decayed(name, tied):
    """Guards against decay of norms and embeddings, Muon on the embedding or head, and a tied head that is stepped twice."""
    model = tiny.model(tie_word_embeddings=tied)
    found = settings_of(Optimizers({"policy": model}, Optimizer(name=name, weight_decay=0.07), RATES))
    assert sorted(found) == sorted(f"policy.{n}" for n, _ in model.named_parameters())
    assert ("policy.lm_head.weight" in found) == (not tied)
    for tensor, (optimizer, lr, decay) in found.items():
        if "embed" in tensor or "lm_head" in tensor:
            assert (optimizer, lr, decay) == ("AdamW", 0.3, 0.0)
        elif "norm" in tensor:
            assert (optimizer, lr, decay) == ("AdamW", 0.1, 0.0)
        else:
            expected = ("Muon", 0.2, 0.07) if name == "muon" else ("AdamW", 0.1, 0.07)
            assert (optimizer, lr, decay) == expected


def test_a_tensor_that_parts_share_is_stepped_once():
    """Guards against two updates a step of a table that a second part (a reward head's model, a draft) has in common."""
    model = tiny.model()
    second = nn.Module()
    second.embed = model.model.embed_tokens
    optimizers = Optimizers({"policy": model, "second": second}, Optimizer(), RATES)
    assert len(settings_of(optimizers)) == len(list(model.named_parameters()))


def test_frozen_parameters_are_in_no_group():
    """Guards against weight decay on frozen tensors."""
    model = tiny.model()
    model.model.embed_tokens.weight.requires_grad_(False)
    assert not any("embed" in name for rows in groups({"policy": model}).values() for name, _ in rows)


def test_the_schedule_moves_every_group():
    """Guards against a learning rate that decays for one optimizer only."""
    optimizers = Optimizers({"policy": tiny.model()}, Optimizer(), RATES)
    optimizers.set_factor(0.5)
    optimizers.set_factor(0.25)
    assert sorted({lr for _, lr, _ in settings_of(optimizers).values()}) == pytest.approx([0.025, 0.05, 0.075])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_by_name_brings_an_optimizer_back(name):
    """Guards against moments that are loaded for another parameter: after loading, the next step is the same bits."""

    def stepped(model: nn.Module, optimizers: Optimizers, seed: int) -> None:
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizers.step()
        assert all(p.grad is None for p in model.parameters())

    first, second = tiny.model(), tiny.model()
    one, two = (Optimizers({"policy": m}, Optimizer(name=name), RATES) for m in (first, second))
    stepped(first, one, 1)
    second.load_state_dict(first.state_dict())
    two.load_state_tensors(one.state_tensors())
    stepped(first, one, 2)
    stepped(second, two, 2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert any(isinstance(o, Muon) for o in one.all) == (name == "muon")
