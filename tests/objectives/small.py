"""Small prompt groups whose every number comes from arithmetic, and two small policies: a table of bigrams and a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tests import tiny
from tutelage.data.groups.groups import Completion, Layout, PromptGroup
from tutelage.data.groups.source import GroupSource
from tutelage.models.decoder import Decoder
from tutelage.models.heads import LmHead
from tutelage.models.interface import Batch, Output

VOCABULARY = 31
SHAPE = tiny.shape(vocab_size=VOCABULARY, initializer_range=0.2)

# Every method with settings that are not its defaults, so that one which is not passed on is seen
PREFERENCES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.3}, "cdpo": {"beta": 0.3, "label_smoothing": 0.2}, "robust": {"beta": 0.3, "label_smoothing": 0.2},
    "dpo_norm": {"beta": 2.0}, "ipo": {"beta": 0.4}, "hinge": {"beta": 0.3}, "exo_pair": {"beta": 0.3, "label_smoothing": 0.01},
    "discopop": {"beta": 0.2, "tau": 0.3}, "nca_pair": {"beta": 0.3}, "sppo_hard": {"beta": 0.2}, "apo_zero": {"beta": 0.3},
    "apo_down": {"beta": 0.3}, "orpo": {"beta": 0.7, "prompts": True}, "simpo": {"beta": 1.5, "gamma": 0.4},
    "cpo": {"beta": 0.3, "sft": 0.5}, "cpo_simpo": {"beta": 1.5, "gamma": 0.4},
}  # fmt: skip
METHODS = PREFERENCES | {"kto": {"beta": 0.3, "desirable_weight": 1.25, "undesirable_weight": 0.5}}


class Made:
    """Prompt groups in a list."""

    def __init__(self, prompt_groups: Sequence[PromptGroup]) -> None:
        self.prompt_groups, self.digest = list(prompt_groups), "made"

    def __len__(self) -> int:
        return len(self.prompt_groups)

    def __getitem__(self, i: int) -> PromptGroup:
        return self.prompt_groups[i]

    def sizes(self, layout: Layout) -> np.ndarray:
        return np.array([f.size(layout) for f in self.prompt_groups])


def text(*keys: int, size: int) -> np.ndarray:
    a, b = sum(k * (7 + 4 * i) for i, k in enumerate(keys)), 3 + sum(keys)
    return np.array([(a + b * j + j * j) % VOCABULARY for j in range(size)])


def pairs(count: int = 8) -> list[PromptGroup]:
    """Prompts of 1 to 8 tokens; answers of 1 to 7, of which some tokens are not supervised. References are a little off."""
    out = []
    for i in range(count):
        sizes, completions = (1 + (i * 3) % 7, 1 + (i * 5 + 2) % 6), []
        for side, size in enumerate(sizes):
            mask = None if i % 3 else np.array([j == 0 or (i + j + side) % 4 != 0 for j in range(size)]).astype(np.uint8)
            supervised = size if mask is None else int(mask.sum())
            reference = -3.4 * supervised + ((i * 5 + side * 3) % 7 - 3) * 0.9
            completions.append(
                Completion(text(i, side, 1, size=size), mask, per_completion={"reference": reference, "margin": 0.25 * (i % 4)})
            )
        out.append(PromptGroup(f"p{i}", text(i, size=1 + (i * 5) % 8), tuple(completions)))
    return out


def rated(count: int = 8, wanted: Sequence[int] = (1, 0, 1, 1, 0)) -> list[PromptGroup]:
    """Judged answers, each with the answer of the prompt group before."""
    answers = [text(i, 2, 1, size=1 + (i * 3) % 7) for i in range(count)]
    out = []
    for i in range(count):
        good = wanted[i % len(wanted)]
        completions = tuple(
            Completion(
                answers[k],
                per_completion={"reference": -4.5 * len(answers[k]) + ((i * 5 + n * 3) % 7 - 3) * 0.5, "desirable": good},
            )
            for n, k in enumerate((i, i - 1))
        )
        out.append(PromptGroup(f"r{i}", text(i, size=1 + (i * 5) % 8), completions))
    return out


def prompt_groups(method: str, count: int = 8) -> list[PromptGroup]:
    return rated(count) if method == "kto" else pairs(count)


def source(method: str, made: Sequence[PromptGroup] | None = None, *, micro_tokens: int = 10**6, **change: Any) -> GroupSource:
    made = prompt_groups(method) if made is None else made
    settings = {"per_step": len(made), "layout": "tree", "seed": 0, "unit": "answers" if method == "kto" else "pairs", **change}
    return GroupSource(Made(made), micro_tokens=micro_tokens, **settings)


def decoder(seed: int = 3, dtype: torch.dtype = torch.float64) -> Decoder:
    return tiny.model(seed, dtype, **SHAPE)


class Bigrams(nn.Module):
    """A policy that looks one token back: log-probabilities are rows of a table, so that a person can add them up."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.lm_head = LmHead(nn.Parameter(torch.eye(len(table), dtype=table.dtype), requires_grad=False))

    def forward(self, batch: Batch) -> Output:
        return Output(self.table[batch.ids])


def logprobs(policy: nn.Module, group: PromptGroup, number: int) -> np.ndarray:
    """Of the supervised tokens of a completion, from a plain pass over its text alone; -1: of a prompt's tokens but the first."""
    if number < 0:
        group, number = PromptGroup("", group.prompt[:1], (Completion(group.prompt[1:]),)), 0
    completion = group.completions[number]
    ids = group.prompt.tolist() + completion.ids.tolist()
    batch = Batch.of([ids])
    with torch.no_grad():
        hidden = policy(batch).hidden[0]
        rows = policy.lm_head.logits(hidden).double().log_softmax(-1)
    at = np.arange(len(completion.ids)) if completion.mask is None else np.flatnonzero(completion.mask)
    return np.array([rows[len(group.prompt) + j - 1, ids[len(group.prompt) + j]].item() for j in at])
