"""Products with adapted weights, many tokens at a time. A changed weight is made for one product and made again in the backward
pass, so that none is kept: of a base in 4 bits there is one layer at a time in full.

The frozen weight gets no gradient. That of a low-rank change goes through its narrow side, four products of rank r, instead of
through the gradient of the whole weight, wherever that is less work.

Shapes: N tokens, I and O widths of input and of all outputs, r rank, R the ranks of all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tutelage.models.adapters.linear import Adapted, LowRankChange
from tutelage.models.kernels import calls


def join_weights(layers: Sequence[nn.Linear]) -> Tensor:
    """The weights [O,I] of layers that read the same input, changes included."""
    parts = [m.whole_weight() if isinstance(m, Adapted) else m.weight for m in layers]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def join_biases(layers: Sequence[nn.Linear]) -> Tensor | None:
    parts = [m.whole_bias() if isinstance(m, Adapted) else m.bias for m in layers]
    return None if parts[0] is None else torch.cat(parts)  # type: ignore[arg-type]


def trained(layers: Sequence[nn.Linear]) -> list[nn.Parameter]:
    """What the changes of some layers are made of; one that several share comes several times."""
    changes = [m.change for m in layers if isinstance(m, Adapted) and m.changes]
    return [p for change in changes if change is not None for p in change.parameters()]


def product(
    x: Tensor, layers: Sequence[nn.Linear], norm: tuple[Tensor, float, bool] | None = None, gated: bool = False
) -> Tensor:
    """The outputs of `layers` side by side, [.., I] -> [.., O]. `norm` (weight, eps, unit offset) and `gated` (of [.., 2I]) are
    what our kernels do to x first."""
    return _Product.apply(x, None if norm is None else norm[0], tuple(layers), norm, gated, *trained(layers))  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm_weight: Tensor | None, layers: Any, norm: Any, gated: bool, *params: Tensor) -> Tensor:
        x = x.contiguous()
        read, rstd = x, None
        if norm is not None:
            read, rstd, _ = calls.rms_norm_forward(x, norm[0], *norm[1:])
        if gated:
            read = calls.silu_mul_forward(x)
        ctx.save_for_backward(x, norm_weight, rstd)
        ctx.layers, ctx.norm, ctx.gated = layers, norm, gated
        return F.linear(read, join_weights(layers), join_biases(layers))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, rstd = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        dx = d_norm = None
        read = x
        if ctx.gated:
            inner = flat @ join_weights(ctx.layers)
            # The kernel replaces the gradient of the inner activation by the activation itself, in place.
            dx = calls.silu_mul_backward(x, inner, out=inner)
            read = inner
        elif ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dx = (flat @ join_weights(ctx.layers)).view(x.shape)
        if ctx.norm is not None:
            if any(ctx.needs_input_grad[5:]):
                read = calls.rms_norm_forward(x, *ctx.norm)[0]
            if dx is not None:
                dx, d_norm = calls.rms_norm_backward(x, norm_weight, rstd, dx, ctx.norm[2])
        grads: list[Tensor | None] = []
        if any(ctx.needs_input_grad[5:]):
            grads = change_gradients(ctx.layers, read.view(len(flat), -1), flat)
        else:
            grads = [None] * (len(ctx.needs_input_grad) - 5)
        return dx, d_norm, None, None, None, *grads


def change_gradients(layers: Sequence[nn.Linear], x: Tensor, dy: Tensor) -> list[Tensor | None]:
    """Gradients of `trained(layers)` from what the layers read, x [N,I], and the gradient of what they gave, dy [N,O]."""
    low: dict[int, LowRankChange] = {}
    parts = dy.split([m.out_features for m in layers], 1)
    for i, layer in enumerate(layers):
        if isinstance(layer, Adapted) and layer.changes and _narrow(layer):
            assert isinstance(layer.change, LowRankChange)
            low[i] = layer.change
    us: dict[int, Tensor] = {}
    das: dict[int, Tensor] = {}
    if low:
        ranks = [len(c.a) for c in low.values()]
        u = x @ _stack([c.a for c in low.values()]).t()  # [N,R]
        v = torch.cat([parts[i] @ c.b for i, c in low.items()], 1)  # [N,R]
        us = dict(zip(low, u.split(ranks, 1), strict=True))
        das = dict(zip(low, (v.t() @ x).split(ranks), strict=True))
    out: list[Tensor | None] = []
    for i, layer in enumerate(layers):
        if i in low:
            scale = low[i].scale
            out += [das[i].mul_(scale), (parts[i].t() @ us[i]).mul_(scale)]
        elif isinstance(layer, Adapted) and layer.changes:
            out += _through_weight(layer, x, parts[i])
    return out


def _narrow(layer: Adapted) -> bool:
    """Whether four products of the rank are less work than the gradient of the whole weight."""
    change, widths = layer.change, layer.in_features + layer.out_features
    if not isinstance(change, LowRankChange) or change.length is not None:
        return False
    return 2 * len(change.a) * widths < layer.in_features * layer.out_features


def _through_weight(layer: Adapted, x: Tensor, dy: Tensor) -> list[Tensor | None]:
    params = trained([layer])
    with torch.enable_grad():
        made, grads = [layer.whole_weight()], [dy.t() @ x]
        bias = layer.whole_bias()
        if bias is not None and bias.requires_grad and bias is not layer.bias:
            made.append(bias)
            grads.append(dy.sum(0))
        return list(torch.autograd.grad(made, params, grads, allow_unused=True))


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
