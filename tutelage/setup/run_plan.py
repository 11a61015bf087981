"""Time and memory of a training, said before its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tutelage import log
from tutelage.config.train import Loop
from tutelage.models import kernels
from tutelage.models.adapters.attach import ParameterCount, adapter_of
from tutelage.plan.flops import train_flops_per_token
from tutelage.plan.machine import Machine
from tutelage.plan.memory import Memory, frozen
from tutelage.plan.memory import estimate as memory
from tutelage.plan.time import explain
from tutelage.setup.hyperparameters import ranks_sharing

if TYPE_CHECKING:
    from tutelage.setup.trainer import TrainingSpec


def say_plan(config: Loop, work: TrainingSpec, machine: Machine, device: torch.device) -> None:
    """Time and memory, before the first step (promise 11)."""
    flops = work.tokens * operations(config, work) * (1 + work.forward_share)
    log.say(f"time: {explain(flops, machine.peak_flops(device.type, config.dtype), device.type)}")
    rows, row = work.micro
    shares = {name: ParameterCount.of(part) for name, part in work.parts.items() if adapter_of(part) is not None}
    for name, share in shares.items():
        log.say(f"adapter{'' if name == 'policy' else f' of the {name}'}: {share.summary()}")
    need: Memory | None = None
    for name, part in work.parts.items():
        shape = work.shape if need is None else part.config.to_hf()  # type: ignore[operator, union-attr]
        if need is not None and not any(p.requires_grad for p in part.parameters()):
            need = need.with_terms({name: frozen(shape, rows * row, config.dtype, ranks_sharing(config))})
            continue
        own = memory(
            shape, rows, row, config.optimizer.name, config.dtype, config.checkpointing, kernels.available(),
            ranks=ranks_sharing(config), trained=shares[name].trained if name in shares else None,
            quantized=config.adapter.quantize == "nf4",
        )  # fmt: skip
        need = own if need is None else need.with_model(name, own)
    assert need is not None
    need = need.with_terms(work.beside)
    cards = machine.accelerators if device.type == "cuda" else ()
    here = cards[0].memory_bytes if cards else machine.memory_bytes
    log.say(f"memory: {need.explain()}; {here / 1e9:,.0f} GB here{'' if need.low <= here else ': IT WILL NOT FIT'}")


def operations(config: Loop, work: TrainingSpec) -> float:
    """FLOPs of training on one token. Frozen weights have no gradient: two of three products are left."""
    return train_flops_per_token(work.shape, work.length, frozen=config.adapter.kind != "none")
