"""Attention inside segments of packed rows, and of new tokens against a cache.

Shapes: B rows, T tokens, Hq query heads, Hkv key-value heads (Hq a multiple of Hkv), D head width, S sequences being generated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.models import kernels, ops
from tutelage.models.kernels import calls, functions

LANES = 16
"""Head widths that our kernel for cached keys reads: multiples of this."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each token's own segment starts and ends; made once per batch by `layout`, shared by the layers.

    Example:
        segments 1 1 1 2 2 0 gives starts 0 0 0 3 3 6 and ends 3 3 3 5 5 0: the padding token attends to nothing.
    """

    starts: Tensor  # [B,T] int32: row index of the first token of the own segment; T for padding
    ends: Tensor  # [B,T] int32: one past the last token of the own segment; 0 for padding
    spans: Tensor  # [n,3] int32 on the CPU: row, start, length of each segment, longest first

    @property
    def shape(self) -> tuple[int, int]:
        return self.starts.shape[0], self.starts.shape[1]

    @cached_property
    def is_full(self) -> bool:
        """True when every row is one segment without padding."""
        rows, length = self.shape
        return len(self.spans) == rows and bool((self.spans[:, 2] == length).all())

    @cached_property
    def groups(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """For the torch path: segments regrouped by length.

        Gives one [n,L] index of flat tokens per group, and for each flat token its place among the groups' tokens laid end to
        end (one past the last for padding). A segment shorter than its group's L is filled up with its own first token at the
        end, where causality hides it.
        """
        rows, length = self.shape
        device = self.starts.device
        back = torch.full((rows * length,), -1, dtype=torch.int64)
        buckets: dict[int, list[tuple[int, int]]] = {}
        for row, start, size in self.spans.tolist():
            buckets.setdefault(_bucket(size, length), []).append((row * length + start, size))
        groups, offset = [], 0
        for width, members in buckets.items():
            first, size = torch.tensor(members).unbind(1)
            step = torch.arange(width)
            real = step < size[:, None]
            index = first[:, None] + torch.where(real, step, 0)
            back[index[real]] = (offset + torch.arange(len(members))[:, None] * width + step)[real]
            groups.append(index.to(device))
            offset += index.numel()
        back[back < 0] = offset
        return tuple(groups), back.to(device)


def layout(segments: Tensor) -> Layout:
    """The attention layout of `segments` [B,T]: 0 is padding, a run of equal numbers is one segment."""
    rows, length = segments.shape
    where = torch.arange(length, device=segments.device, dtype=torch.int32).expand(rows, length)
    edge = torch.ones((rows, 1), dtype=torch.bool, device=segments.device)
    change = segments[:, 1:] != segments[:, :-1]
    first, last = torch.cat((edge, change), 1), torch.cat((change, edge), 1)
    starts = torch.where(first, where, 0).cummax(1).values
    ends = torch.where(last, where + 1, length).flip(1).cummin(1).values.flip(1)
    real = segments != 0
    row, start = (first & real).nonzero().unbind(1)
    spans = torch.stack((row, start, ends[row, start] - start), 1).to("cpu", torch.int32)
    spans = spans[spans[:, 2].argsort(descending=True, stable=True)].contiguous()
    return Layout(torch.where(real, starts, length).contiguous(), torch.where(real, ends, 0).contiguous(), spans)


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Causal attention inside each segment: q [B,T,Hq,D], k and v [B,T,Hkv,D] -> [B,T,Hq,D].

    `window`: a token sees itself and the window - 1 tokens before it. `softcap`: scores become cap * tanh(score / cap).
    Padding tokens give 0.
    """
    if kernels.fits(q, k, v) and _has_kernel(q.shape[3]):
        return functions.Attend.apply(q, k, v, calls.Mask(layout.spans, scale, window, softcap))
    return _attend_torch(q, k, v, layout, scale, window, softcap)


