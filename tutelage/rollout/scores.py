"""What models that are not being trained say of every token of some answers: references, old policies, values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tutelage.data.groups.groups import Completion, Layout, PromptGroup, bins, collate
from tutelage.models.interface import Batch

Floats = npt.NDArray[np.float32]


@torch.no_grad()
def by_token(
    families: Sequence[PromptGroup], measure: Callable[[Batch], Tensor], layout: Layout, micro_tokens: int, device: torch.device
) -> list[list[Floats]]:
    """For each ending of each family one number a token [n]; 0 where its mask is 0. `measure` gives [N] for a batch."""
    parts = [(i, part) for i, family in enumerate(families) for part in pieces(family, layout, micro_tokens)]
    found: dict[int, list[Floats]] = {}
    for group in bins([part.size(layout) for _, part in parts], micro_tokens)[0]:
        chosen = [parts[g] for g in group]
        values = measure(collate([part for _, part in chosen], layout).to(device)).float().cpu().numpy()
        at = 0
        for g, (_, part) in zip(group, chosen, strict=True):
            rows = []
            for ending in part.endings:
                row = np.zeros(len(ending.ids), np.float32)
                picked = np.arange(len(row)) if ending.mask is None else np.flatnonzero(ending.mask)
                row[picked] = values[at : at + len(picked)]
                at += len(picked)
                rows.append(row)
            found[g] = rows
    out: list[list[Floats]] = [[] for _ in families]
    for g, (i, _) in enumerate(parts):
        out[i] += found[g]
    return out


def pieces(family: PromptGroup, layout: Layout, micro_tokens: int) -> list[PromptGroup]:
    """The family in parts of at most so many tokens, or of one ending: answers do not know of one another."""
    out: list[list[Completion]] = []
    each = len(family.prompt) if layout != "tree" else 0
    room = 0
    for ending in family.endings:
        size = len(ending.ids) + each
        if size > room or not out:
            out.append([])
            room = micro_tokens - (len(family.prompt) if layout == "tree" else 0)
        out[-1].append(ending)
        room -= size
    return [PromptGroup(family.name, family.prompt, tuple(endings)) for endings in out]
