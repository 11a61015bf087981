"""One decoder layer, driven by the fields of DecoderConfig.

Projections are stored separately under their Hugging Face names. Several that read the same input run as one product of their
concatenated weights, made inside the step, adapters included. It is off for a projection that is anything but a plain
`nn.Linear` or an adapted one (hooks), and for few tokens, where copying weights costs more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.models import kernels, ops
from tutelage.models.adapters.linear import Adapted, product
from tutelage.models.adapters.virtual_tokens import Prefix
from tutelage.models.attention import Layout, attend, attend_cached, attend_qkv
from tutelage.models.config import DecoderConfig
from tutelage.models.interface import CacheView, Tree
from tutelage.models.rotary import Turns

FUSE_FROM = 64
"""Tokens from which concatenating weights costs less than it saves."""


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens of a batch go in the cache, and what of it they see; made once per batch."""

    view: CacheView
    row: Tensor  # [n] row of each token that is not padding
    column: Tensor  # [n]
    slot: Tensor  # [n] its slot
    place: Tensor  # [n] its place in the slot
    totals: Tensor  # [S] tokens in the slot after this call
    shift: Tensor | None  # [S] places of padding at the right of each row; None when there are none
    first: int | None  # first slot when the rows' slots follow each other: then a view does, without a copy
    longest: int  # places that have to be read
    fresh: bool  # every slot was empty: attention is among the rows' own tokens

    @classmethod
    def of(cls, view: CacheView, segments: Tensor) -> Places:
        if view.longest is not None:
            rows = torch.arange(len(view.slots), device=view.slots.device)
            return cls(
                view,
                rows,
                torch.zeros_like(rows),
                view.slots,
                view.lengths,
                view.lengths + 1,
                None,
                None,
                view.longest,
                fresh=False,
            )
        row, column = (segments != 0).nonzero().unbind(1)
        place = view.lengths[row] + column
        slots = view.slots.tolist()
        needed = int(place.max()) + 1 if len(place) else 0
        assert needed <= view.cache.length, f"{needed} tokens do not fit in a slot of {view.cache.length}"
        new = (segments != 0).sum(1)
        shift = segments.shape[1] - new
        totals = view.lengths + new
        in_order = slots == list(range(slots[0], slots[0] + len(slots)))
        return cls(
            view, row, column, view.slots[row], place, totals, shift if shift.any() else None,
            first=slots[0] if in_order else None, longest=int(totals.max()), fresh=not bool(view.lengths.any()),
        )  # fmt: skip

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        cache = self.view.cache
        for held, new in ((cache.k[layer], k), (cache.v[layer], v)):
            held[self.slot, self.place] = new[self.row, self.column].detach().to(held.dtype)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [S,L,Hkv,D] of the rows' slots, as long as the longest."""
        parts = (held[:, : self.longest] for held in (self.view.cache.k[layer], self.view.cache.v[layer]))
        if self.first is None:
            k, v = (part[self.view.slots] for part in parts)
        else:
            k, v = (part[self.first : self.first + len(self.view.slots)] for part in parts)
        return k, v

    def push(self, x: Tensor, back: bool = False) -> Tensor:
        """Moves each row's tokens to its right end, where `attend_cached` takes the newest tokens to be, or back."""
        if self.shift is None:
            return x
        step = self.shift if back else -self.shift
        at = (torch.arange(x.shape[1], device=x.device) + step[:, None]) % x.shape[1]
        return x[torch.arange(len(x), device=x.device)[:, None], at]


