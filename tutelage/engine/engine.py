"""The engine: submit prompts, step, read events. One thread at a time; the server gives it a thread of its own.

engine = Engine(model, renderer)
for completion in engine.generate(["Once upon a time"], Sampling(64)):
    print(completion.text)
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from itertools import accumulate, count
from typing import Any

import numpy as np
import torch

from tutelage.engine.blocks import CACHE_BYTES, Slots, make_cache
from tutelage.engine.grammar import Constraint, Grammar, GrammarCompiler
from tutelage.engine.hf_runner import HfRunner
from tutelage.engine.runner import CachedRunner, FusedRunner, RecomputingRunner, Runner, Work
from tutelage.engine.sampler import choose
from tutelage.engine.scheduler import Scheduler
from tutelage.engine.scoring import Scored, score, score_targets
from tutelage.engine.sequence import Completion, Event, Sampling, Sequence
from tutelage.engine.speculate import note, propose
from tutelage.engine.text import TextStream, Vocabulary, drops_first_space
from tutelage.engine.tool_calls import showing
from tutelage.errors import ArtifactError, ConfigError, DataError
from tutelage.models import kernels
from tutelage.models.interface import KVCache
from tutelage.models.kernels.decoder import FusedDecoder

Prompt = str | Seq[int] | Seq[Mapping[str, Any]]
"""A text to continue, token ids, or a conversation to answer (OpenAI messages)."""


class ContextOverflow(DataError):
    """A prompt, or a prompt with the answer asked for, is longer than the context. Nothing is ever cut."""


class Engine:
    """Generates with one model. `renderer` may be None where prompts are token ids and no text is wanted.
    An encoder-decoder reads a prompt as its source.

    slots: sequences that run at a time (fewer where `cache_bytes` would be exceeded); more wait their turn.
    cache_bytes: of our own models' cache, allocated once; what `transformers` keeps grows with the texts.
    max_length: tokens of prompt and answer together (of an encoder-decoder, of each); the model's own context where None.
    seed: of prompts whose `Sampling.seed` is None, each with a seed of its own.
    prefix_cache: prompts start from what an earlier or running text has in common with them.
    speculate: guesses checked per step and sequence (`speculate.py`); 0 for none. Never changes a result.
    batch_invariant: bitwise equal log-probabilities whatever else runs; long prompts are then read more slowly. Our kernels only.
    dtype: "int8" reads matrices as 8-bit copies. Our kernels only.
    """

    def __init__(
        self, model: Any, renderer: Any = None, slots: int = 16, max_length: int | None = None, *,
        cache_bytes: int = CACHE_BYTES, prefill_tokens: int = 2048, seed: int = 0, prefix_cache: bool = True,
        speculate: int = 0, batch_invariant: bool = False, dtype: str = "float32",
    ) -> None:  # fmt: skip
        self.model, self.renderer, self.seed = model, renderer, seed
        self.context_length = _context(model, max_length)
        self.device = next(model.parameters()).device
        with torch.inference_mode(), evaluating(model):
            cache = make_cache(model, slots, self.context_length, cache_bytes)
            self.runner = make_runner(model, cache, self.device, batch_invariant, dtype)
        keep = prefix_cache and self.runner.shares
        self.scheduler = Scheduler(Slots(slots if cache is None else cache.slots, keep), prefill_tokens)
        self.speculate = speculate
        self.prefix_cache_queries = self.prefix_cache_hits = 0  # tokens of prompts, and those of them that the cache had
        self.cache = cache
        self.vocab_size: int = model.config.vocab_size
        self.vocabulary: Vocabulary | None = None
        self.encodes: bool = getattr(model, "is_encoder_decoder", False)
        self.ends: frozenset[int] = frozenset(model.ends if self.encodes else ())
        self.fresh = False  # answers are texts of their own, whose first word has no space before it
        self.grammars: Callable[[], GrammarCompiler] | None = None  # made when the first grammar comes
        self._showing: dict[tuple[int, ...], Vocabulary] = {}
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
        self.ends |= frozenset(renderer.stop_ids)
        self.fresh = self.encodes and drops_first_space(tokenizer, self.vocabulary)
        vocabulary, ends, size = self.vocabulary, self.ends, self.vocab_size
        self.grammars = functools.cache(lambda: GrammarCompiler(vocabulary, ends, size, tokenizer.encode_text))

    # -- asking

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: a text as a document begins (for an encoder-decoder, as its tokenizer writes a source),
        messages as they were trained, ids as they are."""
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], Mapping)):
            if self.renderer is None:
                raise ConfigError("this engine has no tokenizer", field="prompt", expected="token ids")
            if isinstance(prompt, str):
                if self.encodes:
                    return list(self.renderer.tokenizer.tokenizer.encode_batch_fast([prompt])[0].ids)
                return list(self.renderer.prompt_text(prompt))
            return list(self.renderer.prompt(list(prompt)))
        return [int(t) for t in prompt]  # type: ignore[arg-type]

    def submit(self, prompt_ids: Seq[int], sampling: Sampling, index: int = 0) -> Sequence:
        """Queues a prompt; `step` makes it run. `index` says which of the n answers this is.

        Raises `ContextOverflow`, `DataError` (empty prompt, unknown token), `ConfigError` (stop texts without a tokenizer).
        """
        ids, source = [int(t) for t in prompt_ids], None
        self._check_tokens(ids)
        if self.encodes:
            self._check_length(ids)
            ids, source = list(self.model.start), ids
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
        stream = TextStream(self._vocabulary_of(sampling), sampling.stop, self.fresh)
        constraint = None if sampling.grammar is None else self.constrain(sampling.grammar)
        sequence = Sequence(
            ids, sampling, stream, seed=seed, index=index, limit=limit, ends=ends, constraint=constraint, source=source
        )  # fmt: skip
        self.scheduler.add(sequence)
        return sequence

    def constrain(self, grammar: Grammar) -> Constraint:
        """The constraint of one answer. Compiling takes its time, the first time: call this from another thread before `submit`
        where nothing may wait. Raises `ConfigError` for a grammar that cannot be used, or without a tokenizer."""
        if self.grammars is None:
            raise ConfigError("structured output needs a tokenizer", field="grammar")
        return self.grammars().compile(grammar)

    def _vocabulary_of(self, sampling: Sampling) -> Vocabulary | None:
        """The vocabulary for an answer's text."""
        if not sampling.shown_ids or self.vocabulary is None:
            return self.vocabulary
        if sampling.shown_ids not in self._showing:
            self._showing[sampling.shown_ids] = showing(self.vocabulary, sampling.shown_ids)
        return self._showing[sampling.shown_ids]

    def _check_tokens(self, ids: list[int]) -> None:
        if not ids:
            raise DataError("the prompt is empty", field="prompt", expected="at least one token")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            wrong = next(t for t in ids if not 0 <= t < self.vocab_size)
            raise DataError("no such token", field="prompt", found=wrong, expected=f"ids from 0 to {self.vocab_size - 1}")

    def _check_length(self, ids: Seq[int]) -> None:
        if len(ids) > self.context_length:
            raise ContextOverflow(
                "longer than the context", found=f"{len(ids)} tokens", expected=f"at most {self.context_length}"
            )

    def weights_changed(self) -> None:
        """Call after the model's weights were changed in place: what the cache holds of finished texts is forgotten.

        Sequences that run go on with keys and values of the old weights; drain the engine first where that matters.
        """
        self.scheduler.slots.forget()
        if isinstance(self.runner, FusedRunner):
            self.runner.fused.refresh()

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence now and frees its slot. Of no effect on a finished one."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "cancelled"
            sequence.stream.flush()
        self._remove(sequence)  # one that ended in a step which then failed still has its slot

    def _remove(self, sequence: Sequence) -> None:
        if sequence.slot >= 0:
            self.runner.release(sequence.slot)
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
        for sequence, place in plan.admitted:
            self.prefix_cache_queries += len(sequence.prompt)
            self.prefix_cache_hits += place.shared
            if place.shared and place.source != place.slot:
                self.runner.copy(place.source, place.slot, place.shared)
        work = [self._reading(s, n) for s, n in plan.prefill] + [self._running(s) for s in plan.decode]
        if not work:
            return []
        logits = self.runner.logits(work)
        for w in work[: len(plan.prefill)]:
            self.scheduler.read(w.sequence, len(w.tokens))
        for sequence in plan.decode:
            sequence.cached += 1
        return self._choose([w for w in work if w.wanted], logits)

    def _reading(self, sequence: Sequence, count: int) -> Work:
        last = sequence.cached + count == sequence.prompt_length
        return Work(sequence, sequence.ids[sequence.cached : sequence.cached + count], wanted=int(last))

    def _running(self, sequence: Sequence) -> Work:
        guesses = propose(sequence, self.speculate) if self.speculate else []
        return Work(sequence, [sequence.ids[-1], *guesses], wanted=1 + len(guesses))

    def _choose(self, work: list[Work], logits: torch.Tensor) -> list[Event]:
        """Next tokens; where guesses were checked too, one after the other as long as they prove right."""
        limit = None if self.vocabulary is None else len(self.vocabulary)
        first = [0, *accumulate(w.wanted for w in work)]
        going, events = list(range(len(work))), []
        for place in range(max((w.wanted for w in work), default=0)):
            rows = logits if place == 0 and len(logits) == len(going) else logits[[first[i] + place for i in going]]
            tokens = choose(rows, [work[i].sequence for i in going], limit)
            events += [work[i].sequence.append(token) for i, token in zip(going, tokens, strict=True)]
            going = [i for i, t in zip(going, tokens, strict=True) if self._goes_on(work[i], place, t.id)]
            if not going:
                break
        for event in events:
            if event.finish_reason is not None:
                self._remove(event.sequence)
        return events

    @staticmethod
    def _goes_on(work: Work, place: int, token: int) -> bool:
        """Whether the guess after `place` was right, so that the next logits hold. Counts it."""
        if work.wanted == 1:
            return False
        right = place + 1 < work.wanted and work.sequence.finish_reason is None and work.tokens[place + 1] == token
        if right:
            work.sequence.cached += 1
        else:
            note(work.sequence, work.wanted - 1, place)
        return right

    def _close_gaps(self) -> None:
        """Moves the last running sequence into a free slot before it: torch reads slots in a row without a copy at every step."""
        if not isinstance(self.runner, CachedRunner) or self.scheduler.waiting or self.scheduler.reading:
            return
        slots = self.scheduler.slots
        running = sorted(self.scheduler.running, key=lambda s: s.slot)
        while running and len(slots) and slots.lowest < running[-1].slot:
            last = running.pop()
            old, last.slot = last.slot, slots.take(slots.lowest)
            self.runner.copy(old, last.slot, last.cached)
            slots.give(old, [])

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

        Raises `DataError` for `start` outside 1..len(ids) (a first token has nothing to be conditioned on), `ContextOverflow`,
        `ConfigError` for an encoder-decoder.
        """
        if self.encodes:
            raise ConfigError(
                "an encoder-decoder does not say how likely a text is, only a target after a source", fix="use score_targets"
            )
        for ids, start in requests:
            self._check_tokens(list(ids))
            if not 1 <= start <= len(ids):
                raise DataError("nothing to condition on", field="start", found=start, expected=f"from 1 to {len(ids)}")
            self._check_length(ids)
        with evaluating(self.model), torch.inference_mode():
            return score(self.model, self.device, requests, min(top, self.vocab_size))

    def score_targets(self, pairs: Seq[tuple[Seq[int], Seq[int]]]) -> list[np.ndarray]:
        """Log-probabilities of answers by any kind of model: for each (prompt, target) ids a float32 array over the target.

        An encoder-decoder's target is what `generate` would make: without what every target begins with.
        Raises `DataError` for an empty prompt or an unknown token, `ContextOverflow`.
        """
        if not self.encodes:
            return self.score([((*prompt, *target), len(prompt)) for prompt, target in pairs])
        for prompt, target in pairs:
            decoded = [*self.model.start, *target]
            self._check_tokens(list(prompt))
            self._check_tokens(decoded)
            self._check_length(prompt)
            self._check_length(decoded)
        with evaluating(self.model), torch.inference_mode():
            return score_targets(self.model, pairs)


def make_runner(model: Any, cache: KVCache | None, device: torch.device, invariant: bool, dtype: str) -> Runner:
    """The fastest way to run a model. Raises `ConfigError` where only our kernels could do what is asked."""
    if dtype not in ("float32", "int8"):
        raise ConfigError("no such type of weights", field="dtype", found=dtype, expected="float32 or int8")
    fused = FusedDecoder.of(model, cache, dtype)
    if fused is not None:
        return FusedRunner(fused, invariant)
    if invariant or dtype != "float32":
        raise ConfigError(
            "our kernels cannot run this model as a whole", field="batch_invariant" if invariant else "dtype",
            found=kernels.why_not() or "a model or device that they do not know",
            expected="one of our decoder families in float32 on a CPU, and a C++ compiler",
        )  # fmt: skip
    if cache is not None:
        return CachedRunner(model, cache)
    return HfRunner.of(model, device) or RecomputingRunner(model, device)


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
