"""Ranks under `torchrun`: one process group, gradients and sums added over it. Without it: nothing to do."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import distributed as dist
from torch import nn


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(device: str) -> None:
    """Joins the group that `torchrun` describes in the environment, if there is one and it is not joined yet."""
    if world() > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")  # sums of numbers stay on the CPU


def stop() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def sum_gradients(params: Iterable[nn.Parameter]) -> None:
    """Adds gradients over ranks in place, in one flat buffer. A parameter without a gradient on any rank keeps none: weight
    decay must not move what no loss reaches."""
    if world() == 1:
        return
    chosen = [p for p in params if p.requires_grad]
    if not chosen:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in chosen]
    touched = grads[0].new_tensor([0.0 if p.grad is None else 1.0 for p in chosen])
    flat = torch.cat([*(g.reshape(-1) for g in grads), touched])
    dist.all_reduce(flat)
    at = 0
    for p, g, ranks in zip(chosen, grads, flat[-len(chosen) :].tolist(), strict=True):
        if ranks:
            p.grad = g.copy_(flat[at : at + g.numel()].view_as(g))
        at += g.numel()


def sum_values(values: dict[str, float]) -> dict[str, float]:
    """Named sums over ranks (every rank has the same names)."""
    if world() == 1:
        return values
    names = sorted(values)
    tensor = torch.tensor([values[n] for n in names], dtype=torch.float64)
    dist.all_reduce(tensor)
    return dict(zip(names, tensor.tolist(), strict=True))


def any_rank(**flags: bool) -> dict[str, bool]:
    """Each flag: whether any rank has it set. Ranks must decide together, or one waits for another that has gone on."""
    return {name: total > 0 for name, total in sum_values({n: float(f) for n, f in flags.items()}).items()}


def barrier() -> None:
    if world() > 1:
        dist.barrier()
