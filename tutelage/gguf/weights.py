"""The tensors of a GGUF file as those of a Hugging Face folder."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutelage.errors import ArtifactError
from tutelage.gguf.architecture import Stored, tensors_of
from tutelage.gguf.dequantize import dequantize
from tutelage.gguf.reader import AGAIN, Gguf


class GgufTensors:
    """float32 tensors under Hugging Face's names, unpacked one at a time. A context manager: the file is mapped within."""

    copies = True

    def __init__(self, file: Gguf) -> None:
        self.gguf, self.stored = file, tensors_of(file)
        self._data: Tensor | None = None

    def __enter__(self) -> GgufTensors:
        with self.gguf.path.open("rb") as f:
            # Copy on write: torch wants a buffer that could be written to, and nothing here does.
            self._data = torch.frombuffer(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        last = max((row.place.start + row.place.size for row in self.stored.values()), default=0)
        if len(self._data) < last:
            raise ArtifactError("the file has become shorter", file=self.gguf.path, fix=AGAIN)
        return self

    def __exit__(self, *_: Any) -> None:
        self._data = None

    def names(self) -> list[str]:
        return list(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored[name].place.shape

    def file(self, name: str) -> Path:
        return self.gguf.path

    def tensor(self, name: str) -> Tensor:
        """Values of their own. Raises `ArtifactError` where some are not finite."""
        assert self._data is not None, "used outside its block"
        row = self.stored[name]
        place = row.place
        values = dequantize(self._data[place.start : place.start + place.size], place.type).view(place.shape)
        if not values.sum().isfinite() and not values.isfinite().all():
            raise ArtifactError(
                "a damaged GGUF file: values that are not finite", file=self.gguf.path, field=place.name, fix=AGAIN
            )
        return _hugging_face(values, row)


def _hugging_face(values: Tensor, row: Stored) -> Tensor:
    if row.offset:
        return values.add_(row.offset)
    if row.heads:  # [heads, width/2, 2, ..] -> [heads, 2, width/2, ..]: the halves of a head turn together
        return values.unflatten(0, (row.heads, -1, 2)).transpose(1, 2).reshape(values.shape)
    return values
