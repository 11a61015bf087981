"""Texts as unit vectors."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch

from tutelage.models.interface import Batch


def embed(model: Any, device: torch.device, prompts: Seq[Seq[int]]) -> list[np.ndarray]:
    """For each list of token ids the mean of its last hidden states, float32 [H], of length 1. One forward pass, but one for each
    text where angles follow the length of a row (`Traits.cache_limit`)."""
    if len(prompts) > 1 and model.traits.cache_limit is not None:
        return [vector for ids in prompts for vector in embed(model, device, [ids])]
    batch = Batch.of([list(ids) for ids in prompts], device=device)
    hidden = model(batch).hidden.float()  # [B,T,H]
    real = (batch.segments != 0)[..., None]
    mean = hidden.masked_fill(~real, 0).sum(1) / real.sum(1)
    return list(torch.nn.functional.normalize(mean, dim=-1).cpu().numpy())
