"""The kernels as differentiable functions. Callers have checked `kernels.fits`; nothing here has a torch path.

Backward passes compute cheap things again instead of keeping them: norms, rotated queries and keys, gated activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tutelage.models.kernels import calls
from tutelage.models.kernels.calls import HeadPrep, Mask

Context = Any


def _head_views(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B,T,(Hq+2Hkv)D] -> views [B,T,Hq,D], [B,T,Hkv,D], [B,T,Hkv,D]."""
    q, k, v = qkv.unflatten(2, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), 2)
    return q, k, v


def _zeroed(x: Tensor, mask: Mask) -> Tensor:
    """Memory for the gradient of x [B,T,..]: zeros only where the kernel leaves padding out."""
    make = torch.empty_strided if calls.covers(mask, x.shape[0], x.shape[1]) else _zeros_strided
    return make(x.shape, x.stride(), dtype=torch.float32)


def _zeros_strided(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype).zero_()


class Attend(torch.autograd.Function):
    """Attention of separate q, k, v."""

    @staticmethod
    def forward(ctx: Context, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        out, lse = calls.attention_forward(q, k, v, mask, HeadPrep())
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask = mask
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        # Views of one merged tensor, and expanded ones, have strides that a gradient of its own must not have.
        qkv = tuple(x if x.is_contiguous() else x.contiguous() for x in (q, k, v))
        grads = tuple(_zeroed(x, ctx.mask) for x in qkv)
        calls.attention_backward(grad, out, lse, qkv, grads, ctx.mask, HeadPrep())  # type: ignore[arg-type]
        return *grads, None


class AttendMerged(torch.autograd.Function):
    """Attention of one [B,T,(Hq+2Hkv)D] tensor, head norms and rotary positions included; the gradient is one tensor too."""

    @staticmethod
    def forward(
        ctx: Context,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        heads: tuple[int, int],
        mask: Mask,
        prep: HeadPrep,
    ) -> Tensor:
        qkv = qkv.contiguous()
        out, lse = calls.attention_forward(*_head_views(qkv, *heads), mask, prep)
        ctx.save_for_backward(qkv, out, lse, q_weight, k_weight)
        ctx.heads, ctx.mask, ctx.prep = heads, mask, prep
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse, q_weight, _ = ctx.saved_tensors
        d_qkv = _zeroed(qkv, ctx.mask)
        views, d_views = _head_views(qkv, *ctx.heads), _head_views(d_qkv, *ctx.heads)
        d_weights = calls.attention_backward(grad.view(out.shape), out, lse, views, d_views, ctx.mask, ctx.prep)
        dq, dk = (None, None) if q_weight is None else d_weights.unbind(0)
        return d_qkv, dq, dk, None, None, None


class Heads(torch.autograd.Function):
    """Norm and rotary positions of one [B,T,H,D] tensor."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor | None, prep: HeadPrep) -> Tensor:
        x = x if x.stride(3) == 1 else x.contiguous()
        # Without a norm the map is linear: its backward pass needs the shape of x only.
        ctx.save_for_backward(x, weight)
        ctx.prep = prep
        return calls.heads_forward(x, weight, prep)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return *calls.heads_backward(x, grad, weight, ctx.prep), None


class RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
        x = x.contiguous()
        out, rstd, _ = calls.rms_norm_forward(x, weight, eps, unit_offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.unit_offset = unit_offset
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        return *calls.rms_norm_backward(x, weight, rstd, grad.contiguous(), ctx.unit_offset), None, None


class AddRmsNorm(torch.autograd.Function):
    """(norm of x + add, x + add)."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, add: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
        out, rstd, total = calls.rms_norm_forward(x.contiguous(), weight, eps, unit_offset, add.contiguous())
        assert total is not None
        ctx.save_for_backward(total, weight, rstd)
        ctx.unit_offset = unit_offset
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        rest = grad_total.contiguous()
        dx, dw = calls.rms_norm_backward(total, weight, rstd, grad.contiguous(), ctx.unit_offset, rest)
        return dx, dx, dw, None, None


class NormLinear(torch.autograd.Function):
    """norm(x) @ concatenated weights.T + bias. Keeps x only: the normed rows are made again for the weights' gradient."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, norm_weight: Tensor, bias: Tensor | None, eps: float, unit_offset: bool, *weights: Tensor
    ) -> Tensor:
        x = x.contiguous()
        normed, rstd, _ = calls.rms_norm_forward(x, norm_weight, eps, unit_offset)
        ctx.save_for_backward(x, norm_weight, rstd, *weights)
        ctx.eps, ctx.unit_offset = eps, unit_offset
        return torch.nn.functional.linear(normed, _joined(weights), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, rstd, *weights = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        d_weights: list[Tensor | None] = [None] * len(weights)
        wanted = ctx.needs_input_grad
        if any(wanted[5:]):
            normed, _, _ = calls.rms_norm_forward(x, norm_weight, ctx.eps, ctx.unit_offset)
            joined = flat.t() @ normed.view(-1, x.shape[-1])
            del normed
            d_weights = list(joined.split([len(w) for w in weights]))
        d_bias = flat.sum(0) if wanted[2] else None
        if not (wanted[0] or wanted[1]):
            return None, None, d_bias, None, None, *d_weights
        d_normed = (flat @ _joined(weights)).view(x.shape)
        dx, d_norm = calls.rms_norm_backward(x, norm_weight, rstd, d_normed, ctx.unit_offset)
        return dx, d_norm, d_bias, None, None, *d_weights


def _joined(weights: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(tuple(weights))


class SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        return calls.silu_mul_forward(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return calls.silu_mul_backward(gate_up, grad.contiguous())


class SiluMulLinear(torch.autograd.Function):
    """silu_mul(gate_up) @ weight.T. Keeps gate_up only."""

    @staticmethod
    def forward(ctx: Context, gate_up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up, weight)
        return torch.nn.functional.linear(calls.silu_mul_forward(gate_up), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        inner = flat @ weight
        # The kernel replaces the gradient of the inner activation by the activation itself, in place.
        d_gate_up = calls.silu_mul_backward(gate_up, inner, out=inner)
        d_weight = flat.t() @ inner if ctx.needs_input_grad[1] else None
        return d_gate_up, d_weight, flat.sum(0) if ctx.needs_input_grad[2] else None


class Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.vocabulary = len(weight)
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        return None, calls.embedding_backward(ids.contiguous(), grad.contiguous(), ctx.vocabulary)
