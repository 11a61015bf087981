"""Linear layers of a frozen base with what an adapter adds to them.

A layer with an adapter keeps the base's parameters under their names (`q_proj.weight`) and has those of the adapter below
`change` (`q_proj.change.a`). Where many tokens are read, base and change are one product: the changed weight is made for it, at
the cost of a few rows of the batch, and not kept (`adapted_products.py`). For few tokens, with dropout and under autocast the
change runs beside the base.

Shapes: I and O, widths of input and output; r, rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.models.adapters.nf4 import Packed

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

    def beside(self, x: Tensor, base: Tensor, bias: Tensor | None) -> Tensor:
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

    def beside(self, x: Tensor, base: Tensor, bias: Tensor | None) -> Tensor:
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
        self.bare = False  # as if there were no change

    @property
    def quantized(self) -> bool:
        return self.packed is not None

    def base_weight(self) -> Tensor:
        """[O,I]."""
        weight = self.weight if self.packed is None else self.packed.whole()
        return weight.t() if self.transposed else weight

    @property
    def changes(self) -> bool:
        return self.change is not None and not self.bare

    def whole_weight(self) -> Tensor:
        """[O,I], with the change."""
        base = self.base_weight()
        return self.change.weight(base) if self.changes else base  # type: ignore[union-attr]

    def whole_bias(self) -> Tensor | None:
        return self.change.bias(self.bias) if self.changes else self.bias  # type: ignore[union-attr]

    def takes(self, x: Tensor) -> bool:
        """Whether x, of many tokens, goes through one product with the changed weight."""
        many = x.numel() // x.shape[-1] >= MANY
        free = not (torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling() or torch.jit.is_tracing())
        kind = self.weight.dtype if self.packed is None else self.packed.dtype
        whole = self.change is None or self.bare or self.change.whole
        return many and free and whole and kind == x.dtype and not self._forward_hooks and not self._forward_pre_hooks

    def forward(self, x: Tensor) -> Tensor:
        if self.takes(x):
            from tutelage.models.adapters.products import product

            return product(x, (self,))
        base = self.base_weight()
        if base.dtype != x.dtype:
            base = base.to(x.dtype)
        return self.change.beside(x, base, self.bias) if self.changes else F.linear(x, base, self.bias)  # type: ignore[union-attr]

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
