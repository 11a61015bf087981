"""The engines that a server can run its models with."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tutelage.engine.protocol import EngineProtocol
from tutelage.errors import ConfigError
from tutelage.serve.options import Options

SLOTS = 16  # of our engine


def open_engine(folder: Path, options: Options) -> tuple[EngineProtocol, Any]:
    """The engine of a model folder, and its renderer. Raises `ArtifactError` for a folder that is no model, or a draft whose
    tokens are others."""
    from tutelage.chat.render import Renderer

    renderer = Renderer(folder)
    return ENGINES[options.engine](folder, renderer, options), renderer


def check_engine(options: Options, models: int = 1, adapters: int = 0) -> None:
    """Raises `ConfigError` for an engine that there is not, and naming what the engine does not have."""
    if options.engine not in ENGINES:
        raise ConfigError("no such engine", field="engine", found=options.engine, expected=" or ".join(ENGINES))
    if options.engine == "tutelage":
        _check_device(options.device)
        if not (math.isfinite(options.cache_gib) and options.cache_gib > 0):
            raise ConfigError(
                "not an amount of memory", field="cache_gib", found=options.cache_gib, expected="a number of GiB, such as 2",
                fix="leave it out for 2",
            )  # fmt: skip
        if options.vllm:
            raise ConfigError("these are arguments of vLLM", field="vllm", found=dict(options.vllm), fix="add --engine vllm")
        return
    for name, asked in (
        ("speculate", options.speculate), ("draft", options.draft), ("batch_invariant", options.batch_invariant),
        ("adapter", adapters), ("device", options.device != "cpu" and options.device),
    ):  # fmt: skip
        if asked:
            raise ConfigError("only our own engine has this", field=name, found=asked, fix="leave it out, or --engine tutelage")
    if models > 1:
        raise ConfigError(
            "vLLM takes a device's memory for one model", field="engine", found=f"{models} models",
            fix="start a server for each, or --engine tutelage",
        )  # fmt: skip


def _check_device(name: str) -> None:
    """Raises `ConfigError` for a device that there is not."""
    import torch

    try:
        device = torch.device(name)
        there = device.type == "cpu" or (
            device.type == "cuda" and torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
        )
    except RuntimeError:
        there = False
    if not there:
        raise ConfigError(
            "no such device here", field="device", found=name, expected="cpu, or cuda where there is a GPU", fix="--device cpu"
        )


def _tutelage(folder: Path, renderer: Any, options: Options) -> EngineProtocol:
    from tutelage.chat.render import Renderer
    from tutelage.engine import Engine
    from tutelage.models.open import load

    draft = None
    if options.draft is not None:
        renderer.tokenizer.check_same(Renderer(options.draft).tokenizer)
        draft = load(options.draft, device=options.device)
    return Engine(
        load(folder, device=options.device), renderer, options.slots or SLOTS, options.max_length, seed=secrets.randbits(31),
        dtype=options.dtype or "float32", prefix_cache=options.prefix_cache, speculate=options.speculate, draft=draft,
        batch_invariant=options.batch_invariant, cache_bytes=int(options.cache_gib * 2**30),
    )  # fmt: skip


def _vllm(folder: Path, renderer: Any, options: Options) -> EngineProtocol:
    from tutelage.engine.vllm.engine import VllmEngine

    return VllmEngine(
        folder, renderer, options.slots, options.max_length, dtype=options.dtype or "stored", prefix_cache=options.prefix_cache,
        **options.vllm,
    )  # fmt: skip


ENGINES: dict[str, Callable[[Path, Any, Options], EngineProtocol]] = {"tutelage": _tutelage, "vllm": _vllm}
