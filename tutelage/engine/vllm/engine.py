"""vLLM behind the engine protocol: its scheduler, cache and kernels, our prompts, texts and reasons to end.

vLLM computes in a process of its own. Of its two front ends this is the synchronous one: whoever drives an engine alternates
between orders and steps, so an event loop between them would bring a thread more and nothing sooner. An order waits for at most
one step, and what a step gave is passed on as soon as it is there. Texts, stop texts and grammars are followed here, token by
token, by the same `Sequence` that our own engine has; an answer that ends here is aborted there.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.engine.codec import Codec, Prompt
from tutelage.engine.limits import answer_limit, check_length, check_start, check_tokens
from tutelage.engine.scoring import Request, Scored
from tutelage.engine.sequence import Event, Sampling, Sequence, TokenScore
from tutelage.engine.vllm import sampling as vllm_sampling
from tutelage.engine.vllm.loading import Stats, load
from tutelage.errors import ConfigError
from tutelage.structured.grammar import Constraint, Grammar
from tutelage.tokenizer.detokenize import Vocabulary

OURS = "serve it with --engine tutelage"
DTYPES = ("stored", "auto", "float32", "bfloat16", "float16")
CLOSING_SECONDS = 20  # that vLLM's processes have to end by themselves


class VllmEngine:
    """Generates with the model of a folder. Nothing is downloaded or reported, no pickle is read, no code from the folder runs.

    renderer: as for `Engine`. slots: sequences that run at a time; vLLM's own number where None.
    max_length: tokens of prompt and answer; the model's own context where None. dtype: of the weights and of what is computed;
    "stored" is the folder's, "auto" vLLM's own rule, which halves float32.
    prefix_cache: prompts start from what an earlier text has in common with them. more: further arguments of vLLM's `EngineArgs`.
    Raises `MissingExtra` without vLLM, `ArtifactError` for a folder that it does not serve, `ConfigError` for arguments that are
    unknown or not free.
    """

    def __init__(
        self, folder: Path | str, renderer: Any = None, slots: int | None = None, max_length: int | None = None, *,
        dtype: str = "stored", prefix_cache: bool = True, **more: Any,
    ) -> None:  # fmt: skip
        if dtype not in DTYPES:
            raise ConfigError("vLLM reads no weights as this type", field="dtype", found=dtype, expected=", ".join(DTYPES))
        self.renderer = renderer
        self._stats = Stats()
        self._engine = load(
            Path(folder), self._stats, more, max_num_seqs=slots, max_model_len=max_length, dtype=dtype,
            enable_prefix_caching=prefix_cache,
        )  # fmt: skip
        config = self._engine.model_config
        self.context_length = int(config.max_model_len)
        self.vocab_size = int(config.get_vocab_size())
        self.hidden_size = int(config.get_hidden_size())
        self.codec = Codec(renderer, self.vocab_size)
        self.prefix_cache_queries = self.prefix_cache_hits = 0
        self._numbers = itertools.count()
        self._running: dict[str, Sequence] = {}  # by request id; those that wait included
        self._ids: dict[Sequence, str] = {}
        self._waiting: dict[str, Sequence] = {}
        self._scores: dict[str, Any] = {}  # finished outputs of scoring requests
        self._events: deque[Event] = deque()  # that came while prompts were scored

    @property
    def vocabulary(self) -> Vocabulary | None:
        return self.codec.vocabulary

    def start(self) -> None:
        """vLLM runs since it was made."""

    def close(self) -> None:
        """Ends vLLM's processes."""
        self._engine.engine_core.shutdown(CLOSING_SECONDS)
        self._engine.renderer.shutdown()

    # -- asking

    def encode(self, prompt: Prompt) -> list[int]:
        return self.codec.encode(prompt)

    def constrain(self, grammar: Grammar) -> Constraint:
        return self.codec.constrain(grammar)

    def adapter(self, folder: Path) -> Any:
        raise ConfigError("adapters are served by our own engine only", field="adapter", found=folder, fix=OURS)

    def forget(self, lora: Any) -> None:
        """There are none."""

    def submit(self, prompt_ids: Seq[int], sampling: Sampling, index: int = 0, lora: Any = None, owner: str = "") -> Sequence:
        """Queues a prompt; `step` says what came of it. Raises what `Engine.submit` raises, and `ConfigError` naming the field
        for what vLLM cannot do."""
        ids = [int(t) for t in prompt_ids]
        check_tokens(ids, self.vocab_size)
        vllm_sampling.check(sampling)
        limit = answer_limit(ids, sampling, self.context_length)
        sequence = Sequence(
            ids, sampling, self.codec.stream(sampling), seed=sampling.seed or 0, index=index, limit=limit,
            ends=self.codec.ends_of(sampling),
            constraint=None if sampling.grammar is None else self.constrain(sampling.grammar),
        )  # fmt: skip
        known = self.vocab_size if self.vocabulary is None else len(self.vocabulary)
        request = self._add(ids, vllm_sampling.answering(sequence, self.vocab_size, known), owner)
        self._running[request] = self._waiting[request] = sequence
        self._ids[sequence] = request
        return sequence

    def _add(self, ids: list[int], params: Any, owner: str = "") -> str:
        """Hands a request over and returns its id. Raises `ConfigError` for what vLLM refuses."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input

        request = str(next(self._numbers))
        # The prefix cache shares nothing between prompts of different salts.
        salt = {"cache_salt": owner} if owner else {}
        try:
            self._engine.add_request(request, {**tokens_input(ids), **salt}, params)
        except VLLMClientError as error:
            raise ConfigError(f"vLLM refuses this: {error}", field=getattr(error, "parameter", None)) from error
        return request

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence now and frees its place. Of no effect on a finished one."""
        if sequence.finish_reason is None:
            sequence.cancel()
            self._engine.abort_request([self._forget(sequence)])

    def _forget(self, sequence: Sequence) -> str:
        request = self._ids.pop(sequence)
        del self._running[request]
        self._waiting.pop(request, None)
        return request

    # -- running

    def step(self) -> list[Event]:
        """Waits for vLLM's next step. One event per token made."""
        if not self._events:
            self._advance()
        events = list(self._events)
        self._events.clear()
        return events

    def _advance(self) -> None:
        done: list[str] = []
        for output in self._engine.step():
            sequence = self._running.get(output.request_id)
            if sequence is not None:
                self._events += self._taken(sequence, output, done)
            elif output.finished and output.request_id in self._scores:
                self._scores[output.request_id] = output
        if done:
            self._engine.abort_request(done)
        # First come, first served: whom vLLM has not taken up yet are the last ones.
        for request in list(self._waiting)[: max(0, len(self._waiting) - self._stats.waiting)]:
            del self._waiting[request]

    def _taken(self, sequence: Sequence, output: Any, done: list[str]) -> Iterator[Event]:
        """The events of one sequence's new tokens. Adds its request to `done` where vLLM does not know that it has ended."""
        self._waiting.pop(output.request_id, None)
        if not sequence.made:
            sequence.shared = output.num_cached_tokens or 0
            self.prefix_cache_queries += sequence.prompt_length
            self.prefix_cache_hits += sequence.shared
        made = output.outputs[0]
        for place, token in enumerate(made.token_ids):
            yield sequence.append(_score(token, made.logprobs[place] if made.logprobs else {}, sequence.sampling.logprobs))
            if sequence.finish_reason is not None:
                break
        if output.finished and sequence.finish_reason is None:  # vLLM gave it up
            yield sequence.cut()
        if sequence.finish_reason is not None:
            self._forget(sequence)
            if not output.finished:
                done.append(output.request_id)

    def score_top(self, requests: Seq[Request], top: int, lora: Any = None) -> list[Scored]:
        """Log-probabilities of ids[start:] of each (ids, start), with the `top` most likely tokens at each place. Answers go on
        meanwhile. Raises what `Engine.score_top` raises."""
        for ids, start in requests:
            check_tokens(ids, self.vocab_size)
            check_start(ids, start)
            check_length(ids, self.context_length)
        top = min(top, self.vocab_size)
        asked = [
            self._add(list(ids[:-1]), vllm_sampling.scoring(ids[-1], top)) if start < len(ids) else ""  # nothing to score
            for ids, start in requests
        ]
        self._scores = {request: None for request in asked if request}
        while any(output is None for output in self._scores.values()):
            self._advance()
        found, self._scores = self._scores, {}
        return [_scored(ids, start, found.get(request), top) for (ids, start), request in zip(requests, asked, strict=True)]

    def embed(self, prompts: Seq[Seq[int]], lora: Any = None) -> list[np.ndarray]:
        raise ConfigError("vLLM gives no embeddings with a model that it generates with", field="model", fix=OURS)

    # -- looking

    @property
    def idle(self) -> bool:
        return not (self._running or self._events)

    @property
    def waiting(self) -> Collection[Sequence]:
        return tuple(self._waiting.values())

    @property
    def cache_usage(self) -> float:
        return self._stats.cache_usage if self._running else 0.0

    @property
    def preemptions(self) -> int:
        return self._stats.preemptions


def _score(token: int, row: Mapping[int, Any], top: int | None) -> TokenScore:
    """vLLM lists the token itself beside the most likely ones, in any order."""
    if not row:
        return TokenScore(token, 0.0)
    best = sorted(((t, float(p.logprob)) for t, p in row.items()), key=lambda pair: -pair[1])
    return TokenScore(token, float(row[token].logprob), tuple(best[: top or 0]))


def _scored(ids: Seq[int], start: int, output: Any, top: int) -> Scored:
    rows = [] if output is None else [*output.prompt_logprobs, *output.outputs[0].logprobs][start:]
    scores = [_score(token, row, top) for token, row in zip(ids[start:], rows, strict=True)]
    shape = (len(scores), top)
    return Scored(
        np.array([s.logprob for s in scores], np.float32),
        np.array([[t for t, _ in s.top] for s in scores], np.int64).reshape(shape),
        np.array([[p for _, p in s.top] for s in scores], np.float32).reshape(shape),
        np.array([row[token].rank for token, row in zip(ids[start:], rows, strict=True)] if top else [], np.int64),
    )
