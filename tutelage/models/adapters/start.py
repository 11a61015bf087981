"""A model to train with an adapter: a new one on a base, or the one in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tutelage import log
from tutelage.artifacts import base_of, is_adapter
from tutelage.config.adapter import Adapter
from tutelage.errors import ConfigError, Setting
from tutelage.models.adapters.attach import attach_adapter
from tutelage.models.adapters.folder import OURS, adapter_section, check_base, kind_of, load_adapter, quantized_as, read_config
from tutelage.models.folder import refuse_scorer
from tutelage.models.open import load


def start_with_adapter(folder: Path, config: Adapter, device: torch.device, seed: int, sharded: bool = False) -> Any:
    """The model in `folder` with a new adapter; or where that is the folder of an adapter, its base with it, to be trained on.

    Raises `ConfigError` for settings that are not those of the adapter in the folder, `ArtifactError` for another base.
    """
    refuse_scorer(folder)
    if sharded and config.quantize != "none":
        raise ConfigError(
            "weights in 4 bits are not sharded over ranks", field="adapter.quantize", found=config.quantize, expected="none",
            fix=f"use {Setting('shard', 'none')}, where every rank holds the small base",
        )  # fmt: skip
    if sharded and config.embeddings:
        raise ConfigError(
            "embeddings trained with an adapter are not sharded over ranks", field="adapter.embeddings", found=True,
            expected="false", fix=f"use {Setting('shard', 'none')}",
        )  # fmt: skip
    if not is_adapter(folder):
        model = attach_adapter(load(folder, device=device), config, seed)
        model.attached_adapter.base = folder
        return model
    kind, raw = kind_of(folder), read_config(folder)
    held = adapter_section(raw, kind, quantized_as(folder))
    for name, field in Adapter.model_fields.items():
        asked, own = getattr(config, name), getattr(held, name)
        fixed = name in ("kind", "rank", "alpha", "rslora", "embeddings") or (name == "quantize" and (folder / OURS).is_file())
        if fixed and asked != own and (name == "kind" or asked != field.default):
            raise ConfigError(
                "the adapter that is trained on is another", field=f"adapter.{name}", found=asked,
                expected=f"{own}, as in {folder}",
                fix="leave it out to keep the adapter's own, or merge the adapter with `tutelage merge` and begin a new one",
            )  # fmt: skip
    base = base_of(folder)
    check_base(folder, base)
    quantize = config.quantize if config.quantize != "none" else held.quantize
    log.say(f"training on the adapter of {folder} ({kind}), on its base {base}")
    model = load_adapter(folder, load(base, device=device), quantize=quantize)
    model.attached_adapter.base = base
    return model
