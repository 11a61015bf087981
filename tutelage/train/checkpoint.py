"""Checkpoints: safetensors and JSON, written whole or not at all. A resumed run continues bit for bit on CPU.

Every rank takes part in saving and loading. Where the model is sharded each writes its own rows (`tensors.py`), and a checkpoint
of any number of ranks, sharded or not, is loaded by any other.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tutelage import log
from tutelage.errors import ArtifactError
from tutelage.files import file_digest, files_below, read_object, readable_digest, write_json
from tutelage.models.shard import local, rows
from tutelage.train import distributed, tensors
from tutelage.train.optim import Optimizers

RNG = "rng.cpu"
PROGRESS = "progress.json"
DIGESTS = "digests.json"  # of a folder with weights alone


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
    """Writes `folder/step_000100/`; into its progress.json the digests of the other files, and of itself."""
    target = folder / f"step_{progress.step:06d}"
    with distributed.whole_folder(target, partial(_write_progress, asdict(progress))) as out:
        _write_parts(out, parts)
        tensors.write(out / "optimizer.safetensors", {**optimizers.state_tensors(), RNG: torch.get_rng_state()})
    return target


def _write_progress(progress: dict[str, Any], folder: Path) -> None:
    row = json.loads(json.dumps({**progress, "files": _digests(folder)}))  # as it will be read: keys are text
    write_json(folder / PROGRESS, {**row, "digest": _digest(row)})


def _digests(folder: Path) -> dict[str, str]:
    return {name: file_digest(file) for name, file in files_below(folder).items() if name not in (PROGRESS, DIGESTS)}


def _digest(row: dict[str, Any]) -> str:
    covered = {k: v for k, v in row.items() if k not in ("digest", "seconds")}  # whatever the clock says, equal runs are equal
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def save_parts(folder: Path, parts: dict[str, nn.Module]) -> None:
    """Writes the weights alone, with their digests."""
    with distributed.whole_folder(folder, lambda out: write_json(out / DIGESTS, {"files": _digests(out)})) as out:
        _write_parts(out, parts)


def load_parts(folder: Path, parts: dict[str, nn.Module]) -> None:
    """Restores in place what `save_parts` wrote. Raises `ArtifactError` where it is not that any more."""
    if (folder / DIGESTS).exists():
        _check_files(folder, read_object(folder / DIGESTS, FIX))
    for name, part in trained(parts).items():
        load_weights(folder / f"{name}.safetensors", part)


def trained(parts: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The parts of which anything is trained: the others are as they were loaded."""
    return {name: part for name, part in parts.items() if any(p.requires_grad for p in part.parameters())}


def _write_parts(out: Path, parts: dict[str, nn.Module]) -> None:
    for name, part in trained(parts).items():
        tensors.write(out / f"{name}.safetensors", _unique(part))


FIX = "copy it back; or start the run again with --force"


def steps_in(folder: Path) -> Iterator[tuple[int, Path]]:
    """(step, checkpoint), the newest first."""
    found = [(int(p.name[5:]), p) for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    yield from sorted(((step, p) for step, p in found if (p / PROGRESS).exists()), reverse=True)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, if any, whole or not."""
    return next((path for _, path in steps_in(folder)), None)


def latest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose content is that which was written, the same on every rank; None where there is none at all.
    Says which ones it passes over. Raises `ArtifactError` where all are damaged."""
    step, error = -1, None
    for step, path in steps_in(folder) if log.rank() == 0 else ():  # the others need not read all of it too
        try:
            check(path)
            break
        except ArtifactError as found:
            log.say(f"{found.file}: {found.message}; {path.name} is passed over", style="yellow")
            error, step = error or found, -2
    agreed = int(distributed.sum_values({"step": step if log.rank() == 0 else 0})["step"])
    if agreed == -2:
        raise error or ArtifactError("no checkpoint of this run is whole", file=folder, fix=FIX)
    return None if agreed == -1 else folder / f"step_{agreed:06d}"


def check(path: Path) -> None:
    """Raises `ArtifactError` where the files of a checkpoint are not those that were written. Older ones have no digests."""
    row = read_progress(path)
    if "files" in row:
        _check_files(path, row)


def read_progress(path: Path) -> dict[str, Any]:
    """The object in the progress.json of a checkpoint. Raises `ArtifactError` for a damaged one."""
    row = read_object(path / PROGRESS, FIX)
    if "digest" in row and row["digest"] != _digest(row):
        raise ArtifactError("this file is not as it was written", file=path / PROGRESS, fix=FIX)
    return row


def _check_files(folder: Path, row: dict[str, Any]) -> None:
    for name, digest in row["files"].items():
        file = folder / name
        if not file.is_file():
            raise ArtifactError("a file of a checkpoint is missing", file=file, fix=FIX)
        if readable_digest(file) != digest:
            raise ArtifactError("this file is not as it was written", file=file, fix=FIX)


def load(path: Path, parts: dict[str, nn.Module], optimizers: Optimizers) -> Progress:
    """Restores everything in place. Raises `ArtifactError` for a checkpoint of another model."""
    row = read_progress(path)
    for name, part in trained(parts).items():
        load_weights(path / f"{name}.safetensors", part)
    state = tensors.Saved.open(path / "optimizer.safetensors")
    torch.set_rng_state(state.read(RNG))
    optimizers.load_state_tensors({n: state.read(n, optimizers.rows(n)) for n in state.shapes if n != RNG})
    return Progress(**{f.name: row[f.name] for f in fields(Progress) if f.name in row})


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
    for old in [*(path for _, path in list(steps_in(folder))[keep:]), *folder.glob(".step_*")]:
        shutil.rmtree(old, ignore_errors=True)


def drop_after(folder: Path, step: int) -> None:
    """Removes the checkpoints after `step`: damaged ones, which a run that goes on from here makes again."""
    for later, path in list(steps_in(folder)):
        if later > step:
            shutil.rmtree(path)
            log.say(f"{path.name} is removed: it is made again on the way")


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
