"""Runs the model for the scheduler: new tokens of some sequences in, logits of their last token out.

Shapes: S sequences of the batch, T new tokens of the longest, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tutelage.engine.sequence import Sequence
from tutelage.models.adapters.lora import Lora, applied
from tutelage.models.interface import Batch, CacheView, KVCache
from tutelage.models.kernels.decoder import FusedDecoder

LONG_TOKENS = 128
"""New tokens of one sequence from which the model's own products and tiled attention are faster than the fused call."""


@dataclass(slots=True, frozen=True)
class Work:
    """Tokens that one sequence reads in this step, right after those in its slot."""

    sequence: Sequence
    tokens: list[int]
    wanted: int = 1  # logits of so many last tokens; 0 inside a prompt


class Runner(Protocol):
    """What the engine needs of a model."""

    shares: bool  # a beginning that another slot holds can be copied

    def logits(self, work: list[Work]) -> Tensor:
        """Logits [sum of wanted, V], in the order of the work."""
        ...

    def copy(self, source: int, target: int, count: int) -> None:
        """Copies the first `count` tokens of a slot. Asked for only where `shares` is True."""
        ...

    def fork(self, source: int, target: int, count: int) -> None:
        """The sequence in slot `target` goes on from the first `count` tokens of the one in `source`."""
        self.copy(source, target, count)

    def release(self, slot: int) -> None:
        """The sequence in this slot has ended. A cache that was allocated once keeps its tokens, for texts that begin alike."""
        return None


class FusedRunner(Runner):
    """Our decoder through one call of our kernels: any mix of prompts and answers, without padding. A token's logits do not
    depend on what else is in the call, bit for bit, as long as long prompts are not read by the model itself (`invariant`)."""

    shares = True

    def __init__(self, fused: FusedDecoder, invariant: bool) -> None:
        self.fused, self.invariant = fused, invariant
        plain = not invariant and fused.dtype == "float32"
        self.long = CachedRunner(fused.model, fused.cache) if plain else None

    def logits(self, work: list[Work]) -> Tensor:
        if self.long is not None:
            long = [w for w in work if len(w.tokens) >= LONG_TOKENS]
            if long:
                return self._mixed(work, long)
        return self._fused(work)

    def _mixed(self, work: list[Work], long: list[Work]) -> Tensor:
        """Long prompts through the model's own matrix products, the rest through the fused call."""
        assert self.long is not None
        short = [w for w in work if len(w.tokens) < LONG_TOKENS]
        parts = dict(zip(map(id, long), self.long.logits(long).split([w.wanted for w in long]), strict=True))
        if short:
            parts |= dict(zip(map(id, short), self._fused(short).split([w.wanted for w in short]), strict=True))
        return torch.cat([parts[id(w)] for w in work])

    def _fused(self, work: list[Work]) -> Tensor:
        ids: list[int] = []
        slots: list[int] = []
        places: list[int] = []
        wanted: list[int] = []
        loras: list[Lora | None] = []
        for w in work:
            first, count = w.sequence.cached, len(w.tokens)
            loras += [w.sequence.lora] * count
            ids += w.tokens
            slots += [w.sequence.slot] * count
            places += range(first, first + count)
            wanted += range(len(ids) - w.wanted, len(ids))
        rows = torch.tensor([ids, slots, places])
        last = torch.tensor(wanted, dtype=torch.int64)
        return self.fused(rows[0], rows[1], rows[2], last, loras=loras if any(loras) else None)[0]

    def copy(self, source: int, target: int, count: int) -> None:
        _copy(self.fused.cache, source, target, count)


class OneAdapter(Runner):
    """A runner that reads with one adapter at a time: a call of `read` for the sequences of each."""

    model: Any

    def logits(self, work: list[Work]) -> Tensor:
        groups: dict[Lora | None, list[Work]] = {}
        for w in work:
            groups.setdefault(w.sequence.lora, []).append(w)
        parts: dict[int, Tensor] = {}
        for lora, same in groups.items():
            with applied(self.model, lora):
                logits = self.read(same)
            if len(groups) == 1:
                return logits
            parts |= dict(zip(map(id, same), logits.split([w.wanted for w in same]), strict=True))
        return torch.cat([parts[id(w)] for w in work])

    @abstractmethod
    def read(self, work: list[Work]) -> Tensor:
        """`logits` of sequences with the same adapter."""


class CachedRunner(OneAdapter):
    """A model that keeps keys and values, operation by operation. Rows are padded to the longest."""

    shares = True

    def __init__(self, model: Any, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.device = cache.k[0].device if cache.k else torch.device("cpu")
        self._rows: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def read(self, work: list[Work]) -> Tensor:
        one = [w for w in work if len(w.tokens) == 1 == w.wanted]
        more = [w for w in work if not len(w.tokens) == 1 == w.wanted]
        if not more:
            return self._one_each(one)
        parts = dict(zip(map(id, more), self._several(more).split([w.wanted for w in more]), strict=True))
        if one:
            parts |= dict(zip(map(id, one), self._one_each(one).split(1), strict=True))
        return torch.cat([parts[id(w)] for w in work])

    def _several(self, work: list[Work]) -> Tensor:
        sequences = [w.sequence for w in work]
        slots = torch.tensor([s.slot for s in sequences], device=self.device)
        view = CacheView(self.cache, slots, torch.tensor([s.cached for s in sequences], device=self.device))
        hidden = self.model(Batch.of([w.tokens for w in work], cache=view, device=self.device)).hidden
        return self.model.lm_head.logits(_wanted(hidden, work))  # type: ignore[no-any-return]

    def _one_each(self, work: list[Work]) -> Tensor:
        """The step that nearly all time goes to: what does not change from token to token is kept."""
        slots = tuple(w.sequence.slot for w in work)
        if slots not in self._rows:
            self._rows = {slots: self._constants(slots)}
        slot, segments, zeros, weights = self._rows[slots]
        both = torch.tensor([[w.tokens[0] for w in work], [w.sequence.cached for w in work]], device=self.device)
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

    def copy(self, source: int, target: int, count: int) -> None:
        _copy(self.cache, source, target, count)


class RecomputingRunner(OneAdapter):
    """A model without a cache: every step reads the whole sequences again. Slower, equal."""

    shares = False

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device

    def read(self, work: list[Work]) -> Tensor:
        texts = [w.sequence.ids[: w.sequence.cached] + w.tokens for w in work]
        if self.model.traits.encoder_decoder:
            hidden = self.model.read([w.sequence.source for w in work], texts)
        else:
            hidden = self.model(Batch.of(texts, device=self.device)).hidden
        return self.model.lm_head.logits(_wanted(hidden, work, [len(t) for t in texts]))  # type: ignore[no-any-return]

    def copy(self, source: int, target: int, count: int) -> None:
        raise AssertionError("never asked for where `shares` is False")

    def fork(self, source: int, target: int, count: int) -> None:
        return None


def _wanted(hidden: Tensor, work: list[Work], lengths: list[int] | None = None) -> Tensor:
    """The hidden states [sum of wanted, H] of each row's last tokens."""
    ends = lengths or [len(w.tokens) for w in work]
    at = [(row, place) for row, (w, end) in enumerate(zip(work, ends, strict=True)) for place in range(end - w.wanted, end)]
    row, place = torch.tensor(at, dtype=torch.int64, device=hidden.device).reshape(-1, 2).unbind(1)
    return hidden[row, place]


def _copy(cache: KVCache, source: int, target: int, count: int) -> None:
    for held in (*cache.k, *cache.v):
        held[target, :count] = held[source, :count]
