"""The operations between matrix products: normalisation, rotary positions, gated activation; and some joined with a product.

Each runs on our own kernel where `kernels.fits`, else on plain torch, with the same results to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.models import kernels
from tutelage.models.kernels import functions
from tutelage.models.kernels.calls import HeadPrep


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """x / rms(x) * weight over the last dimension; with `unit_offset` (Gemma) times weight + 1. Computed in float32 or wider."""
    if kernels.fits(x, weight):
        return functions.RmsNorm.apply(x, weight, eps, unit_offset)
    return _rms_norm_torch(x, weight, eps, unit_offset)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), in one pass over memory. x and residual have one shape."""
    assert x.shape == residual.shape
    if kernels.fits(x, residual, weight):
        return functions.AddRmsNorm.apply(x, residual, weight, eps, unit_offset)
    total = x + residual
    return _rms_norm_torch(total, weight, eps, unit_offset), total


def norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weights: Sequence[Tensor], bias: Tensor | None = None, unit_offset: bool = False
) -> Tensor:
    """rms_norm(x) times the transpose of the concatenated `weights` ([out_i, H] each) plus `bias` -> [.., sum of out_i].

    The kernel path keeps x alone for the backward pass, not the normed rows.
    """
    if kernels.fits(x, norm_weight, bias, *weights):
        return functions.NormLinear.apply(x, norm_weight, bias, eps, unit_offset, *weights)
    joined = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
    return F.linear(_rms_norm_torch(x, norm_weight, eps, unit_offset), joined, bias)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions by halves (Hugging Face's order): q [B,T,Hq,D], k [B,T,Hkv,D], cos and sin [B,T,R] or [T,R].

    The first R dimensions of each head turn (both halves of cos and sin are equal), the other D - R stay.
    """
    if kernels.fits(q, k, cos, sin):
        prep = HeadPrep(cos=cos.contiguous(), sin=sin.contiguous())
        return functions.Heads.apply(q, None, prep), functions.Heads.apply(k, None, prep)
    return _turn(q, cos, sin), _turn(k, cos, sin)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """RMS norm of each head (weights [D]), then rotary positions. Shapes as in `rope`."""
    if kernels.fits(q, k, q_weight, k_weight, cos, sin):
        prep = HeadPrep(eps=eps, unit_offset=unit_offset, cos=cos.contiguous(), sin=sin.contiguous())
        return functions.Heads.apply(q, q_weight, prep), functions.Heads.apply(k, k_weight, prep)
    q, k = _rms_norm_torch(q, q_weight, eps, unit_offset), _rms_norm_torch(k, k_weight, eps, unit_offset)
    return _turn(q, cos, sin), _turn(k, cos, sin)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[.., 2I] -> [.., I]: silu of the first half times the second half."""
    if kernels.fits(gate_up):
        return functions.SiluMul.apply(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def silu_mul_linear(gate_up: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu_mul(gate_up) times the transpose of `weight` [H,I] plus `bias`: [.., 2I] -> [.., H].

    The kernel path keeps gate_up alone for the backward pass, not the activation.
    """
    if kernels.fits(gate_up, weight, bias):
        return functions.SiluMulLinear.apply(gate_up, weight, bias)
    return F.linear(silu_mul(gate_up), weight, bias)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows `ids` of `weight` [V,H] -> [.., H]; the gradient is summed in one fixed order."""
    if kernels.fits(weight) and weight.requires_grad and torch.is_grad_enabled():
        return functions.Embedding.apply(ids, weight)
    return F.embedding(ids, weight)


def _rms_norm_torch(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    wide = x.float() if x.dtype.itemsize < 4 else x
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (normed * (1.0 + weight.to(normed.dtype))).to(x.dtype)
    return weight * normed.to(x.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    turning, still = x[..., :width], x[..., width:]
    first, second = turning.chunk(2, -1)
    turned = turning * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned, still), -1) if width < x.shape[-1] else turned
