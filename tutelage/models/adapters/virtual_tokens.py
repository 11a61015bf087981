"""Virtual tokens before every text: prompt tuning (Lester et al. 2021, arXiv:2104.08691) trains their embeddings, prefix tuning
(Li and Liang 2021, arXiv:2101.00190) their keys and values in every layer.

They are the same for all texts, so that a batch reads them once: it becomes a tree whose texts all begin with them.

Shapes: P virtual tokens, N tokens of the batch, H hidden width, L layers, Hkv key-value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.models.interface import Batch, Tree


class VirtualTokens(nn.Module):
    def __init__(self, values: Tensor, layers: int, heads: int) -> None:
        super().__init__()
        self.values = nn.Parameter(values)  # [P,H]; of a prefix [P, L*2*Hkv*D]: keys, then values of each layer
        self.layers, self.heads = layers, heads  # 0 layers: a prompt
        self.disabled = False

    def __len__(self) -> int:
        return len(self.values)

    @property
    def is_prefix(self) -> bool:
        return self.layers > 0

    def keys_and_values(self, dtype: torch.dtype) -> Tensor:
        """[L,2,P,Hkv,D]. The keys are what attention sees: no norm and no position touches them."""
        split = self.values.to(dtype).view(len(self), self.layers, 2, self.heads, -1)
        return split.permute(1, 2, 0, 3, 4)


@dataclass(frozen=True, eq=False)
class Prefix:
    """Where the virtual tokens of a prefix are among the places that attention runs over, and their keys and values."""

    tensors: Tensor  # [L,2,P,Hkv,D]
    virtual: Tensor  # [E] bool
    which: Tensor  # [E] int64: the virtual token; any number at other places

    @classmethod
    def of(cls, tokens: VirtualTokens, index: Tensor, dtype: torch.dtype) -> Prefix:
        return cls(tokens.keys_and_values(dtype), index < len(tokens), index.clamp(max=len(tokens) - 1))

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v [1,E,Hkv,D] with the prefix in them."""
        mask = self.virtual[None, :, None, None]
        own = self.tensors[layer].index_select(1, self.which)
        return torch.where(mask, own[0], k), torch.where(mask, own[1], v)


def count_virtual(model: Any) -> int:
    """Virtual tokens of a model's adapter."""
    return 0 if model.virtual is None else len(model.virtual)


def max_text_tokens(model: Any) -> int:
    """Tokens that a text may have: the model's context, less the virtual tokens before it."""
    return int(model.config.max_position_embeddings) - model.traits.virtual_tokens  # type: ignore[no-any-return]


def max_source_target_tokens(model: Any) -> tuple[int, int]:
    """Tokens that a source and a target of an encoder-decoder may have: a prompt comes before its sources, a prefix before its
    targets."""
    context, left = int(model.config.max_position_embeddings), max_text_tokens(model)
    return (left, context) if model.traits.virtual_sources else (context, left)


def with_virtual(batch: Batch, count: int) -> Batch:
    """The batch as one row [1, P + N], the virtual tokens first and each text after them: a tree. Padding stays in the row, as
    tokens of no text."""
    flat = {name: getattr(batch, name).reshape(1, -1) for name in ("ids", "segments", "positions", "targets", "weights")}
    total = flat["ids"].shape[1]
    if batch.tree is None:
        places = batch.segments.reshape(-1).nonzero().squeeze(1)
        owner = _numbered(batch.segments)[places]
    else:
        places, owner = batch.tree.index, batch.tree.segments[0].long() - 1
    sizes = owner.bincount()
    starts = torch.cat((sizes.new_zeros(1), (sizes + count).cumsum(0)))
    place = torch.arange(len(owner), device=owner.device) + (owner + 1) * count  # of each token among the texts
    length = int(starts[-1])
    index = torch.empty(length, dtype=torch.int64, device=owner.device)
    index[place] = places + count
    virtual = torch.arange(count, device=owner.device)
    index[starts[:-1, None] + virtual] = virtual.expand(len(sizes), count)
    segments = torch.empty(1, length, dtype=torch.int32, device=owner.device)
    segments[0] = torch.repeat_interleave(torch.arange(1, len(sizes) + 1, device=owner.device), sizes + count).int()
    back = torch.zeros(count + total, dtype=torch.int64, device=owner.device)  # padding takes what is at the first place
    back[index] = torch.arange(length, device=owner.device)
    before: dict[str, Tensor] = {
        "ids": torch.zeros(1, count, dtype=torch.int64), "segments": torch.ones(1, count, dtype=torch.int32),
        "positions": torch.arange(count)[None], "targets": torch.zeros(1, count, dtype=torch.int64),
        "weights": torch.zeros(1, count),
    }  # fmt: skip
    flat["positions"] = flat["positions"] + count
    joined: dict[str, Any] = {name: torch.cat((before[name].to(x.device, x.dtype), x), 1) for name, x in flat.items()}
    return replace(batch, **joined, tree=Tree(index, segments, back), rows=None)


def _numbered(segments: Tensor) -> Tensor:
    """[B*T]: the number of each token's segment, from 0, over all rows; of padding any."""
    real = segments != 0
    first = torch.ones_like(real)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return (first & real).reshape(-1).long().cumsum(0) - 1