@dataclass(frozen=True, eq=False)
class Context:
    """What every layer of one forward pass needs in addition to its input."""

    layout: Layout | None  # None when attention reads the cache
    turns: Turns
    places: Places | None = None
    tree: Tree | None = None  # `layout` and `turns` are then of the texts, not of the tokens
    prefix: Prefix | None = None  # keys and values that an adapter puts before every text

    def spread(self, x: Tensor) -> Tensor:
        """From tokens [1,T,..] to what attention runs over."""
        return (
            x if self.tree is None else x.index_select(1, self.tree.index)
        )  # its gradient is made faster than that of x[:, index]

    def gather(self, x: Tensor) -> Tensor:
        """The way back."""
        return x if self.tree is None else x.index_select(1, self.tree.back)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float, unit_offset: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if unit_offset else torch.ones(width))
        self.eps, self.unit_offset = eps, unit_offset

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, self.unit_offset)


def make_norm(config: DecoderConfig, width: int) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(width, eps=config.norm_eps)
    return RMSNorm(width, config.norm_eps, config.norm_unit_offset)


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """True for a module that is its own parameters and nothing else: no subclass, no hooks."""
    return type(module) is kind and not module._forward_hooks and not module._forward_pre_hooks


def fusable(x: Tensor, parts: Sequence[nn.Module]) -> bool:
    many = x.numel() // x.shape[-1] >= FUSE_FROM
    return many and all(m.merges(x) if isinstance(m, Adapted) else is_plain(m) for m in parts)


