"""Scoring: log-probabilities of given tokens, batched by length. A beginning that several requests share is read once.

Shapes: n tokens scored, k alternatives, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.engine.blocks import caches
from tutelage.models.interface import Batch, CacheView

SCORE_TOKENS = 4096
"""Tokens, padding included, of one forward pass."""
SCORE_LOGITS = 1 << 24
"""Logits held at a time (64 MiB of float32) while an encoder-decoder scores targets."""
SHARED_TOKENS = 16
"""Tokens from which a beginning that several requests have is read once and kept."""

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
    families = _families(requests) if caches(model, max((len(ids) for ids, _ in requests), default=0)) else {}
    shared = {i for members in families.values() for i in members}
    out: dict[int, Scored] = {}
    for group in _by_length([i for i in range(len(requests)) if i not in shared], lambda i: len(requests[i][0]) - 1):
        out |= zip(group, _score_rows(model, device, [requests[i] for i in group], top), strict=True)
    for part in _by_length(list(families), lambda key: sum(len(requests[i][0]) for i in families[key])):
        out |= _score_families(model, device, requests, {key: families[key] for key in part}, top)
    return [out[i] for i in range(len(requests))]


def _families(requests: Seq[Request]) -> dict[tuple[int, ...], list[int]]:
    """Requests whose tokens before the first scored one are the same, where that pays."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, (ids, start) in enumerate(requests):
        if start >= SHARED_TOKENS and len(ids) > start:
            found.setdefault(tuple(ids[:start]), []).append(i)
    return {key: members for key, members in found.items() if len(members) > 1}


def _by_length(items: list[Any], length: Any) -> list[list[Any]]:
    """Items of similar length together, as many as make SCORE_TOKENS padded to the longest."""
    left, out = sorted(items, key=length, reverse=True), []
    while left:
        count = max(1, SCORE_TOKENS // max(length(left[0]), 1))
        out.append(left[:count])
        left = left[count:]
    return out


def _score_families(
    model: Any, device: torch.device, requests: Seq[Request], families: dict[tuple[int, ...], list[int]], top: int
) -> dict[int, Scored]:
    """Beginnings first, one slot each; then every ending in a slot of its own that starts as a copy."""
    order = [i for members in families.values() for i in members]
    before = [s for s, members in enumerate(families.values()) for _ in members]
    endings = [list(requests[i][0][requests[i][1] :]) for i in order]
    lengths = torch.tensor([requests[i][1] for i in order], device=device)
    cache = model.new_cache(len(families) + len(order), max(len(requests[i][0]) for i in order))
    first = CacheView(
        cache, torch.arange(len(families), device=device), torch.zeros(len(families), dtype=torch.int64, device=device)
    )
    hidden = model(Batch.of([list(key) for key in families], cache=first, device=device)).hidden
    last = hidden[torch.arange(len(families), device=device), torch.tensor([len(key) - 1 for key in families], device=device)]
    states = [last[before]]  # what the first token of each ending is predicted from
    more = [r for r, ending in enumerate(endings) if len(ending) > 1]
    if more:
        own = torch.tensor(more, device=device) + len(families)
        for held in (*cache.k, *cache.v):
            held[own] = held[[before[r] for r in more]]
        batch = Batch.of([endings[r][:-1] for r in more], cache=CacheView(cache, own, lengths[more]), device=device)
        rows = model(batch).hidden
        states += [rows[i, : len(endings[r]) - 1] for i, r in enumerate(more)]
    # Rows lie as: every ending's first token, then the other tokens of each longer ending.
    places = _places([len(e) for e in endings])
    targets = torch.tensor([endings[r][at] for r, at in places], device=device)
    found = _measured(model, torch.cat(states), targets, top)
    at_of = {place: i for i, place in enumerate(places)}
    out = {}
    for r, i in enumerate(order):
        picked = [at_of[r, at] for at in range(len(endings[r]))]
        out[i] = Scored(*(x[picked] if len(x) else x for x in found))
    return out


def _places(lengths: list[int]) -> list[tuple[int, int]]:
    return [(r, 0) for r in range(len(lengths))] + [(r, at) for r, n in enumerate(lengths) for at in range(1, n)]


def _score_rows(model: Any, device: torch.device, rows: list[Request], top: int) -> list[Scored]:
    wanted = [(row, place - 1) for row, (ids, start) in enumerate(rows) for place in range(start, len(ids))]
    if not wanted:
        return [_empty(top) for _ in rows]
    hidden = model(Batch.of([ids[:-1] or ids for ids, _ in rows], device=device)).hidden
    row, place = torch.tensor(wanted, device=hidden.device).unbind(1)
    targets = torch.tensor([t for ids, start in rows for t in ids[start:]], device=hidden.device)
    found = _measured(model, hidden[row, place], targets, top)
    ends = np.cumsum([len(ids) - start for ids, start in rows])[:-1]
    return [Scored(*part) for part in zip(*(np.split(x, ends) for x in found), strict=True)]


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
