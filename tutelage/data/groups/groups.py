"""Prompt groups (a prompt with its completions) and how they are collated into one batch.

Where the model can, the prompt of a group is read once for all its answers (`Batch.tree`). Layouts change the cost, never the
result: `tree` (prompts shared), `packed` (every text its own segment, in one row), `rows` (every text a row of its own, padded).
For encoder-decoders there is `pairs`: the prompt is the source of its completions, which begin with the decoder's start token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from tutelage.models.interface import Answers, Batch

Layout = Literal["tree", "packed", "rows", "pairs"]


@dataclass(slots=True, frozen=True)
class Completion:
    """The tokens that follow a prompt, with named values for each token and for the whole completion."""

    ids: npt.NDArray[Any]  # [n] integers
    mask: npt.NDArray[np.uint8] | None = None  # [n]: which are supervised; None: all
    tokens: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)  # streams [n] or [n,k], read where the mask is 1
    per_completion: Mapping[str, Any] = field(default_factory=dict)  # name -> a number, or a list of numbers

    @property
    def supervised(self) -> int:
        return len(self.ids) if self.mask is None else int(self.mask.sum())


@dataclass(slots=True, frozen=True)
class PromptGroup:
    """A prompt and its completions. All completions of a batch have values of the same names."""

    name: str  # of its record
    prompt: npt.NDArray[Any]  # [p] integers, at least one
    completions: tuple[Completion, ...]

    def size(self, layout: Layout) -> int:
        """Number of tokens that a forward pass reads, without padding."""
        tails = sum(len(e.ids) for e in self.completions)
        return tails + len(self.prompt) * (1 if layout == "tree" else len(self.completions))


def collate(prompt_groups: Sequence[PromptGroup], layout: Layout) -> Batch:
    """The batch of some groups; answers in their order. Its `targets` and `weights` are those of prompts, each once; of pairs,
    whose prompts are read and never predicted, those of the completions."""
    build = {"tree": _tree, "packed": _packed, "rows": _rows, "pairs": _pairs}[layout]
    batch, firsts = build(prompt_groups)
    if layout != "pairs":
        targets, weights = _prompts(prompt_groups, firsts, batch.shape)
        batch = replace(batch, targets=targets, weights=weights)
    names = tuple(f.name for f in prompt_groups)
    return replace(batch, answers=_answers(prompt_groups, firsts), rows=(names,) * batch.shape[0])


# For each completion: (position of the prompt's last token, position of the completion's first token)
Firsts = list[tuple[int, int]]


def _tree(prompt_groups: Sequence[PromptGroup]) -> tuple[Batch, Firsts]:
    batch = Batch.of_groups([(f.prompt.tolist(), [e.ids.tolist() for e in f.completions]) for f in prompt_groups])
    firsts, at = [], 0
    for prompt_group in prompt_groups:
        at += len(prompt_group.prompt)
        last = at - 1
        for completion in prompt_group.completions:
            firsts.append((last, at))
            at += len(completion.ids)
    return batch, firsts


def _packed(prompt_groups: Sequence[PromptGroup]) -> tuple[Batch, Firsts]:
    texts: list[tuple[list[int], list[list[int]]]] = [
        (f.prompt.tolist() + e.ids.tolist(), []) for f in prompt_groups for e in f.completions
    ]
    firsts: Firsts = []
    at = 0
    for prompt_group in prompt_groups:
        for completion in prompt_group.completions:
            firsts.append((at + len(prompt_group.prompt) - 1, at + len(prompt_group.prompt)))
            at += len(prompt_group.prompt) + len(completion.ids)
    return Batch.of_groups(texts), firsts


def _rows(prompt_groups: Sequence[PromptGroup]) -> tuple[Batch, Firsts]:
    batch = Batch.of([f.prompt.tolist() + e.ids.tolist() for f in prompt_groups for e in f.completions])
    width = batch.shape[1]
    firsts: Firsts = []
    for prompt_group in prompt_groups:
        for _ in prompt_group.completions:
            first = len(firsts) * width + len(prompt_group.prompt)
            firsts.append((first - 1, first))
    return batch, firsts


def _prompts(prompt_groups: Sequence[PromptGroup], firsts: Firsts, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets [B,T] and weights [B,T] of prompt tokens. A prompt's first token is never predicted."""
    targets, weights = torch.zeros(shape[0] * shape[1], dtype=torch.int64), torch.zeros(shape[0] * shape[1])
    number = 0
    for prompt_group in prompt_groups:
        last = firsts[number][0]
        first = last - len(prompt_group.prompt) + 1
        targets[first:last] = torch.from_numpy(prompt_group.prompt[1:].astype(np.int64))
        weights[first:last] = 1.0
        number += len(prompt_group.completions)
    return targets.view(shape), weights.view(shape)