def attend_qkv(
    qkv: Tensor,
    layout: Layout,
    heads: tuple[int, int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    unit_offset: bool = False,
    turns: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`attend` on a merged projection: qkv [B,T,(Hq+2Hkv)D], heads (Hq, Hkv) -> [B,T,Hq*D].

    `norms`: RMS norm weights [D] of query and key heads; `turns`: (cos, sin) of rotary positions, as in `ops.rope`. The kernel
    path does both inside attention: nothing but qkv and the result is kept for the backward pass, and no copies are made.
    """
    q_weight, k_weight = norms or (None, None)
    cos, sin = turns or (None, None)
    width = qkv.shape[2] // (heads[0] + 2 * heads[1])
    if kernels.fits(qkv, q_weight, k_weight, cos, sin) and _has_kernel(width):
        cos, sin = (x if x is None else x.contiguous() for x in (cos, sin))
        prep = calls.HeadPrep(q_weight, k_weight, eps, unit_offset, cos, sin)
        mask = calls.Mask(layout.spans, scale, window, softcap)
        return functions.AttendMerged.apply(qkv, q_weight, k_weight, heads, mask, prep)
    q, k, v = qkv.unflatten(2, (-1, width)).split((heads[0], heads[1], heads[1]), 2)
    if q_weight is not None and k_weight is not None:
        q, k = ops.rms_norm(q, q_weight, eps, unit_offset), ops.rms_norm(k, k_weight, eps, unit_offset)
    if cos is not None and sin is not None:
        q, k = ops.rope(q, k, cos, sin)
    return attend(q, k, v, layout, scale=scale, window=window, softcap=softcap).flatten(2)


def attend_cached(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Attention of the newest t tokens of S sequences: q [S,t,Hq,D], caches k and v [S,L,Hkv,D] -> [S,t,Hq,D].

    `lengths` [S] counts the valid tokens of each cache, the t new ones included; new token j of sequence s sees the first
    lengths[s] - t + j + 1 of them. A token that sees nothing gives 0.
    """
    constant = not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))
    readable = q.shape[3] % LANES == 0 and q.stride(3) == 1 == k.stride(3) and k.stride() == v.stride()
    if constant and readable and kernels.fits(q, k, v):
        return calls.attention_cached(q, k, v, lengths.to("cpu", torch.int64).contiguous(), scale, window, softcap)
    return _attend_cached_torch(q, k, v, lengths, scale, window, softcap)


def _has_kernel(width: int) -> bool:
    return width <= 256


def _attend_torch(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    if layout.is_full:
        return _attend_dense(q, k, v, scale, window, softcap)
    groups, back = layout.groups
    flat_q, flat_k, flat_v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    parts = [_attend_dense(flat_q[g], flat_k[g], flat_v[g], scale, window, softcap).flatten(0, 1) for g in groups]
    parts.append(q.new_zeros(1, q.shape[2], q.shape[3]))
    return torch.cat(parts)[back].view(q.shape)


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """Causal attention of whole rows, [n,L,H,D] each."""
    length = q.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if softcap is None and (window is None or window >= length):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
        return out.transpose(1, 2)
    at = torch.arange(length, device=q.device)
    seen = at <= at[:, None]
    if window is not None:
        seen = seen & (at > at[:, None] - window)
    return _attend_masked(q, k, v, seen, scale, softcap).transpose(1, 2)


def _attend_masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None) -> Tensor:
    """q [n,Hq,t,D], k and v [n,Hkv,L,D], seen broadcastable to [n,Hq,t,L], with something seen everywhere."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (
        softcap * torch.tanh((q @ k.transpose(2, 3)).float() * (scale / softcap))
        if q.dtype.itemsize < 4
        else (softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap)))
    )
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype) @ v


def _attend_cached_torch(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    new = q.shape[1]
    if q.device.type == "cpu":
        most = max(int(lengths.max()), 1)
        k, v = k[:, :most], v[:, :most]
    at = torch.arange(k.shape[1], device=q.device)
    own = lengths.to(q.device)[:, None] - new + torch.arange(new, device=q.device)
    seen = at <= own[:, :, None]
    if window is not None:
        seen = seen & (at > own[:, :, None] - window)
    nothing = ~seen.any(-1)
    # A row without any key would be NaN; it looks at key 0 and is then set to 0. What lies past a length may be anything, so
    # it is cleared: NaN stays NaN under a mask.
    safe = seen.clone()
    safe[..., 0] |= nothing
    valid = (at < lengths.to(q.device)[:, None])[:, :, None, None]
    k, v = torch.where(valid, k, 0), torch.where(valid, v, 0)
    out = _attend_masked(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), safe[:, None], scale, softcap)
    return out.transpose(1, 2).masked_fill(nothing[:, :, None, None], 0)


def _bucket(size: int, longest: int) -> int:
    """`size` rounded up to one of 8 sizes per doubling, so that few groups cover many lengths at under 13 % waste."""
    if size <= 16:
        return min(16, longest)
    grain = 1 << max((size - 1).bit_length() - 4, 0)
    return min(-(-size // grain) * grain, longest)
