"""Muon: momentum whose matrix update is orthogonalised by Newton-Schulz (Jordan et al. 2024).

`torch.optim.Muon` runs the iteration in bfloat16, which a CPU without bfloat16 units does at a fifth of its float32 rate,
and one matrix at a time. Here matrices of one shape form one batched product, in float32 on a CPU. An update needs whole
matrices: of sharded ones every rank fetches the directions of one shape at a time, and keeps its rows of what comes out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tutelage.models.shard import local, rows, whole_stack

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic with the steepest slope at 0; singular values land in 0.7 .. 1.2


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices of a batch [n, r, c], approximately."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.clone()
    flip = x.size(1) > x.size(2)
    if flip:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        gram = torch.bmm(x, x.transpose(1, 2))
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return (x.transpose(1, 2) if flip else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for two-dimensional weights. The update's RMS is 0.2, as AdamW's typically is (Liu et al., arXiv:2502.16982),
    so that one learning rate and one weight decay fit both."""

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, params in shapes.items():
                directions = [self._direction(p, group["momentum"]) for p in params]
                updates = orthogonalise(whole_stack(params[0], directions))
                scale = 0.2 * max(shape) ** 0.5
                for p, update in zip(params, updates, strict=True):
                    own = local(p)
                    own.mul_(1 - group["lr"] * group["weight_decay"])
                    own.add_(update[rows(p) or slice(None)], alpha=-group["lr"] * scale)

    def _direction(self, p: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum of the gradient, of the rows that are here."""
        assert p.grad is not None
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer, grad = local(state["momentum_buffer"]), local(p.grad)
        buffer.lerp_(grad, 1 - momentum)
        return grad.lerp(buffer, momentum)
