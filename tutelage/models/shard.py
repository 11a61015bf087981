"""Sharded models: every rank holds some rows of each tensor (FSDP2, `torch.distributed.fsdp.fully_shard`; arXiv:2304.11277).

Between steps a parameter is a DTensor cut along its first dimension, and so are its gradient and its optimizer state. While a
layer is at work its parameters are plain whole tensors, fetched before its forward and its backward pass and freed after them.
The root (embeddings, last norm, head) stays whole from the forward to the backward pass, because objectives call the head after
the model: passes without a backward one end with `release`. All ranks must run the same passes in the same order.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


def shard(model: nn.Module, device: torch.device) -> None:
    """Cuts the model's parameters over all ranks, in place and layer by layer, and moves each rank's rows to `device`.

    Gradients are added over ranks, not averaged: objectives divide by counts over all ranks before the backward pass. They are
    added after every micro-batch: nothing whole is kept between two.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if device.type == "cpu":
        _give_freed_memory_back()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*layers(model), model):
        wrapped: Any = fully_shard(module, mesh=mesh)
        wrapped.set_gradient_divide_factor(1.0)
        wrapped.set_force_sum_reduction_for_comms(True)  # gloo can add and nothing else


def _give_freed_memory_back() -> None:
    """Has glibc map every tensor above 1 MiB by itself. Whole layers come and go in each pass, and the heap keeps what they
    leave: 1.4 GB in place of 0.8 for a model of 58M parameters on two ranks, more than one rank alone needs."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def layers(model: nn.Module) -> list[nn.Module]:
    """The model's layers: its outermost list of as many modules as the config has layers. Empty where there is none."""
    count = model.config.num_hidden_layers  # type: ignore[union-attr]
    return next((list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count), [])


def is_sharded(model: nn.Module) -> bool:
    return any(True for _ in _wrapped(model))


def _wrapped(model: nn.Module) -> Iterator[Any]:
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        yield from (m for m in model.modules() if isinstance(m, FSDPModule))


def release(model: nn.Module) -> None:
    """Frees what a pass without a backward one has left whole. Nothing to do for a model that is not sharded."""
    for module in _wrapped(model):
        module.reshard()


def leaves(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a backward pass reaches: in a sharded model not those of `parameters()`, but the whole tensors that
    stand in for them. Their gradients are this rank's own. Fetches every layer once."""
    if not is_sharded(model):
        return list(model.parameters())
    found = []
    for module in _wrapped(model):
        module.unshard()
        found += [p for p in module.parameters() if not is_shard(p)]  # what other modules hold is cut
        module.reshard()
    return found


def most(model: nn.Module, count: int) -> int:
    """The largest `count` of any rank where the model is sharded, else `count`: how often all of them have to run a layer."""
    if not is_sharded(model):
        return count
    largest = torch.tensor(count)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def is_shard(x: Tensor) -> bool:
    """True for a tensor of which this rank holds some rows."""
    return hasattr(x, "placements")


def local(x: Tensor) -> Tensor:
    """The rows of x that this rank holds, in the same memory: [n,..], n may be 0. x itself where it is whole."""
    return x.to_local() if is_shard(x) else x  # type: ignore[attr-defined,no-any-return]


def rows(x: Tensor) -> slice | None:
    """Which rows of the whole tensor those are; None where it is whole."""
    if not is_shard(x):
        return None
    mesh = _mesh(x)
    size = -(-len(x) // mesh.size())
    start = min(mesh.get_local_rank() * size, len(x))
    return slice(start, min(start + size, len(x)))


def like(x: Tensor, own: Tensor) -> Tensor:
    """A tensor of x's shape, cut as x is, of which this rank holds the rows `own`. `own` itself where x is whole."""
    if not is_shard(x):
        return own
    from torch.distributed.tensor import DTensor

    placements = x.placements  # type: ignore[attr-defined]
    return DTensor.from_local(own, _mesh(x), placements, run_check=False, shape=x.shape, stride=x.stride())


def whole(x: Tensor) -> Tensor:
    """All rows of x, on every rank. Every rank takes part."""
    return x.full_tensor() if is_shard(x) else x  # type: ignore[attr-defined,no-any-return]


def whole_stack(x: Tensor, own: list[Tensor]) -> Tensor:
    """Tensors of x's shape, cut as x is, of which this rank holds `own`: all of each, [n, *x.shape], in one exchange."""
    part = torch.stack(own)
    if not is_shard(x):
        return part
    mesh = _mesh(x)
    size = -(-len(x) // mesh.size())
    mine = part.new_zeros(len(own), size, *x.shape[1:])
    mine[:, : part.shape[1]] = part
    gathered = [torch.empty_like(mine) for _ in range(mesh.size())]
    dist.all_gather(gathered, mine, group=mesh.get_group())
    return torch.cat(gathered, 1)[:, : len(x)]


@torch.no_grad()
def collected(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors by name. Those that are cut are put together one by one in the CPU's memory of rank 0; to other ranks they
    come empty. One that has several names is one tensor. Every rank takes part."""
    out: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}
    for name, x in tensors:
        if id(x) not in made:
            full = whole(x).detach()
            made[id(x)] = full if not is_shard(x) else full.cpu() if dist.get_rank() == 0 else full.new_empty(0)
        out[name] = made[id(x)]
    return out


def _mesh(x: Tensor) -> Any:
    return x.device_mesh  # type: ignore[attr-defined]
