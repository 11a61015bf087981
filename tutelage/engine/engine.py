"""The engine: submit prompts, step, read events. One thread at a time; the server gives it a thread of its own.

engine = Engine(model, renderer)
for completion in engine.generate(["Once upon a time"], Sampling(64)):
    print(completion.text)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import torch

from tutelage.engine.blocks import CACHE_BYTES, Slots, make_cache
from tutelage.engine.runner import CachedRunner, RecomputingRunner, Runner, Scored, score
from tutelage.engine.sampler import choose
from tutelage.engine.scheduler import Scheduler
from tutelage.engine.sequence import Completion, Event, Sampling, Sequence
from tutelage.engine.text import TextStream, Vocabulary
from tutelage.errors import ArtifactError, ConfigError, DataError

Prompt = str | Seq[int] | Seq[Mapping[str, Any]]
"""A text to continue, token ids, or a conversation to answer (OpenAI messages)."""


class ContextOverflow(DataError):
    """A prompt, or a prompt with the answer asked for, is longer than the context. Nothing is ever cut."""


class Engine:
    """Generates with one model. `renderer` may be None where prompts are token ids and no text is wanted.

    slots: sequences that run at a time (fewer where `cache_bytes` would be exceeded); more wait their turn.
    max_length: tokens of prompt and answer together; the model's own context where None.
    seed: of prompts whose `Sampling.seed` is None, each with a seed of its own.
    """

    def __init__(
        self, model: Any, renderer: Any = None, slots: int = 16, max_length: int | None = None, *,
        cache_bytes: int = CACHE_BYTES, prefill_tokens: int = 2048, seed: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.renderer, self.seed = model, renderer, seed
        self.context_length = _context(model, max_length)
        self.device = next(model.parameters()).device
        with torch.inference_mode():
            cache = make_cache(model, slots, self.context_length, cache_bytes)
        self.runner: Runner = RecomputingRunner(model, self.device) if cache is None else CachedRunner(model, cache)
        self.scheduler = Scheduler(Slots(slots if cache is None else cache.slots), prefill_tokens)
        self.cache = cache
        self.vocab_size: int = model.config.vocab_size
        self.vocabulary: Vocabulary | None = None
        self.ends: frozenset[int] = frozenset()
        if renderer is not None:
            self._read_tokenizer(renderer)
        self._submitted = count()

    def _read_tokenizer(self, renderer: Any) -> None:
        tokenizer = renderer.tokenizer
        if tokenizer.vocab_size > self.vocab_size:
            raise ArtifactError(
                "the tokenizer does not fit the model", file=tokenizer.folder, found=f"{tokenizer.vocab_size} tokens",
                expected=f"at most the model's {self.vocab_size}", fix="use the tokenizer that the model was trained with",
            )  # fmt: skip
        self.vocabulary = Vocabulary(json.loads(tokenizer.tokenizer.to_str()), control=tokenizer.control_ids)
        self.ends = frozenset(renderer.stop_ids)

    # -- asking

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: a text as a document begins, messages as they were trained, ids as they are."""
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], Mapping)):
            if self.renderer is None:
                raise ConfigError("this engine has no tokenizer", field="prompt", expected="token ids")
            if isinstance(prompt, str):
                return list(self.renderer.prompt_text(prompt))
            return list(self.renderer.prompt(list(prompt)))
        return [int(t) for t in prompt]  # type: ignore[arg-type]

    def submit(self, prompt_ids: Seq[int], sampling: Sampling, index: int = 0) -> Sequence:
        """Queues a prompt; `step` makes it run. `index` says which of the n answers this is.

        Raises `ContextOverflow`, `DataError` (empty prompt, unknown token), `ConfigError` (stop texts without a tokenizer).
        """
        ids = [int(t) for t in prompt_ids]
        self._check_tokens(ids)
        room = self.context_length - len(ids)
        limit = sampling.max_tokens if sampling.max_tokens is not None else room
        if room < max(limit, 1):
            raise ContextOverflow(
                "the prompt and the answer asked for are longer than the context", field="max_tokens",
                found=f"{len(ids)} tokens of prompt and {max(limit, 1)} of answer",
                expected=f"at most {self.context_length} together",
                fix="shorten the prompt or ask for fewer tokens",
            )  # fmt: skip
        if sampling.stop and self.vocabulary is None:
            raise ConfigError("stop texts need a tokenizer", field="stop", expected="stop_ids")
        number = next(self._submitted)
        seed = sampling.seed if sampling.seed is not None else (self.seed << 32) + number
        ends = frozenset(sampling.stop_ids) | (frozenset() if sampling.ignore_eos else self.ends)
        stream = TextStream(self.vocabulary, sampling.stop)
        sequence = Sequence(ids, sampling, stream, seed=seed, index=index, limit=limit, ends=ends)
        self.scheduler.add(sequence)
        return sequence

    def _check_tokens(self, ids: list[int]) -> None:
        if not ids:
            raise DataError("the prompt is empty", field="prompt", expected="at least one token")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            wrong = next(t for t in ids if not 0 <= t < self.vocab_size)
            raise DataError("no such token", field="prompt", found=wrong, expected=f"ids from 0 to {self.vocab_size - 1}")

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence now and frees its slot. Of no effect on a finished one."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "cancelled"
            sequence.stream.flush()
            self.scheduler.remove(sequence)

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    # -- running

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Reads some waiting prompts and gives every running sequence its next token. One event per token made.

        The model must be in evaluation mode. Raises `ArtifactError` when its logits are not numbers.
        """
        assert not self.model.training, "call model.eval() before step()"
        self._close_gaps()
        plan = self.scheduler.plan()
        events: list[Event] = []
        if plan.prefill:
            sequences, counts = [s for s, _ in plan.prefill], [n for _, n in plan.prefill]
            logits = self.runner.logits(sequences, counts)
            read = [i for i, (s, n) in enumerate(plan.prefill) if self.scheduler.read(s, n)]
            if read:
                events += self._take([sequences[i] for i in read], logits[read])
        if plan.decode:
            running = sorted(plan.decode, key=lambda s: s.slot)
            logits = self.runner.logits(running, [1] * len(running))
            for sequence in running:
                sequence.cached += 1
            events += self._take(running, logits)
        return events

    def _take(self, sequences: list[Sequence], logits: torch.Tensor) -> list[Event]:
        limit = None if self.vocabulary is None else len(self.vocabulary)
        events = [s.append(token) for s, token in zip(sequences, choose(logits, sequences, limit), strict=True)]
        for event in events:
            if event.finish_reason is not None:
                self.scheduler.remove(event.sequence)
        return events

    def _close_gaps(self) -> None:
        """Moves the last running sequence into a free slot before it: slots in a row are read without a copy at every step."""
        if self.cache is None or self.scheduler.waiting or self.scheduler.reading:
            return
        slots = self.scheduler.slots
        running = sorted(self.scheduler.running, key=lambda s: s.slot)
        while running and len(slots) and slots.lowest < running[-1].slot:
            last = running.pop()
            old, last.slot = last.slot, slots.take()
            for held in (*self.cache.k, *self.cache.v):
                held[last.slot, : last.cached] = held[old, : last.cached]
            slots.give(old)

    def generate(self, prompts: Seq[Prompt], sampling: Sampling | Seq[Sampling]) -> list[Completion]:
        """Answers in the order of the prompts, the n answers of one prompt together: sum of n completions.

        Equal for greedy and for seeded sampling whatever else is in the list and in whatever order, up to ties within rounding.
        All prompts are checked before the first runs.
        """
        wanted = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        sequences: list[Sequence] = []
        try:
            for prompt, how in zip(prompts, wanted, strict=True):
                ids = self.encode(prompt)
                sequences += [self.submit(ids, how, index) for index in range(how.n)]
            with evaluating(self.model):
                while any(s.finish_reason is None for s in sequences):
                    self.step()
        except BaseException:
            for sequence in sequences:
                self.cancel(sequence)
            raise
        return [s.completion() for s in sequences]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[Event]:
        """Events of one answer as they come. Closing the iterator early cancels it."""
        sequence = self.submit(self.encode(prompt), sampling)
        try:
            with evaluating(self.model):
                while sequence.finish_reason is None:
                    yield from (e for e in self.step() if e.sequence is sequence)
        finally:
            self.cancel(sequence)

    def score(self, requests: Seq[tuple[Seq[int], int]]) -> list[np.ndarray]:
        """Log-probabilities of given tokens: for each (ids, start) a float32 array over ids[start:], given the ids before."""
        return [s.logprobs for s in self.score_top(requests, 0)]

    def score_top(self, requests: Seq[tuple[Seq[int], int]], top: int) -> list[Scored]:
        """Like `score`, with the `top` most likely tokens at each place.

        Raises `DataError` for `start` outside 1..len(ids) (a first token has nothing to be conditioned on), `ContextOverflow`.
        """
        for ids, start in requests:
            self._check_tokens(list(ids))
            if not 1 <= start <= len(ids):
                raise DataError("nothing to condition on", field="start", found=start, expected=f"from 1 to {len(ids)}")
            if len(ids) > self.context_length:
                raise ContextOverflow(
                    "longer than the context", found=f"{len(ids)} tokens", expected=f"at most {self.context_length}"
                )
        with evaluating(self.model), torch.inference_mode():
            return score(self.model, self.device, requests, min(top, self.vocab_size))


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside, the mode it was in afterwards."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def _context(model: Any, wanted: int | None) -> int:
    own = getattr(model.config, "max_position_embeddings", None)
    if wanted is None and own is None:
        raise ConfigError("the model does not say how long its context is", field="max_length", fix="set max_length")
    if wanted is not None and (wanted < 2 or (own is not None and wanted > own)):
        raise ConfigError(
            "out of range", field="max_length", found=wanted, expected=f"from 2 to the model's context of {own} tokens"
        )
    return int(wanted if wanted is not None else own)  # type: ignore[arg-type]