def fused_linear(x: Tensor, norm: nn.Module | None, parts: Sequence[nn.Linear]) -> Tensor:
    """The outputs of fusable linear layers of norm(x) side by side, [.., sum of their widths], in one product."""
    if any(isinstance(m, Adapted) for m in parts):
        if norm is not None and is_plain(norm, RMSNorm) and kernels.fits(x, norm.weight):  # type: ignore[arg-type]
            return product(x, parts, norm=(norm.weight, norm.eps, norm.unit_offset))  # type: ignore[arg-type]
        return product(x if norm is None else norm(x), parts)
    weights = [m.weight for m in parts]
    bias = None if parts[0].bias is None else torch.cat([m.bias for m in parts])
    if norm is not None and is_plain(norm, RMSNorm):
        assert isinstance(norm, RMSNorm)
        return ops.norm_linear(x, norm.weight, norm.eps, weights, bias, norm.unit_offset)
    return F.linear(x if norm is None else norm(x), torch.cat(weights), bias)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        kind = config.layers[layer]
        self.layer, self.window, self.rope = layer, kind.window, kind.rope
        self.head_dim, self.softcap = config.head_dim, config.attention_softcap
        self.scale = config.attention_scale / (layer + 1 if config.scale_by_layer else 1)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.output_bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm != "none":
            whole = self.qk_norm == "full"
            self.q_norm = RMSNorm(queries if whole else self.head_dim, config.norm_eps, config.norm_unit_offset)
            self.k_norm = RMSNorm(keys if whole else self.head_dim, config.norm_eps, config.norm_unit_offset)

    def forward(self, x: Tensor, context: Context, norm: nn.Module | None = None) -> Tensor:
        """Attention of norm(x), [B,T,H] -> [B,T,H]."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        merges = context.places is None and context.layout is not None and context.prefix is None and self.qk_norm != "full"
        if merges and fusable(x, parts):
            assert context.layout is not None
            merged = self.merged(context.spread(fused_linear(x, norm, parts)), context.layout, context.turns)
            return self.o_proj(context.gather(merged))  # type: ignore[no-any-return]
        q, k, v = (context.spread(each) for each in self.project(x, norm))
        q, k = self.position(q, k, context.turns)
        if context.prefix is not None:
            k, v = context.prefix.put(self.layer, k, v)
        if context.places is not None:
            context.places.write(self.layer, k, v)
        if context.layout is not None:
            out = attend(q, k, v, context.layout, scale=self.scale, window=self.window, softcap=self.softcap)
        else:
            assert context.places is not None
            held_k, held_v = (x.to(q.dtype) for x in context.places.read(self.layer))
            q, totals = context.places.push(q), context.places.totals
            out = attend_cached(q, held_k, held_v, totals, scale=self.scale, window=self.window, softcap=self.softcap)
            out = context.places.push(out, back=True)
        return self.o_proj(context.gather(out).flatten(2))  # type: ignore[no-any-return]

    def merged(self, qkv: Tensor, layout: Layout, turns: Turns) -> Tensor:
        """Norms, positions and attention on a merged projection: nothing else is kept for the backward pass."""
        headed = self.qk_norm == "head"
        return attend_qkv(
            qkv, layout, (self.heads, self.kv_heads), scale=self.scale, window=self.window, softcap=self.softcap,
            norms=(self.q_norm.weight, self.k_norm.weight) if headed else None,
            eps=self.q_norm.eps if headed else 0.0, unit_offset=self.q_norm.unit_offset if headed else False,
            turns=None if self.rope is None else turns[self.rope],
        )  # fmt: skip

    def project(self, x: Tensor, norm: nn.Module | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,T,H] -> q [B,T,Hq,D], k and v [B,T,Hkv,D]."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        if fusable(x, parts):
            q, k, v = fused_linear(x, norm, parts).split([m.out_features for m in parts], -1)
        else:
            x = x if norm is None else norm(x)
            q, k, v = (m(x) for m in parts)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        return q.unflatten(-1, (-1, self.head_dim)), k.unflatten(-1, (-1, self.head_dim)), v.unflatten(-1, (-1, self.head_dim))

    def position(self, q: Tensor, k: Tensor, turns: Turns) -> tuple[Tensor, Tensor]:
        if self.rope is None:
            return (self.q_norm(q), self.k_norm(k)) if self.qk_norm == "head" else (q, k)
        cos, sin = turns[self.rope]
        if self.qk_norm != "head":
            return ops.rope(q, k, cos, sin)
        norm = self.q_norm
        return ops.qk_norm_rope(q, k, norm.weight, self.k_norm.weight, norm.eps, cos, sin, unit_offset=norm.unit_offset)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        wide, bias = config.intermediate_size, config.mlp_bias
        if config.gated:
            self.gate_proj = nn.Linear(config.hidden_size, wide, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, wide, bias=bias)
        self.down_proj = nn.Linear(wide, config.hidden_size, bias=bias)
        self.gated, self.activation = config.gated, config.activation

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """The MLP of norm(x), [B,T,H] -> [B,T,H]."""
        act = _ACTIVATIONS[self.activation]
        if not self.gated or not fusable(x, (self.gate_proj, self.up_proj)):
            x = x if norm is None else norm(x)
            wide = act(self.gate_proj(x)) * self.up_proj(x) if self.gated else act(self.up_proj(x))
            return self.down_proj(wide)  # type: ignore[no-any-return]
        gate_up = fused_linear(x, norm, (self.gate_proj, self.up_proj))
        if self.activation == "silu" and isinstance(self.down_proj, Adapted) and self.down_proj.merges(gate_up):
            if kernels.fits(gate_up):
                return product(gate_up, (self.down_proj,), gated=True)
        elif self.activation == "silu" and is_plain(self.down_proj):
            return ops.silu_mul_linear(gate_up, self.down_proj.weight, self.down_proj.bias)
        gate, up = gate_up.chunk(2, -1)
        return self.down_proj(act(gate) * up)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and MLP, each with a residual; the config says where norms are."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.norms = dict(config.norms)
        for name in self.norms.values():
            if name is not None:
                self.add_module(name, make_norm(config, config.hidden_size))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = self.add(x, self.self_attn(x, context, self.norm("attention_in")), self.norm("attention_out"))
        return self.add(x, self.mlp(x, self.norm("mlp_in")), self.norm("mlp_out"))

    def norm(self, place: str) -> nn.Module | None:
        name = self.norms[place]
        return None if name is None else self._modules[name]

    @staticmethod
    def add(x: Tensor, block: Tensor, norm: nn.Module | None) -> Tensor:
        return x + (block if norm is None else norm(block))
