"""Ranks under `torchrun`: one process group, gradients and sums added over it. Without it: nothing to do."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from tutelage import files, log
from tutelage.errors import StorageError
from tutelage.models.shard import is_shard, local


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
    """Adds gradients over ranks in place, in one flat buffer; those of shards have been added in the backward pass. A parameter
    without a gradient on any rank keeps none: weight decay must not move what no loss reaches."""
    if world() == 1:
        return
    chosen = [p for p in params if p.requires_grad and not is_shard(p)]
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


def total_norm(grads: list[Tensor]) -> float:
    """The norm of all gradients together, the same number on every rank."""
    norm = nn.utils.get_total_norm([local(g) for g in grads]).item()
    if not any(is_shard(g) for g in grads):
        return norm
    return math.sqrt(sum_values({"squares": norm * norm})["squares"])


def sum_values(values: dict[str, float]) -> dict[str, float]:
    """Named sums over ranks (every rank has the same names)."""
    return _reduced(values, dist.ReduceOp.SUM) if world() > 1 else values


def max_values(values: dict[str, float]) -> dict[str, float]:
    """The largest of each over ranks, likewise."""
    return _reduced(values, dist.ReduceOp.MAX) if world() > 1 else values


def _reduced(values: dict[str, float], how: Any) -> dict[str, float]:
    names = sorted(values)
    tensor = torch.tensor([values[n] for n in names], dtype=torch.float64)
    dist.all_reduce(tensor, how)
    return dict(zip(names, tensor.tolist(), strict=True))


def any_rank(**flags: bool) -> dict[str, bool]:
    """Each flag: whether any rank has it set. Ranks must decide together, or one waits for another that has gone on."""
    return {name: total > 0 for name, total in sum_values({n: float(f) for n, f in flags.items()}).items()}


def barrier() -> None:
    if world() > 1:
        dist.barrier()


@contextlib.contextmanager
def whole_folder(path: Path, finish: Callable[[Path], None] = lambda folder: None) -> Iterator[Path]:
    """`files.whole_folder` for a folder that every rank writes into: it becomes `path` when the block has ended well on all.
    `finish` is called with it before, by rank 0, when the parts of all ranks are there."""
    with files.whole_folder(path) if log.rank() == 0 else contextlib.nullcontext() as made:
        owner = int(sum_values({"process": os.getpid() if made else 0})["process"])
        error: BaseException | None = None
        try:
            yield made or files.partial_name(path, owner)
        except BaseException as raised:
            error = raised
        failed = any_rank(failed=error is not None)["failed"]
        if not failed:
            try:
                if made is not None:
                    finish(made)
            except BaseException as raised:
                error = raised
            failed = any_rank(failed=error is not None)["failed"]
        if error is not None:
            raise error
        if failed:
            raise StorageError("another rank could not write its part", file=path, fix="look at the output of the other ranks")
    barrier()
