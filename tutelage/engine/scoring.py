"""Scoring: log-probabilities of given tokens, packed without padding. A beginning that several requests share is read once.

Shapes: n tokens scored, k alternatives, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.models.interface import Batch

SCORE_TOKENS = 4096
"""Tokens of one forward pass."""
SCORE_LOGITS = 1 << 24
"""Logits held at a time (64 MiB of float32) while an encoder-decoder scores targets."""
SHARED_TOKENS = 16
"""Tokens from which a beginning that several requests have is read once."""

Request = tuple[Seq[int], int]  # ids, and the place of the first one that is scored


@dataclass(slots=True, frozen=True)
class Scored:
    """Log-probabilities of given tokens. n is the number of tokens scored."""

    logprobs: np.ndarray  # [n] float32
    top_ids: np.ndarray  # [n,k] int64: the most likely tokens at each place, best first
    top_logprobs: np.ndarray  # [n,k] float32
    ranks: np.ndarray  # [n] int64: 1 for the most likely token; empty where k is 0


def score(model: Any, device: torch.device, requests: Seq[Request], top: int) -> list[Scored]:
    """Log-probabilities of ids[start:], each given all ids before it. Results in the order of `requests`."""
    steady = model.traits.cache_limit is None
    prompt_groups = _groups_of(requests, shared=steady and model.traits.cache)
    out: dict[int, Scored] = {}
    # Where angles follow the length of a row, each text has one to itself.
    for pack in _packs(prompt_groups) if steady else [[f] for f in prompt_groups]:
        out |= _score_pack(model, device, requests, pack, top)
    return [out[i] if i in out else _empty(top) for i in range(len(requests))]


@dataclass(slots=True, frozen=True)
class _Group:
    """Requests whose tokens before the first scored one are the same, or one request alone."""

    members: list[int]
    beginning: Seq[int]
    completions: list[Seq[int]]  # without the last token of each, which predicts nothing

    @property
    def size(self) -> int:
        return len(self.beginning) + sum(map(len, self.completions))


def _groups_of(requests: Seq[Request], shared: bool) -> list[_Group]:
    """All requests that score anything; together those with the same beginning, where that pays."""
    found: dict[tuple[int, ...], list[int]] = {}
    alone: list[int] = []
    for i, (ids, start) in enumerate(requests):
        if len(ids) > start:
            if shared and start >= SHARED_TOKENS:
                found.setdefault(tuple(ids[:start]), []).append(i)
            else:
                alone.append(i)
    prompt_groups = [_Group([i], requests[i][0][:-1], []) for i in alone]
    for beginning, members in found.items():
        if len(members) == 1:
            prompt_groups.append(_Group(members, requests[members[0]][0][:-1], []))
        else:
            prompt_groups.append(_Group(members, beginning, [requests[i][0][len(beginning) : -1] for i in members]))
    return prompt_groups


def _packs(prompt_groups: list[_Group]) -> list[list[_Group]]:
    """Prompt groups of similar size together, as many as have SCORE_TOKENS tokens."""
    packs: list[list[_Group]] = []
    room = 0
    for prompt_group in sorted(prompt_groups, key=lambda f: f.size, reverse=True):
        if prompt_group.size > room:
            packs.append([])
            room = SCORE_TOKENS
        packs[-1].append(prompt_group)
        room -= prompt_group.size
    return packs


def _score_pack(model: Any, device: torch.device, requests: Seq[Request], pack: list[_Group], top: int) -> dict[int, Scored]:
    """One forward pass over the tokens of all prompt groups, side by side in one row."""
    batch = Batch.of_groups([(f.beginning, f.completions) for f in pack], device)
    places: list[int] = []  # whose hidden states the scored tokens are predicted from, request by request
    order: list[int] = []
    first = 0
    for prompt_group in pack:
        at = first + len(prompt_group.beginning)
        if not prompt_group.completions:
            (member,) = prompt_group.members
            places += range(first + requests[member][1] - 1, at)
        for completion in prompt_group.completions:
            places += (first + len(prompt_group.beginning) - 1, *range(at, at + len(completion)))
            at += len(completion)
        order += prompt_group.members
        first = at
    targets = torch.tensor([t for i in order for t in requests[i][0][requests[i][1] :]], device=device)
    hidden = model(batch).hidden[0, torch.tensor(places, device=device)]
    found = _measured(model, hidden, targets, top)
    ends = np.cumsum([len(requests[i][0]) - requests[i][1] for i in order])[:-1]
    return dict(zip(order, (Scored(*part) for part in zip(*(np.split(x, ends) for x in found), strict=True)), strict=True))


def _measured(model: Any, hidden: Tensor, targets: Tensor, top: int) -> tuple[np.ndarray, ...]:
    """The fields of `Scored` for all targets."""
    return model.lm_head.logprobs(hidden, targets).cpu().numpy(), *_top(model.lm_head, hidden, targets, top)


def score_targets(model: Any, pairs: Seq[tuple[Seq[int], Seq[int]]]) -> list[np.ndarray]:
    """Log-probabilities [len(target)] float32 of each target given its source, by an encoder-decoder."""
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][1]))
    out = [np.zeros(0, np.float32) for _ in pairs]
    first = len(model.start) - 1  # the place whose logits are those of a target's first token
    while order and pairs[order[0]][1]:
        width = first + len(pairs[order[0]][1])
        longest = max(len(pairs[i][0]) for i in order)
        count = max(1, min(SCORE_LOGITS // (width * model.config.vocab_size), SCORE_TOKENS // longest))
        group, order = order[:count], order[count:]
        logits = model.read([pairs[i][0] for i in group], [[*model.start, *pairs[i][1]][:-1] for i in group])
        for row, i in zip(logits, group, strict=True):
            target = torch.tensor(pairs[i][1], dtype=torch.int64, device=row.device)
            out[i] = model.lm_head.logprobs(row[first : first + len(target)], target).cpu().numpy()
    return out


def _top(head: Any, hidden: Tensor, targets: Tensor, top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `top` most likely tokens at each place and the targets' ranks, 256 places at a time: logits of a whole batch are
    never held."""
    if top == 0:
        empty = _empty(0, len(hidden))
        return empty.top_ids, empty.top_logprobs, empty.ranks
    values, ids, ranks = [], [], []
    for part, target in zip(hidden.split(256), targets.split(256), strict=True):
        logprobs = head.logits(part).float().log_softmax(-1)
        best = logprobs.topk(top, dim=-1)
        values.append(best.values)
        ids.append(best.indices)
        ranks.append((logprobs >= logprobs.gather(1, target[:, None])).sum(-1))
    return torch.cat(ids).cpu().numpy(), torch.cat(values).cpu().numpy(), torch.cat(ranks).cpu().numpy()


def _empty(top: int, rows: int = 0) -> Scored:
    nothing = np.zeros(0, np.int64)
    return Scored(np.zeros(0, np.float32), np.zeros((rows, top), np.int64), np.zeros((rows, top), np.float32), nothing)
