"""Linear layers of a frozen base with the changes of an adapter, and products with them.

A layer with an adapter keeps the base's parameters under their names (`q_proj.weight`) and has those of the adapter below
`change` (`q_proj.change.a`). Where many tokens are read, base and change are one product: the changed weight is made for it, at
the cost of a few rows of the batch, and made again in the backward pass, so that none is kept: of a base in 4 bits there is one
layer at a time in full. For few tokens, with dropout and under autocast base and change run separately (`delta_forward`).

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

from tutelage.models.adapters.nf4 import Packed
from tutelage.models.kernels import calls

MANY = 64
"""Tokens from which making the changed weight costs less than it saves."""


class LowRankChange(nn.Module):
    """LoRA (Hu et al. 2021, arXiv:2106.09685): W + scale * B A. With `length`, DoRA (Liu et al. 2024, arXiv:2402.09353): each row
    of that is brought to a trained length, and the gradient takes the factor for a constant, as in the paper's section 4.3."""

    def __init__(self, a: nn.Parameter, b: nn.Parameter, scale: float, length: nn.Parameter | None, dropout: float) -> None:
        super().__init__()
        self.a, self.b, self.length = a, b, length  # [r,I], [O,r], [O]; several layers that are one on disk share a
        self.scale, self.dropout = scale, dropout

    @property
    def whole(self) -> bool:
        """Whether the change can be part of the weight in this pass."""
        return not (self.dropout and self.training)

    def weight(self, base: Tensor) -> Tensor:
        changed = torch.addmm(base, self.b.to(base.dtype), self.a.to(base.dtype), alpha=self.scale)
        return changed if self.length is None else changed * self._factor(changed)[:, None].to(base.dtype)

    def bias(self, base: Tensor | None) -> Tensor | None:
        return base

    def delta_forward(self, x: Tensor, base: Tensor, bias: Tensor | None) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training)
        low = F.linear(F.linear(dropped, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale
        if self.length is None:
            return F.linear(x, base, bias) + low
        with torch.no_grad():
            changed = torch.addmm(base, self.b.to(base.dtype), self.a.to(base.dtype), alpha=self.scale)
        factor = self._factor(changed).to(x.dtype)
        if dropped is x:
            return add_bias(factor * (F.linear(x, base) + low), bias)
        # As `peft` has it: dropout does not touch what the base alone gives, but the factor is of the dropped input.
        return F.linear(x, base, bias) + (factor - 1) * F.linear(dropped, base) + factor * low

    def _factor(self, changed: Tensor) -> Tensor:
        assert self.length is not None
        return self.length / torch.linalg.vector_norm(changed.detach().float(), dim=1).to(self.length.dtype)


class Rescaling(nn.Module):
    """IA3 (Liu et al. 2022, arXiv:2205.05638): a factor for every output, or for every input, of a layer."""

    whole = True

    def __init__(self, factor: nn.Parameter, of_input: bool) -> None:
        super().__init__()
        self.factor, self.of_input = factor, of_input  # [O] or [I]

    def weight(self, base: Tensor) -> Tensor:
        factor = self.factor.to(base.dtype)
        return base * factor if self.of_input else base * factor[:, None]

    def bias(self, base: Tensor | None) -> Tensor | None:
        return base if base is None or self.of_input else base * self.factor.to(base.dtype)

    def delta_forward(self, x: Tensor, base: Tensor, bias: Tensor | None) -> Tensor:
        factor = self.factor.to(x.dtype)
        return F.linear(x * factor, base, bias) if self.of_input else F.linear(x, base, bias) * factor


class Adapted(nn.Linear):
    """A linear layer that is frozen, changed, or held in 4 bits; it takes the place of a plain one and shares its parameters."""

    def __init__(self, base: nn.Module, change: LowRankChange | Rescaling | None, packed: Packed | None = None) -> None:
        nn.Module.__init__(self)
        weight, bias = base.weight, base.bias
        assert isinstance(weight, Tensor)
        self.transposed = not isinstance(base, nn.Linear)  # GPT-2's layers in `transformers`: [I,O]
        self.out_features, self.in_features = weight.shape[::-1] if self.transposed else weight.shape
        self.bias = bias  # type: ignore[assignment]
        self.change = change
        self.packed = packed
        if packed is None:
            self.weight = weight  # type: ignore[assignment]
        self.disabled = False  # as if there were no change

    @property
    def quantized(self) -> bool:
        return self.packed is not None

    def base_weight(self) -> Tensor:
        """[O,I]."""
        weight = self.weight if self.packed is None else self.packed.whole()
        return weight.t() if self.transposed else weight

    @property
    def changes(self) -> bool:
        return self.change is not None and not self.disabled

    def merged_weight(self) -> Tensor:
        """[O,I], with the change."""
        base = self.base_weight()
        return self.change.weight(base) if self.changes else base  # type: ignore[union-attr]

    def merged_bias(self) -> Tensor | None:
        return self.change.bias(self.bias) if self.changes else self.bias  # type: ignore[union-attr]

    def merges(self, x: Tensor) -> bool:
        """Whether x has enough tokens for one product with the changed weight, and nothing else forbids it."""
        many = x.numel() // x.shape[-1] >= MANY
        free = not (torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling() or torch.jit.is_tracing())
        kind = self.weight.dtype if self.packed is None else self.packed.dtype
        whole = self.change is None or self.disabled or self.change.whole
        return many and free and whole and kind == x.dtype and not self._forward_hooks and not self._forward_pre_hooks

    def forward(self, x: Tensor) -> Tensor:
        if self.merges(x):
            return product(x, (self,))
        base = self.base_weight()
        if base.dtype != x.dtype:
            base = base.to(x.dtype)
        return self.change.delta_forward(x, base, self.bias) if self.changes else F.linear(x, base, self.bias)  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, quantized={self.quantized}"


def add_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


def adapted(model: nn.Module) -> list[tuple[str, Adapted]]:
    """The layers of a model that have been replaced, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Adapted)]


def put_in_place(model: Any, name: str, module: nn.Module) -> None:
    """Makes `module` the one of this name."""
    parent, _, leaf = name.rpartition(".")
    module.train(model.training)
    setattr(model.get_submodule(parent), leaf, module)


def join_weights(layers: Sequence[nn.Linear]) -> Tensor:
    """The weights [O,I] of layers that read the same input, changes included."""
    parts = [m.merged_weight() if isinstance(m, Adapted) else m.weight for m in layers]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def join_biases(layers: Sequence[nn.Linear]) -> Tensor | None:
    parts = [m.merged_bias() if isinstance(m, Adapted) else m.bias for m in layers]
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
        made, grads = [layer.merged_weight()], [dy.t() @ x]
        bias = layer.merged_bias()
        if bias is not None and bias.requires_grad and bias is not layer.bias:
            made.append(bias)
            grads.append(dy.sum(0))
        return list(torch.autograd.grad(made, params, grads, allow_unused=True))


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
