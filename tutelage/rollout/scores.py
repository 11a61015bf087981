"""Per-token numbers from models that are not being trained: reference, old policy, value model."""

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
    prompt_groups: Sequence[PromptGroup],
    measure: Callable[[Batch], Tensor],
    layout: Layout,
    micro_tokens: int,
    device: torch.device,
) -> list[list[Floats]]:
    """One number per token for each completion, 0 where its mask is 0. `measure` returns [N] for a batch."""
    parts = [(i, part) for i, prompt_group in enumerate(prompt_groups) for part in pieces(prompt_group, layout, micro_tokens)]
    found: dict[int, list[Floats]] = {}
    for group in bins([part.size(layout) for _, part in parts], micro_tokens)[0]:
        chosen = [parts[g] for g in group]
        values = measure(collate([part for _, part in chosen], layout).to(device)).float().cpu().numpy()
        at = 0
        for g, (_, part) in zip(group, chosen, strict=True):
            rows = []
            for completion in part.completions:
                row = np.zeros(len(completion.ids), np.float32)
                picked = np.arange(len(row)) if completion.mask is None else np.flatnonzero(completion.mask)
                row[picked] = values[at : at + len(picked)]
                at += len(picked)
                rows.append(row)
            found[g] = rows
    out: list[list[Floats]] = [[] for _ in prompt_groups]
    for g, (i, _) in enumerate(parts):
        out[i] += found[g]
    return out


def pieces(prompt_group: PromptGroup, layout: Layout, micro_tokens: int) -> list[PromptGroup]:
    """The group split into parts of at most `micro_tokens` tokens, or of one completion: completions are independent."""
    out: list[list[Completion]] = []
    each = len(prompt_group.prompt) if layout != "tree" else 0
    room = 0
    for completion in prompt_group.completions:
        size = len(completion.ids) + each
        if size > room or not out:
            out.append([])
            room = micro_tokens - (len(prompt_group.prompt) if layout == "tree" else 0)
        out[-1].append(completion)
        room -= size
    return [PromptGroup(prompt_group.name, prompt_group.prompt, tuple(completions)) for completions in out]
