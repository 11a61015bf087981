"""Families: a prompt with the answers to it that are judged; and how many of them become one batch.

Where the model can, the prompt of a family is read once for all its answers (`Batch.tree`). Layouts change the cost, never the
result: `tree` (prompts shared), `packed` (every text its own segment, in one row), `rows` (every text a row of its own, padded).
For encoder-decoders there is `pairs`: the prompt is the source of its endings, which begin with the decoder's start token.
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
    """One answer: the tokens that follow the prompt, and what is known of them."""

    ids: npt.NDArray[Any]  # [n] integers
    mask: npt.NDArray[np.uint8] | None = None  # [n]: which are supervised; None: all
    tokens: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)  # streams [n] or [n,k], read where the mask is 1
    whole: Mapping[str, Any] = field(default_factory=dict)  # a number, or a list of them, for the answer

    @property
    def supervised(self) -> int:
        return len(self.ids) if self.mask is None else int(self.mask.sum())


@dataclass(slots=True, frozen=True)
class PromptGroup:
    """A prompt and the answers to it. All endings of a batch bring the same streams."""

    name: str  # of its record
    prompt: npt.NDArray[Any]  # [p] integers, at least one
    endings: tuple[Completion, ...]

    def size(self, layout: Layout) -> int:
        """Tokens that a forward pass reads, padding not counted."""
        tails = sum(len(e.ids) for e in self.endings)
        return tails + len(self.prompt) * (1 if layout == "tree" else len(self.endings))


def collate(families: Sequence[PromptGroup], layout: Layout) -> Batch:
    """The batch of some families; answers in their order. Its `targets` and `weights` are those of prompts, each once; of pairs,
    whose prompts are read and never predicted, those of the endings."""
    build = {"tree": _tree, "packed": _packed, "rows": _rows, "pairs": _pairs}[layout]
    batch, firsts = build(families)
    if layout != "pairs":
        targets, weights = _prompts(families, firsts, batch.shape)
        batch = replace(batch, targets=targets, weights=weights)
    names = tuple(f.name for f in families)
    return replace(batch, answers=_answers(families, firsts), rows=(names,) * batch.shape[0])


# Where the tokens of an answer's text are: (place of the prompt's last token, place of the answer's first one)
Firsts = list[tuple[int, int]]


def _tree(families: Sequence[PromptGroup]) -> tuple[Batch, Firsts]:
    batch = Batch.of_families([(f.prompt.tolist(), [e.ids.tolist() for e in f.endings]) for f in families])
    firsts, at = [], 0
    for family in families:
        at += len(family.prompt)
        last = at - 1
        for ending in family.endings:
            firsts.append((last, at))
            at += len(ending.ids)
    return batch, firsts


def _packed(families: Sequence[PromptGroup]) -> tuple[Batch, Firsts]:
    texts: list[tuple[list[int], list[list[int]]]] = [
        (f.prompt.tolist() + e.ids.tolist(), []) for f in families for e in f.endings
    ]
    firsts: Firsts = []
    at = 0
    for family in families:
        for ending in family.endings:
            firsts.append((at + len(family.prompt) - 1, at + len(family.prompt)))
            at += len(family.prompt) + len(ending.ids)
    return Batch.of_families(texts), firsts


def _rows(families: Sequence[PromptGroup]) -> tuple[Batch, Firsts]:
    batch = Batch.of([f.prompt.tolist() + e.ids.tolist() for f in families for e in f.endings])
    width = batch.shape[1]
    firsts: Firsts = []
    for family in families:
        for _ in family.endings:
            first = len(firsts) * width + len(family.prompt)
            firsts.append((first - 1, first))
    return batch, firsts


def _prompts(families: Sequence[PromptGroup], firsts: Firsts, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets [B,T] and weights [B,T]: where the next token is one of a prompt. A prompt's first token is never predicted."""
    targets, weights = torch.zeros(shape[0] * shape[1], dtype=torch.int64), torch.zeros(shape[0] * shape[1])
    number = 0
    for family in families:
        last = firsts[number][0]
        first = last - len(family.prompt) + 1
        targets[first:last] = torch.from_numpy(family.prompt[1:].astype(np.int64))
        weights[first:last] = 1.0
        number += len(family.endings)
    return targets.view(shape), weights.view(shape)


def _pairs(families: Sequence[PromptGroup]) -> tuple[Batch, Firsts]:
    pairs = [(f.prompt.tolist(), e) for f in families for e in f.endings]
    masks = [np.ones(len(e.ids)) if e.mask is None else e.mask for _, e in pairs]
    batch = Batch.of([e.ids.tolist() for _, e in pairs], supervised=[m.tolist() for m in masks])
    sources = Batch.of([source for source, _ in pairs])
    firsts = [(row * batch.shape[1], row * batch.shape[1]) for row in range(len(pairs))]
    return replace(batch, source_ids=sources.ids, source_segments=sources.segments), firsts


def _answers(families: Sequence[PromptGroup], firsts: Firsts) -> Answers:
    endings = [e for f in families for e in f.endings]
    places, targets, owner, last = [], [], [], []
    tokens: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in endings[0].tokens}
    for number, (ending, (before, first)) in enumerate(zip(endings, firsts, strict=True)):
        size = len(ending.ids)
        picked = np.arange(size) if ending.mask is None else np.flatnonzero(ending.mask)
        where = np.where(picked == 0, before, first + picked - 1)
        places.append(where)
        targets.append(ending.ids[picked].astype(np.int64))
        owner.append(np.full(len(picked), number))
        last.append(first + size - 1 if size else before)
        for name, streams in tokens.items():
            streams.append(_stream(ending.tokens[name])[picked])
    whole = {name: [e.whole[name] for e in endings] for name in endings[0].whole}
    return Answers(
        _joined(places),
        _joined(targets),
        _joined(owner),
        torch.tensor(last),
        {name: torch.from_numpy(np.concatenate(streams)) for name, streams in tokens.items()},
        {name: torch.tensor(values, dtype=torch.float32) for name, values in whole.items()},
    )


def _stream(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Token ids stay whole numbers; what is measured is float32."""
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
