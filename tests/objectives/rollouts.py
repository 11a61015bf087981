"""Answers of a tiny model with the streams of reinforcement learning, made by arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from tests import tiny
from tutelage.data.groups.groups import Completion, PromptGroup
from tutelage.models.config import DecoderConfig
from tutelage.models.init import build
from tutelage.models.interface import Batch

VOCABULARY = 61
LONGEST = 12  # tokens of an answer, at most
SHAPE = tiny.shape(vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.1)


def policy(dtype: torch.dtype = torch.float32) -> nn.Module:
    return build(DecoderConfig.from_hf(SHAPE), 5).to(dtype)


class Value(nn.Module):
    """A scorer that needs no context: [B*T, 1] float32."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        made = torch.arange(VOCABULARY * 8).reshape(VOCABULARY, 8).mul(0.7).sin()
        self.table, self.out = nn.Embedding.from_pretrained(made.to(dtype), freeze=False), nn.Linear(8, 1).to(dtype)
        nn.init.constant_(self.out.weight, 0.3)
        nn.init.zeros_(self.out.bias)

    def forward(self, batch: Batch) -> torch.Tensor:
        scores: torch.Tensor = self.out(self.table(batch.ids.flatten())).float()
        return scores


def wave(count: int, phase: float, size: float = 1.0) -> np.ndarray:
    """Numbers of either sign that no generator stands behind."""
    return (size * np.sin(phase + 1.3 * np.arange(count) ** 1.1)).astype(np.float32)


def prompt_groups(weight: str = "length", groups: int = 6, samples: int = 2) -> list[PromptGroup]:
    """Answers of 3 to 12 tokens, the second of each group with a tool's words in it. Old log-probabilities lie around those
    of a model that knows nothing, log(1/V), far enough for ratios beyond any clip."""
    out, level = [], -float(np.log(VOCABULARY))
    for g in range(groups):
        completions = []
        for s in range(samples):
            number = g * samples + s
            n = 3 + (number * 5) % (LONGEST - 2)
            ids = (np.arange(n) ** 2 * 7 + number * 13 + 3) % VOCABULARY
            mask = None if s != 1 else (np.arange(n) % 4 != 2).astype(np.uint8)
            count = n if mask is None else int(mask.sum())
            streams = {
                "old": level + wave(n, number, 0.5) + wave(1, number * 2.6, 0.4)[0],
                "reference": level + wave(n, number + 0.4, 0.6),
                "advantage": np.full(n, wave(1, number * 1.1 + 0.5)[0]), "correction": 1 + wave(n, number + 0.2, 0.3),
                "weight": np.full(n, {"length": 1 / count, "longest": 1 / LONGEST, "sum": 1, "token": 1}[weight], np.float32),
                "value_old": wave(n, number + 0.9, 0.5), "return": wave(n, number + 1.8, 1.5),
            }  # fmt: skip
            completions.append(Completion(ids, mask, streams, {}))
        prompt = (np.arange(4 + g) * 11 + g) % VOCABULARY
        out.append(PromptGroup(f"r{g}", prompt, tuple(completions)))
    return out


def changed(made: list[PromptGroup], change: Any) -> list[PromptGroup]:
    """The prompt groups with the streams that `change(prompt group, completion)` gives."""
    return [
        PromptGroup(f.name, f.prompt, tuple(Completion(e.ids, e.mask, change(f, e), e.per_completion) for e in f.completions))
        for f in made
    ]


def without(made: list[PromptGroup], *names: str) -> list[PromptGroup]:
    """The same prompt groups without some of their streams."""
    return changed(made, lambda f, e: {k: v for k, v in e.tokens.items() if k not in names})


def replaced(made: list[PromptGroup], **streams: Any) -> list[PromptGroup]:
    """The same prompt groups with streams that a function (prompt group, completion) -> [n], or a number, makes."""

    def values(prompt_group: PromptGroup, completion: Completion) -> dict[str, np.ndarray]:
        found = {k: v(prompt_group, completion) if callable(v) else np.full(len(completion.ids), v) for k, v in streams.items()}
        return {**completion.tokens, **{k: np.asarray(v, np.float32) for k, v in found.items()}}

    return changed(made, values)
