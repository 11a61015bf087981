"""Guesses of a smaller model with the same tokens (Leviathan et al. 2023; Chen et al. 2023).

The small model draws each guess with the noise of the place that it guesses at: two models that all but agree then choose alike,
whatever the temperature.
"""

from __future__ import annotations

import sys
from typing import Any

from tutelage.engine.blocks import caches, common_length, make_cache
from tutelage.engine.drafts import Drafts
from tutelage.engine.runner import Work
from tutelage.engine.runners import make_runner
from tutelage.engine.sampler import likely
from tutelage.engine.sequence import Sampling, Sequence
from tutelage.engine.speculate import Guesser
from tutelage.errors import ConfigError
from tutelage.tokenizer.detokenize import TextStream

GUESSES = 4
"""Guesses at a time where nothing else was said."""
PART = 1024
"""Tokens of a text that the small model reads at a time, when it first meets it."""


class ModelDrafter(Guesser):
    """A small decoder of ours beside the engine's model. It has a place for every slot, and catches up with a text when it is
    asked about it.

    Raises `ConfigError`: another vocabulary, a shorter context, a model that keeps no cache of ours.
    """

    def __init__(self, model: Any, large: Any, slots: int, length: int) -> None:
        _check(model, large, length)
        cache = make_cache(model, slots, length, sys.maxsize)
        assert cache is not None
        self.cache = cache
        self.model = model.eval()
        self.runner = make_runner(model, cache, next(model.parameters()).device, False, "float32")
        self.drafts = Drafts()
        self.cost = max(_size(model) / _size(large), _depth(model) / _depth(large))
        self._readers: dict[int, Sequence] = {}  # by slot: the text that the small model has read there

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        readers = [self._reader(s) for s in sequences]
        found: list[list[int]] = [[] for _ in sequences]
        going = list(range(len(sequences)))
        work = [Work(r, r.ids[r.cached :]) for r in readers]
        while going:
            logits = self.runner.logits(work)
            for w in work:
                w.sequence.cached += len(w.tokens)
            tokens = likely(logits, [sequences[i] for i in going], ahead=len(found[going[0]]))
            for i, token in zip(going, tokens, strict=True):
                found[i].append(token)
                readers[i].ids.append(token)
            going = [i for i in going if len(found[i]) < most[i]]
            work = [Work(readers[i], found[i][-1:]) for i in going]
        return found

    def trim(self, slot: int, tokens: int) -> None:
        """Gives back the memory of a place behind so many tokens: what was read there has to be read again."""
        self.cache.trim(slot, tokens)
        if slot in self._readers:
            self._readers[slot].cached = min(self._readers[slot].cached, tokens)

    def _reader(self, sequence: Sequence) -> Sequence:
        """The text of a sequence, read but for its end."""
        reader = self._readers.setdefault(sequence.slot, _unread(sequence.slot))
        reader.cached = common_length(reader.ids, sequence.ids, min(reader.cached, len(sequence.ids) - 1))
        reader.ids = list(sequence.ids)
        while len(reader.ids) - reader.cached > PART:
            self.runner.logits([Work(reader, reader.ids[reader.cached : reader.cached + PART], wanted=0)])
            reader.cached += PART
        return reader


def _unread(slot: int) -> Sequence:
    made = Sequence([], Sampling(), TextStream(None), seed=0, index=0, limit=0, ends=frozenset())
    made.slot = slot
    return made


def _check(model: Any, large: Any, length: int) -> None:
    if not caches(model, length):
        raise ConfigError("only a decoder of our own families can draft", field="draft", found=model.config.model_type)
    for name, least, exact in (("vocab_size", large.config.vocab_size, True), ("max_position_embeddings", length, False)):
        found = getattr(model.config, name)
        if found != least if exact else found < least:
            raise ConfigError(
                "the draft model does not fit the model", field="draft", found=f"{name} {found}",
                expected=str(least) if exact else f"at least {least}",
            )  # fmt: skip


def _depth(model: Any) -> float:
    return float(model.config.num_hidden_layers)


def _size(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())
