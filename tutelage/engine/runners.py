"""Which runner a model gets."""

from __future__ import annotations

from typing import Any

import torch

from tutelage.engine.graphs import GraphRunner
from tutelage.engine.hf_runner import HfRunner
from tutelage.engine.runner import CachedRunner, FusedRunner, RecomputingRunner, Runner
from tutelage.errors import ConfigError
from tutelage.models import kernels
from tutelage.models.interface import KVCache
from tutelage.models.kernels.decoder import FusedDecoder


def make_runner(model: Any, cache: KVCache | None, device: torch.device, invariant: bool, dtype: str) -> Runner:
    """The fastest way to run a model. Raises `ConfigError` where only our kernels could do what is asked."""
    if dtype not in ("float32", "int8"):
        raise ConfigError("no such type of weights", field="dtype", found=dtype, expected="float32 or int8")
    fused = FusedDecoder.of(model, cache, dtype)
    if fused is not None:
        return FusedRunner(fused, invariant)
    if invariant or dtype != "float32":
        raise ConfigError(
            "our kernels cannot run this model as a whole", field="batch_invariant" if invariant else "dtype",
            found=kernels.why_not() or "a model or device that they do not know",
            expected="one of our decoder families in float32 on a CPU, and a C++ compiler",
        )  # fmt: skip
    if cache is not None:
        graphs = GraphRunner.of(model, cache) if device.type == "cuda" else None
        return graphs or CachedRunner(model, cache)
    return HfRunner.of(model, device) or RecomputingRunner(model, device)
