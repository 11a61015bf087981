"""Named tensors on disk: one safetensors file, or one a rank and an index.

`policy.safetensors` holds whole tensors. Of a sharded run, `policy-00001-of-00002.safetensors` and so on hold each rank's rows,
and `policy.safetensors.index.json` lists these files and the shape of every tensor:

    {"files": ["policy-00001-of-00002.safetensors", ...], "shapes": {"model.norm.weight": [2048], ...}}

A tensor is what the files have under its name, laid end to end along the first dimension in the order of the list. So it can be
read by any number of ranks, whole or in other shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tutelage import log
from tutelage.errors import ArtifactError
from tutelage.files import read_json, write_json
from tutelage.models.shard import is_shard, local
from tutelage.train import distributed


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes `path`, or where tensors are cut over ranks this rank's file beside it and the index. Every rank calls this; what
    is whole is written by rank 0."""
    held = {name: local(x.detach()) for name, x in tensors.items() if is_shard(x) or log.rank() == 0}
    own = {name: x.contiguous().cpu() for name, x in held.items()}
    if not any(is_shard(x) for x in tensors.values()):
        if log.rank() == 0:
            save_file(own, path)
        return
    files = [f"{path.stem}-{n + 1:05d}-of-{distributed.world():05d}.safetensors" for n in range(distributed.world())]
    save_file(own, path.with_name(files[log.rank()]))
    if log.rank() == 0:
        write_json(index_of(path), {"files": files, "shapes": {name: list(x.shape) for name, x in tensors.items()}})


def index_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.index.json")


@dataclass(frozen=True, slots=True)
class Saved:
    """Tensors that `write` wrote, read piece by piece."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    pieces: dict[str, list[Any]]  # of each tensor: the open files with rows of it, in order

    @classmethod
    def open(cls, path: Path) -> Saved:
        """Raises `ArtifactError` for files that are missing."""
        index: dict[str, Any] = read_json(index_of(path)) if index_of(path).exists() else {"files": [path.name]}
        missing = [name for name in index["files"] if not path.with_name(name).is_file()]
        if missing:
            raise ArtifactError(
                f"{len(missing)} of {len(index['files'])} files of a checkpoint are missing", file=path.parent,
                found=f"no {', '.join(missing[:3])}", fix="copy the whole checkpoint, or remove it to go on from the one before",
            )  # fmt: skip
        pieces: dict[str, list[Any]] = {}
        for name in index["files"]:
            try:
                file = safe_open(path.with_name(name), framework="pt")
            except SafetensorError as error:
                raise ArtifactError(
                    f"a checkpoint is damaged ({error})", file=path.with_name(name),
                    fix=f"remove {path.parent}: the run goes on from the checkpoint before it, or from its start",
                ) from error  # fmt: skip
            for key in file.keys():  # noqa: SIM118 (not a dict)
                pieces.setdefault(key, []).append(file)
        shapes = index.get("shapes") or {key: files[0].get_slice(key).get_shape() for key, files in pieces.items()}
        return cls(path, {key: tuple(shape) for key, shape in shapes.items()}, pieces)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some rows of it."""
        if not self.shapes[name]:
            return self.pieces[name][0].get_tensor(name)  # type: ignore[no-any-return]
        wanted = rows or slice(0, self.shapes[name][0])
        parts, at = [], 0
        for file in self.pieces[name]:
            piece = file.get_slice(name)
            size = piece.get_shape()[0]
            first, last = (min(max(place - at, 0), size) for place in (wanted.start, wanted.stop))
            parts.append(piece[first:last])
            at += size
        return torch.cat(parts)
