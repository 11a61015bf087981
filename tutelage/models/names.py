"""Tensor names and shapes on disk against those in memory, by the rules in `families.yaml`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tutelage.models.families import DiskLayout, Rule


@dataclass(slots=True, frozen=True)
class Stored:
    """One tensor on disk and the tensors in memory that it holds."""

    name: str  # on disk
    ours: tuple[str, ...]  # several: laid end to end along their first dimension
    transpose: bool

    def shape(self, shapes: Mapping[str, torch.Size]) -> tuple[int, ...]:
        """Its shape on disk, from those in memory."""
        first = shapes[self.ours[0]]
        whole = (sum(shapes[n][0] for n in self.ours), *first[1:])
        return whole[::-1] if self.transpose else whole

    def split(self, tensor: Tensor, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """The tensors in memory that `tensor` holds."""
        whole = tensor.t() if self.transpose else tensor
        yield from zip(self.ours, whole.split([shapes[n][0] for n in self.ours]), strict=True)

    def join(self, get: Callable[[str], Tensor]) -> Tensor:
        """The tensor to store, contiguous."""
        parts = [get(n) for n in self.ours]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (whole.t() if self.transpose else whole).contiguous()


def stored(disk: DiskLayout, names: list[str]) -> list[Stored]:
    """What a file has to hold for the tensors `names` in memory, in their order."""
    out: dict[str, Stored] = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        row = next((r for r in (_match(rule, module, kind) for rule in disk.rules) if r), Stored(name, (name,), False))
        out.setdefault(row.name, row)
    return list(out.values())


def _match(rule: Rule, module: str, kind: str) -> Stored | None:
    for pattern in rule.ours:
        found = re.fullmatch(re.escape(pattern).replace(r"\*", r"(\d+)"), module)
        if found:
            layer = found.group(1) if found.groups() else ""
            ours = tuple(f"{p.replace('*', layer)}.{kind}" for p in rule.ours)
            return Stored(f"{rule.disk.replace('*', layer)}.{kind}", ours, rule.transpose and kind == "weight")
    return None
