"""Checkpoints: safetensors and JSON, written whole or not at all. A resumed run continues bit for bit on CPU.

Every rank takes part in saving and loading. Where the model is sharded each writes its own rows (`tensors.py`), and a checkpoint
of any number of ranks, sharded or not, is loaded by any other.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tutelage import log
from tutelage.errors import ArtifactError
from tutelage.files import read_json, write_json
from tutelage.models.shard import local, rows
from tutelage.train import distributed, tensors
from tutelage.train.optim import Optimizers

RNG = "rng.cpu"


@dataclass(slots=True)
class Progress:
    """Where a run stands; with weights and optimizer state it is all that a resumed run needs."""

    step: int = 0  # steps done
    tokens: int = 0  # tokens processed, padding left out
    seconds: float = 0.0  # spent in steps, over all attempts
    flops: float = 0.0
    loss: float | None = None  # of the last step
    source: dict[str, Any] = field(default_factory=dict)  # the batch source's state
    hooks: dict[str, Any] = field(default_factory=dict)  # the hooks' states
    identity: str = ""  # digest of what may not change between attempts


def save(folder: Path, parts: dict[str, nn.Module], optimizers: Optimizers, progress: Progress) -> Path:
    """Writes `folder/step_000100/`."""
    target = folder / f"step_{progress.step:06d}"
    with distributed.whole_folder(target) as out:
        _write_parts(out, parts)
        tensors.write(out / "optimizer.safetensors", {**optimizers.state_tensors(), RNG: torch.get_rng_state()})
        if log.rank() == 0:
            write_json(out / "progress.json", asdict(progress))
    return target


def save_parts(folder: Path, parts: dict[str, nn.Module]) -> None:
    """Writes the weights alone."""
    with distributed.whole_folder(folder) as out:
        _write_parts(out, parts)


def trained(parts: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The parts of which anything is trained: the others are as they were loaded."""
    return {name: part for name, part in parts.items() if any(p.requires_grad for p in part.parameters())}


def _write_parts(out: Path, parts: dict[str, nn.Module]) -> None:
    for name, part in trained(parts).items():
        tensors.write(out / f"{name}.safetensors", _unique(part))


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, if any."""
    return max((p for p in folder.glob("step_*") if (p / "progress.json").exists()), key=_step, default=None)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def load(path: Path, parts: dict[str, nn.Module], optimizers: Optimizers) -> Progress:
    """Restores everything in place. Raises `ArtifactError` for a checkpoint of another model."""
    for name, part in trained(parts).items():
        load_weights(path / f"{name}.safetensors", part)
    state = tensors.Saved.open(path / "optimizer.safetensors")
    torch.set_rng_state(state.read(RNG))
    optimizers.load_state_tensors({n: state.read(n, optimizers.rows(n)) for n in state.shapes if n != RNG})
    return Progress(**read_json(path / "progress.json"))


def load_weights(path: Path, part: nn.Module) -> None:
    saved, own = tensors.Saved.open(path), _unique(part)
    for name, tensor in own.items():
        if saved.shapes.get(name) != tuple(tensor.shape):
            raise ArtifactError(
                f"the checkpoint does not fit the model at `{name}`",
                file=path,
                found=saved.shapes.get(name, "no such tensor"),
                expected=str(tuple(tensor.shape)),
                fix="resume with the same model settings, or start a new run with --force",
            )
    with torch.no_grad():
        for name, tensor in own.items():
            local(tensor).copy_(saved.read(name, rows(tensor)))


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what a killed process left of one."""
    for old in [*sorted(folder.glob("step_*"), key=_step)[:-keep], *folder.glob(".step_*")]:
        shutil.rmtree(old, ignore_errors=True)


def _unique(part: nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters and persistent buffers, a shared tensor once; of a sharded part the rows that stay on this rank. What is
    frozen is as the run's inputs have it."""
    out: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in part.state_dict(keep_vars=True).items():
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if id(tensor) not in seen and not frozen:
            seen.add(id(tensor))
            out[name] = tensor
    return out
