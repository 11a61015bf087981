"""Runs the model for the scheduler: new tokens of some sequences in, logits of their last token out.

Shapes: S sequences of the batch, T new tokens of the longest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tutelage.engine.sequence import Sequence
from tutelage.models.interface import Batch, CacheView, KVCache

SCORE_TOKENS = 4096
"""Tokens, padding included, of one forward pass while scoring."""


class Runner(Protocol):
    """What the engine needs of a model."""

    def logits(self, sequences: list[Sequence], counts: list[int]) -> Tensor:
        """Logits [S,V] after the next `counts[s]` uncached tokens of each sequence."""
        ...


class CachedRunner:
    """A model that keeps keys and values."""

    def __init__(self, model: Any, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.device = cache.k[0].device if cache.k else torch.device("cpu")
        self._rows: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def logits(self, sequences: list[Sequence], counts: list[int]) -> Tensor:
        if max(counts) == 1:
            return self._one_each(sequences)
        texts = [s.ids[s.cached : s.cached + n] for s, n in zip(sequences, counts, strict=True)]
        slots = torch.tensor([s.slot for s in sequences], device=self.device)
        view = CacheView(self.cache, slots, torch.tensor([s.cached for s in sequences], device=self.device))
        hidden = self.model(Batch.of(texts, cache=view, device=self.device)).hidden
        last = torch.tensor(counts, device=hidden.device) - 1
        rows = torch.arange(len(counts), device=hidden.device)
        return self.model.lm_head.logits(hidden[rows, last])  # type: ignore[no-any-return]

    def _one_each(self, sequences: list[Sequence]) -> Tensor:
        """The step that nearly all time goes to: what does not change from token to token is kept."""
        slots = tuple(s.slot for s in sequences)
        if slots not in self._rows:
            self._rows = {slots: self._constants(slots)}
        slot, segments, zeros, weights = self._rows[slots]
        both = torch.tensor([[s.ids[s.cached] for s in sequences], [s.cached for s in sequences]], device=self.device)
        ids, lengths = both[0, :, None], both[1]
        view = CacheView(self.cache, slot, lengths)
        hidden = self.model(Batch(ids, segments, lengths[:, None], zeros, weights, cache=view)).hidden
        return self.model.lm_head.logits(hidden[:, 0])  # type: ignore[no-any-return]

    def _constants(self, slots: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shape = (len(slots), 1)
        return (
            torch.tensor(slots, device=self.device),
            torch.ones(shape, dtype=torch.int32, device=self.device),
            torch.zeros(shape, dtype=torch.int64, device=self.device),
            torch.zeros(shape, dtype=torch.float32, device=self.device),
        )


class RecomputingRunner:
    """A model without a cache: every step reads the whole sequences again. Slower, equal."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device

    def logits(self, sequences: list[Sequence], counts: list[int]) -> Tensor:
        texts = [s.ids[: s.cached + n] for s, n in zip(sequences, counts, strict=True)]
        hidden = self.model(Batch.of(texts, device=self.device)).hidden
        last = torch.tensor([len(t) - 1 for t in texts], device=hidden.device)
        return self.model.lm_head.logits(hidden[torch.arange(len(texts), device=hidden.device), last])  # type: ignore[no-any-return]


@dataclass(slots=True, frozen=True)
class Scored:
    """Log-probabilities of given tokens. n is the number of tokens scored."""

    logprobs: np.ndarray  # [n] float32
    top_ids: np.ndarray  # [n,k] int64: the most likely tokens at each place, best first
    top_logprobs: np.ndarray  # [n,k] float32


def score(model: Any, device: torch.device, requests: Seq[tuple[Seq[int], int]], top: int) -> list[Scored]:
    """Log-probabilities of ids[start:], each given all ids before it. Batched by length; results in the order of `requests`."""
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))
    out: list[Scored | None] = [None] * len(requests)
    at = 0
    while at < len(order):
        # The last token of a text is only a target, so a row is one shorter.
        width = max(len(requests[order[at]][0]) - 1, 1)
        group = order[at : at + max(1, SCORE_TOKENS // width)]
        for i, scored in zip(group, _score_rows(model, device, [requests[i] for i in group], top), strict=True):
            out[i] = scored
        at += len(group)
    return [s for s in out if s is not None]


def _score_rows(model: Any, device: torch.device, rows: list[tuple[Seq[int], int]], top: int) -> list[Scored]:
    wanted = [(row, place - 1) for row, (ids, start) in enumerate(rows) for place in range(start, len(ids))]
    if not wanted:
        return [_empty(top) for _ in rows]
    hidden = model(Batch.of([ids[:-1] or ids for ids, _ in rows], device=device)).hidden
    row, place = torch.tensor(wanted, device=hidden.device).unbind(1)
    picked = hidden[row, place]
    targets = torch.tensor([t for ids, start in rows for t in ids[start:]], device=hidden.device)
    logprobs = model.lm_head.logprobs(picked, targets).cpu().numpy()
    top_ids, top_logprobs = _top(model.lm_head, picked, top)
    ends = np.cumsum([len(ids) - start for ids, start in rows])[:-1]
    parts = zip(np.split(logprobs, ends), np.split(top_ids, ends), np.split(top_logprobs, ends), strict=True)
    return [Scored(*part) for part in parts]


def _top(head: Any, hidden: Tensor, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The `top` most likely tokens at each place, 256 places at a time: logits of a whole batch are never held."""
    if top == 0:
        empty = _empty(0, len(hidden))
        return empty.top_ids, empty.top_logprobs
    values, ids = [], []
    for part in hidden.split(256):
        best = head.logits(part).float().log_softmax(-1).topk(top, dim=-1)
        values.append(best.values)
        ids.append(best.indices)
    return torch.cat(ids).cpu().numpy(), torch.cat(values).cpu().numpy()


def _empty(top: int, rows: int = 0) -> Scored:
    return Scored(np.zeros(0, np.float32), np.zeros((rows, top), np.int64), np.zeros((rows, top), np.float32))
