"""Texts as unit vectors."""

from __future__ import annotations

import numpy as np
import torch

from tutelage.engine import Engine
from tutelage.engine.engine import ContextOverflow
from tutelage.errors import DataError
from tutelage.models.interface import Batch


def check(engine: Engine, prompts: list[list[int]]) -> None:
    """Raises `ContextOverflow` for a text longer than the context, `DataError` for an unknown token."""
    for ids in prompts:
        if len(ids) > engine.context_length:
            raise ContextOverflow(
                "longer than the context", found=f"{len(ids)} tokens", expected=f"at most {engine.context_length}"
            )
        if wrong := [token for token in ids if not 0 <= token < engine.vocab_size]:
            raise DataError("no such token", found=wrong[0], expected=f"ids from 0 to {engine.vocab_size - 1}")


@torch.inference_mode()
def embed(engine: Engine, prompts: list[list[int]]) -> list[np.ndarray]:
    """For each list of token ids the mean of its last hidden states, float32 [H], of length 1. One forward pass."""
    batch = Batch.of(prompts, device=engine.device)
    hidden = engine.model(batch).hidden.float()  # [B,T,H]
    real = (batch.segments != 0)[..., None]
    mean = hidden.masked_fill(~real, 0).sum(1) / real.sum(1)
    return list(torch.nn.functional.normalize(mean, dim=-1).cpu().numpy())
