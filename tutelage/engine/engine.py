"""The engine: submit prompts, step, read events. One thread at a time; the server gives it a thread of its own.

engine = Engine(model, renderer)
for completion in engine.generate(["Once upon a time"], Sampling(64)):
    print(completion.text)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tutelage.engine.beams import search
from tutelage.engine.blocks import CACHE_BYTES, Slots, make_cache, token_bytes
from tutelage.engine.codec import Codec, Prompt
from tutelage.engine.draft import GUESSES, ModelDrafter
from tutelage.engine.embedding import embed
from tutelage.engine.limits import answer_limit, check_length, check_start, check_tokens
from tutelage.engine.memory import Memory
from tutelage.engine.runner import CachedRunner, FusedRunner, RecomputingRunner, Work
from tutelage.engine.runners import make_runner
from tutelage.engine.sampler import choose
from tutelage.engine.scheduler import Scheduler
from tutelage.engine.scoring import Scored, score, score_targets
from tutelage.engine.sequence import Completion, Event, Rules, Sampling, Sequence
from tutelage.engine.speculate import Guesser, Lookup, guesses, note
from tutelage.errors import ConfigError
from tutelage.models.adapters.lora import Lora, applied, read_lora
from tutelage.models.adapters.virtual_tokens import max_source_target_tokens, max_text_tokens
from tutelage.models.interface import KVCache
from tutelage.structured.grammar import Constraint, Grammar
from tutelage.tokenizer.detokenize import Vocabulary


class Engine:
    """Generates with one model. `renderer` may be None where prompts are token ids and no text is wanted.
    An encoder-decoder reads a prompt as its source.

    slots: sequences that run at a time, at most; more wait their turn.
    cache_bytes: of keys and values that are in memory at a time. Where those of all that run would be more, the last to come wait
    again. A single sequence goes on in any case; beams and encoder-decoders are not counted.
    max_length: tokens of prompt and answer together (of an encoder-decoder, of each); the model's own context where None.
    seed: of prompts whose `Sampling.seed` is None, each with a seed of its own.
    prefix_cache: prompts start from what an earlier or running text has in common with them.
    speculate: guesses checked per step and sequence (`speculate.py`); 0 for none, or 4 with a draft. Never changes a result.
    draft: a small decoder that makes the guesses; without one they are looked up in the text.
    batch_invariant: bitwise equal log-probabilities whatever else runs; long prompts are then read more slowly. Our kernels only.
    dtype: "int8" reads matrices as 8-bit copies. Our kernels only.
    """

    def __init__(
        self, model: Any, renderer: Any = None, slots: int = 16, max_length: int | None = None, *,
        cache_bytes: int = CACHE_BYTES, prefill_tokens: int = 2048, seed: int = 0, prefix_cache: bool = True,
        speculate: int = 0, draft: Any = None, batch_invariant: bool = False, dtype: str = "float32",
    ) -> None:  # fmt: skip
        self.model, self.renderer, self.seed = model, renderer, seed
        self.context_length = _context(model, max_length)
        self.encodes: bool = model.traits.encoder_decoder
        self.rooms = (
            tuple(min(self.context_length, r) for r in max_source_target_tokens(model))
            if self.encodes
            else (self.context_length,) * 2
        )
        self.device = next(model.parameters()).device
        with torch.inference_mode(), evaluating(model):
            cache = make_cache(model, slots, self.context_length, cache_bytes)
            self.runner = make_runner(model, cache, self.device, batch_invariant, dtype)
        keep = prefix_cache and self.runner.shares
        self.speculate = speculate or (0 if draft is None else GUESSES)
        places = Slots(slots if cache is None else cache.slots, keep)
        self.guesser = self._guesser(draft, places.count)
        memory, runner = self._memory(places, cache, draft, cache_bytes), self.runner

        def left(slot: int) -> None:
            runner.release(slot)
            if not runner.shares:  # keeps nothing of a sequence that is gone
                memory.drop(slot)

        self.scheduler = Scheduler(memory, prefill_tokens, 1 + self.speculate, left)
        self.prefix_cache_queries = self.prefix_cache_hits = 0  # tokens of prompts, and those of them that the cache had
        self.cache = cache
        self.vocab_size: int = model.config.vocab_size
        self.codec = Codec(renderer, self.vocab_size, model.ends if self.encodes else (), sources=self.encodes)
        self._submitted = count()

    def _guesser(self, draft: Any, slots: int) -> Guesser | None:
        if not self.speculate:
            return None
        if draft is None:
            return Lookup()
        with torch.inference_mode():
            return ModelDrafter(draft, self.model, slots, self.context_length)

    def _memory(self, slots: Slots, cache: KVCache | None, draft: Any, cache_bytes: int) -> Memory:
        """What bounds the cache: of our own on a CPU and of a causal model of `transformers`, tokens; else its places. An
        encoder-decoder keeps encoded sources, too, whose length is not known here."""
        one = token_bytes(self.model) + (0 if draft is None else token_bytes(draft))
        elsewhere = cache is not None and self.device.type != "cpu"
        if not one or self.encodes or elsewhere or isinstance(self.runner, RecomputingRunner):
            return Memory(slots)
        held = [each for each in (cache, self.guesser) if isinstance(each, KVCache | ModelDrafter)]

        def trim(slot: int, tokens: int) -> None:
            for each in held:
                each.trim(slot, tokens)

        return Memory(slots, cache_bytes // one, trim)

    @property
    def vocabulary(self) -> Vocabulary | None:
        return self.codec.vocabulary

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    def start(self) -> None:
        self.model.eval()

    def close(self) -> None:
        """All of this engine is in this object, and goes with it."""

    # -- asking

    def adapter(self, folder: Path) -> Lora:
        """The adapter in a folder, for `submit`, `generate` and `score`. Raises `ArtifactError`, `ConfigError` for an
        encoder-decoder."""
        if self.encodes:
            raise ConfigError("an encoder-decoder's adapter has to be merged into it", field="adapter")
        return read_lora(folder, self.model)

    def forget(self, lora: Lora) -> None:
        """What the cache holds of an adapter's finished texts is of no more use."""
        self.scheduler.slots.forget(lora)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; see `Codec.encode`."""
        return self.codec.encode(prompt)

    def submit(
        self, prompt_ids: Seq[int], sampling: Sampling, index: int = 0, lora: Lora | None = None, owner: str = ""
    ) -> Sequence:
        """Queues a prompt; what the prefix cache has of it is taken from texts of the same `owner` alone; `step` makes it run.

        Raises what `prepare` does, and `ConfigError` for beams: see `generate`."""
        if sampling.beams > 1:
            raise ConfigError("beam search gives whole answers", field="beams", found=sampling.beams, fix="use Engine.generate")
        sequence = self.prepare(prompt_ids, sampling, index, lora)
        sequence.owner = owner
        self.scheduler.add(sequence)
        return sequence

    def prepare(self, prompt_ids: Seq[int], sampling: Sampling, index: int = 0, lora: Lora | None = None) -> Sequence:
        """A sequence that is not queued yet. `index` says which of the n answers this is, `lora` what the model wears for it.

        Raises `ContextOverflow`, `DataError` (empty prompt, unknown token), `ConfigError` (stop texts without a tokenizer).
        """
        ids, source = [int(t) for t in prompt_ids], None
        check_tokens(ids, self.vocab_size)
        if self.encodes:
            check_length(ids, self.rooms[0])
            ids, source = list(self.model.start), ids
        limit = answer_limit(ids, sampling, self.rooms[1])
        stream = self.codec.stream(sampling)
        number = next(self._submitted)
        seed = sampling.seed if sampling.seed is not None else (self.seed << 32) + number
        constraint = None if sampling.grammar is None else self.constrain(sampling.grammar)
        rules = Rules.of(self.model.generation, sampling) if self.encodes else None
        return Sequence(
            ids, sampling, stream, seed=seed, index=index, limit=limit, ends=self.codec.ends_of(sampling),
            constraint=constraint, source=source, lora=lora, rules=rules,
        )  # fmt: skip

    def constrain(self, grammar: Grammar) -> Constraint:
        """The constraint of one answer. Compiling takes its time, the first time: call this from another thread before `submit`
        where nothing may wait. Raises `ConfigError` for a grammar that cannot be used, or without a tokenizer."""
        return self.codec.constrain(grammar)

    def weights_changed(self) -> None:
        """Call after the weights of the model or of an adapter were changed in place: what the cache holds of finished texts is
        forgotten.

        Sequences that run go on with keys and values of the old weights; drain the engine first where that matters.
        """
        self.scheduler.slots.forget()
        if isinstance(self.runner, FusedRunner):
            self.runner.fused.refresh()

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence now and frees its slot. Of no effect on a finished one."""
        if sequence.finish_reason is None:
            sequence.cancel()
        self._remove(sequence)  # one that ended in a step which then failed still has its slot

    def _remove(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    @property
    def waiting(self) -> deque[Sequence]:
        return self.scheduler.waiting

    @property
    def preemptions(self) -> int:
        return self.scheduler.preemptions

    @property
    def cache_usage(self) -> float:
        """The share of the cache that sequences have: of its tokens where those are bounded, else of its places."""
        memory = self.scheduler.memory
        if memory.most is None:
            return self.scheduler.slots.used / self.scheduler.slots.count
        return min(1.0, sum(s.cached for s in self.scheduler.active) / memory.most)

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
        work = [self._reading(s, n) for s, n in plan.prefill]
        for s, guessed in zip(plan.decode, guesses(self.guesser, plan.decode, self.speculate), strict=True):
            work.append(Work(s, [s.ids[-1], *guessed], wanted=1 + len(guessed)))
        if not work:
            return []
        logits = self.runner.logits(work)
        for w in work[: len(plan.prefill)]:
            self.scheduler.read(w.sequence, len(w.tokens))
        for sequence in plan.decode:
            sequence.cached += 1
        return self._choose([w for w in work if w.wanted], logits)

    def _reading(self, sequence: Sequence, count: int) -> Work:
        last = sequence.cached + count == sequence.target
        return Work(sequence, sequence.ids[sequence.cached : sequence.cached + count], wanted=int(last))

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

    def _goes_on(self, work: Work, place: int, token: int) -> bool:
        """Whether the guess after `place` was right, so that the next logits hold. Counts it."""
        if work.wanted == 1:
            return False
        right = place + 1 < work.wanted and work.sequence.finish_reason is None and work.tokens[place + 1] == token
        if right:
            work.sequence.cached += 1
        elif self.guesser is not None:
            note(work.sequence, work.wanted - 1, place, self.guesser, len(self.scheduler.running))
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
            self.scheduler.memory.hold(last.slot, last.cached + self.scheduler.ahead)
            self.runner.copy(old, last.slot, last.cached)
            slots.give(old)

    def generate(
        self, prompts: Seq[Prompt], sampling: Sampling | Seq[Sampling], lora: Lora | Seq[Lora | None] | None = None
    ) -> list[Completion]:
        """Answers in the order of the prompts, the n answers of one prompt together: sum of n completions. `lora`: the adapter
        of all prompts, or of each.

        Equal for greedy and for seeded sampling whatever else is in the list and in whatever order, up to ties within rounding.
        All prompts are checked before the first runs.
        """
        wanted = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        worn = [lora] * len(prompts) if lora is None or isinstance(lora, Lora) else list(lora)
        if any(how.beams > 1 for how in wanted):
            every = zip(prompts, wanted, worn, strict=True)
            with evaluating(self.model):
                return search(self, [self.prepare(self.encode(p), how, lora=own) for p, how, own in every])
        sequences: list[Sequence] = []
        try:
            for prompt, how, own in zip(prompts, wanted, worn, strict=True):
                ids = self.encode(prompt)
                sequences += [self.submit(ids, how, index, own) for index in range(how.n)]
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

    def score(self, requests: Seq[tuple[Seq[int], int]], lora: Lora | None = None) -> list[np.ndarray]:
        """Log-probabilities of given tokens: for each (ids, start) a float32 array over ids[start:], given the ids before."""
        return [s.logprobs for s in self.score_top(requests, 0, lora)]

    def score_top(self, requests: Seq[tuple[Seq[int], int]], top: int, lora: Lora | None = None) -> list[Scored]:
        """Like `score`, with the `top` most likely tokens at each place.

        Raises `DataError` for `start` outside 1..len(ids) (a first token has nothing to be conditioned on), `ContextOverflow`,
        `ConfigError` for an encoder-decoder.
        """
        if self.encodes:
            raise ConfigError(
                "an encoder-decoder does not say how likely a text is, only a target after a source", fix="use score_targets"
            )
        for ids, start in requests:
            check_tokens(ids, self.vocab_size)
            check_start(ids, start)
            check_length(ids, self.context_length)
        with evaluating(self.model), torch.inference_mode(), applied(self.model, lora):
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
            check_tokens(prompt, self.vocab_size)
            check_tokens(decoded, self.vocab_size)
            check_length(prompt, self.rooms[0])
            check_length(decoded, self.rooms[1])
        with evaluating(self.model), torch.inference_mode():
            return score_targets(self.model, pairs)

    def embed(self, prompts: Seq[Seq[int]], lora: Lora | None = None) -> list[np.ndarray]:
        """For each list of token ids the mean of its last hidden states, float32 [H], of length 1. One forward pass."""
        with evaluating(self.model), torch.inference_mode(), applied(self.model, lora):
            return embed(self.model, self.device, prompts)


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
    own = None
    if getattr(model.config, "max_position_embeddings", None) is not None:
        own = max(max_source_target_tokens(model)) if model.traits.encoder_decoder else max_text_tokens(model)
    if wanted is None and own is None:
        raise ConfigError("the model does not say how long its context is", field="max_length", fix="set max_length")
    if wanted is not None and (wanted < 2 or (own is not None and wanted > own)):
        raise ConfigError(
            "out of range", field="max_length", found=wanted, expected=f"from 2 to the model's context of {own} tokens"
        )
    return int(wanted if wanted is not None else own)  # type: ignore[arg-type]
