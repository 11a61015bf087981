"""Checkpoints: everything comes back, nothing half-written counts, old ones go."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.guarantees import tiny
from tutelage.config.train import Optimizer
from tutelage.errors import ArtifactError
from tutelage.train import checkpoint
from tutelage.train.checkpoint import Progress
from tutelage.train.optim import Optimizers


def made(seed: int = 0, **shape) -> tuple[dict[str, nn.Module], Optimizers]:
    parts: dict[str, nn.Module] = {"policy": tiny.model(seed, **shape)}
    return parts, Optimizers(parts, Optimizer(), tiny.RATES)


def stepped(parts: dict[str, nn.Module], optimizers: Optimizers) -> None:
    for p in optimizers.params:
        p.grad = torch.full_like(p, 0.5)
    optimizers.step()


def test_everything_comes_back(tmp_path):
    """Guards against a checkpoint without optimizer state, random state, progress, or what hooks and source keep."""
    parts, optimizers = made()
    stepped(parts, optimizers)
    progress = Progress(3, 70, 1.5, 9.0, 2.25, {"seed": 1}, {"early": {"bad": 1}}, "id")
    torch.manual_seed(11)
    path = checkpoint.save(tmp_path, parts, optimizers, progress)
    drawn = torch.rand(3)
    again, others = made(seed=4)
    torch.manual_seed(12)
    assert checkpoint.load(path, again, others) == progress
    assert torch.equal(torch.rand(3), drawn)
    pairs = zip(parts["policy"].parameters(), again["policy"].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    state, restored = optimizers.state_tensors(), others.state_tensors()
    assert state.keys() == restored.keys() and all(torch.equal(state[k], restored[k]) for k in state)
    assert path.name == "step_000003" and not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.pkl"))


def test_a_tied_head_is_stored_once(tmp_path):
    """Guards against safetensors' refusal of shared memory, and against a head that is no longer tied after loading."""
    parts, _ = made()
    checkpoint.save_parts(tmp_path / "best", parts)
    names = load_file(tmp_path / "best" / "policy.safetensors")
    assert ("model.embed_tokens.weight" in names) != ("lm_head.weight" in names)
    again, _ = made(seed=3)
    checkpoint.load_weights(tmp_path / "best" / "policy.safetensors", again["policy"])
    model = again["policy"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, parts["policy"].lm_head.weight)


def test_the_newest_whole_one_is_found_by_number(tmp_path):
    """Guards against order by name (step 1000000 comes before 999999) and a folder without progress, which is not whole."""
    parts, optimizers = made()
    for step in (999_999, 1_000_000):
        checkpoint.save(tmp_path, parts, optimizers, Progress(step))
    (tmp_path / "step_1000001").mkdir()
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.name == "step_1000000"
    assert checkpoint.latest(tmp_path / "nothing") is None


def test_only_the_newest_are_kept(tmp_path):
    """Guards against a disk that fills, and against removing the newest."""
    parts, optimizers = made()
    for step in (8, 9, 10, 11):
        checkpoint.save(tmp_path, parts, optimizers, Progress(step))
        checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000010", "step_000011"]


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    """Guards against loading what happens to fit and leaving the rest at random."""
    parts, optimizers = made()
    path = checkpoint.save(tmp_path, parts, optimizers, Progress(1))
    with pytest.raises(ArtifactError, match="does not fit the model at"):
        checkpoint.load(path, *made(intermediate_size=64))
    with pytest.raises(ArtifactError, match="no such tensor"):
        checkpoint.load(path, *made(num_hidden_layers=3))


def test_a_failed_save_leaves_the_last_one(tmp_path, monkeypatch):
    """Guards against a torn checkpoint where a whole one was."""
    parts, optimizers = made()
    checkpoint.save(tmp_path, parts, optimizers, Progress(1))

    def full(*args, **kwargs):
        raise OSError("no space")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path, parts, optimizers, Progress(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path):
    """A library's traceback that names no file, in front of someone whose disk was full."""
    parts, optimizers = made()
    path = checkpoint.save(tmp_path, parts, optimizers, Progress(step=3))
    weights = path / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="damaged") as caught:
        checkpoint.load(path, parts, optimizers)
    assert "policy.safetensors" in str(caught.value) and f"remove {path}" in str(caught.value)
