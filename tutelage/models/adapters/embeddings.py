"""Embeddings and output matrix, trained in full with an adapter: a base that never read the control tokens of a chat template, or
texts like those that it is to learn, has rows for them that no change of its layers makes up for.

They are `peft`'s `modules_to_save`. Tied tables are one here, and are written under both names, as `peft` holds them apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tutelage.models.adapters.host import host_of


def train_tables(model: Any, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Lets the tables be trained, all of them or those of `names`, and gives copies of what they are now."""
    found = host_of(model).token_tables()
    out: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name in found if names is None else names:
        table = found[name].requires_grad_(True)
        out[name] = copies.setdefault(id(table), table.detach().clone())
    return out


@contextmanager
def base_tables(model: Any, base: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with the tables of its base, inside."""
    found = host_of(model).token_tables() if base else {}
    tables = {id(found[name]): (found[name], copy) for name, copy in base.items()}
    trained = [(table, table.data) for table, _ in tables.values()]
    for table, copy in tables.values():
        table.data = copy.to(table.device, table.dtype)
    try:
        yield
    finally:
        for table, own in trained:
            table.data = own


@torch.no_grad()
def put_tables(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Writes tables by name into the model, to be trained on, and gives copies of what they were. Raises `ValueError` for what
    the model has no place for: other shapes, or two tables where it has one."""
    found = host_of(model).token_tables()
    for name, value in tensors.items():
        if name not in found or found[name].shape != value.shape:
            expected = list(found[name].shape) if name in found else " and ".join(found)
            raise ValueError(f"{name} {list(value.shape)}, where the model has {expected}")
        alike = [n for n, table in found.items() if table is found[name]]
        if any(n not in tensors or not torch.equal(tensors[n], value) for n in alike):
            raise ValueError(f"{' and '.join(alike)} are one table in this model, and two in the adapter")
    before = train_tables(model, tensors)
    for name, value in tensors.items():
        found[name].copy_(value)
    return before