def _pairs(prompt_groups: Sequence[PromptGroup]) -> tuple[Batch, Firsts]:
    pairs = [(f.prompt.tolist(), e) for f in prompt_groups for e in f.completions]
    masks = [np.ones(len(e.ids)) if e.mask is None else e.mask for _, e in pairs]
    batch = Batch.of([e.ids.tolist() for _, e in pairs], supervised=[m.tolist() for m in masks])
    sources = Batch.of([source for source, _ in pairs])
    firsts = [(row * batch.shape[1], row * batch.shape[1]) for row in range(len(pairs))]
    return replace(batch, source_ids=sources.ids, source_segments=sources.segments), firsts


def _answers(prompt_groups: Sequence[PromptGroup], firsts: Firsts) -> Answers:
    completions = [e for f in prompt_groups for e in f.completions]
    places, targets, owner, last = [], [], [], []
    tokens: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in completions[0].tokens}
    for number, (completion, (before, first)) in enumerate(zip(completions, firsts, strict=True)):
        size = len(completion.ids)
        picked = np.arange(size) if completion.mask is None else np.flatnonzero(completion.mask)
        where = np.where(picked == 0, before, first + picked - 1)
        places.append(where)
        targets.append(completion.ids[picked].astype(np.int64))
        owner.append(np.full(len(picked), number))
        last.append(first + size - 1 if size else before)
        for name, streams in tokens.items():
            streams.append(_stream(completion.tokens[name])[picked])
    per_completion = {name: [e.per_completion[name] for e in completions] for name in completions[0].per_completion}
    return Answers(
        _joined(places),
        _joined(targets),
        _joined(owner),
        torch.tensor(last),
        {name: torch.from_numpy(np.concatenate(streams)) for name, streams in tokens.items()},
        {name: torch.tensor(values, dtype=torch.float32) for name, values in per_completion.items()},
    )


def _stream(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Token ids stay integers; measurements become float32."""
    return np.asarray(values, np.int64 if np.issubdtype(values.dtype, np.integer) else np.float32)


def _joined(parts: list[npt.NDArray[Any]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def bins(sizes: Sequence[int], room: int, ranks: int = 1) -> list[list[list[int]]]:
    """For each rank, groups of its items (item i is rank i % ranks's) of at most `room` together, or of one larger item. All
    ranks have equally many groups, each with something in it: sharded models run their layers equally often."""
    own = [list(range(rank, len(sizes), ranks)) for rank in range(ranks)]
    count = max(len(_fitted(sizes, items, room)) for items in own)
    out = []
    for items in own:
        groups = _fitted(sizes, items, room)
        while len(groups) < count:
            largest = max(groups, key=lambda g: (len(g) > 1, sum(sizes[i] for i in g)))
            groups.append([largest.pop()])
        out.append([sorted(g) for g in groups])
    return out


def _fitted(sizes: Sequence[int], items: Sequence[int], room: int) -> list[list[int]]:
    """First fit, largest items first."""
    groups: list[list[int]] = []
    left: list[int] = []
    for i in sorted(items, key=lambda i: (-sizes[i], i)):
        for number, space in enumerate(left):
            if sizes[i] <= space:
                groups[number].append(i)
                left[number] -= sizes[i]
                break
        else:
            groups.append([i])
            left.append(room - sizes[i])
    return groups
