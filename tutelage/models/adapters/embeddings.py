"""The tables of tokens, trained whole beside an adapter: a base that never read the control tokens of a chat template, or texts
like those that it is to learn, has rows for them that no change of its layers makes up for.

They are `peft`'s `modules_to_save`. Tied tables are one here, and are written under both names, as `peft` holds them apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.models import families
from tutelage.models.decoder import Decoder
from tutelage.models.names import stored


def token_tables(model: Any) -> dict[str, nn.Parameter]:
    """The tables [V,H] by their modules' names on disk: what tokens are read by, and what they are written by where there is such
    a head; the same parameter twice where they are tied."""
    if not isinstance(model, Decoder):
        wanted: tuple[Any, ...] = (model.hf.get_input_embeddings(), model.hf.get_output_embeddings())
        return {name: m.weight for name, m in model.hf.named_modules() if any(m is w for w in wanted)}
    ours: dict[str, Any] = {"model.embed_tokens.weight": model.model.embed_tokens.weight}
    if hasattr(model, "lm_head"):
        ours["lm_head.weight"] = model.lm_head.weight
    rows = stored(families.family(model.config.model_type).disk, list(ours))
    return {row.name.removesuffix(".weight"): ours[row.ours[0]] for row in rows}


def train_tables(model: Any, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Lets the tables be trained, all of them or those of `names`, and gives copies of what they are now."""
    found = token_tables(model)
    out: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name in found if names is None else names:
        table = found[name].requires_grad_(True)
        out[name] = copies.setdefault(id(table), table.detach().clone())
    return out


@contextmanager
def base_tables(model: Any, base: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with the tables of its base, inside."""
    found = token_tables(model) if base else {}
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
    found = token_tables(model)
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
