"""Loads our decoder, with its weights, from a model folder of one of our families. `transformers` is not imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.models import families
from tutelage.models.config import DecoderConfig
from tutelage.models.decoder import Decoder
from tutelage.models.folder import check_tensors, open_tensors
from tutelage.models.names import stored
from tutelage.models.unfilled import unfilled


def load_decoder(folder: Path, raw: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Decoder:
    config = DecoderConfig.from_hf(raw, folder / "config.json")
    with unfilled():
        model = Decoder(config).to(dtype)
    fill(model, folder, config, device, dtype)
    model.tie()
    return model.eval()


def fill(model: nn.Module, folder: Path, config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Gives a model of our families, which may be on "meta", the weights of `folder`: all there are, and no others."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    disk = families.family(config.model_type).disk
    wanted = stored(disk, list(shapes))
    with open_tensors(folder, disk.prefix, wanted) as files:
        check_tensors(files, folder, wanted, shapes, tied=config.tie_word_embeddings)
        state: dict[str, Tensor] = {}
        for row in wanted:
            for name, part in row.split(files.tensor(row.name), shapes):
                # A copy of its own: a view of the mapped file would change or vanish with the file.
                state[name] = part.to(device, dtype, copy=not files.copies, memory_format=torch.contiguous_format)
    model.load_state_dict(state, strict=False, assign=True)
