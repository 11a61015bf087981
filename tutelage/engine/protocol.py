"""What the server asks of an engine. `Engine` is ours; `vllm.py` has another."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tutelage.engine.codec import Prompt
from tutelage.engine.scoring import Request, Scored
from tutelage.engine.sequence import Event, Sampling, Sequence
from tutelage.structured.grammar import Constraint, Grammar
from tutelage.tokenizer.detokenize import Vocabulary


class EngineProtocol(Protocol):
    """Answers prompts with one model. One thread at a time, but for `encode` and `constrain`, which any thread may call, and the
    counts, which any thread may read."""

    renderer: Any
    context_length: int  # tokens of prompt and answer together
    vocab_size: int  # width of the logits

    @property
    def vocabulary(self) -> Vocabulary | None: ...

    @property
    def hidden_size(self) -> int:
        """Width of an embedding."""

    def start(self) -> None:
        """To be called before the first step."""

    def close(self) -> None:
        """To be called after the last one. Ends what the engine runs outside this object."""

    # -- asking

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, of messages, or of ids."""

    def constrain(self, grammar: Grammar) -> Constraint:
        """The constraint of one answer. Raises `ConfigError` for a grammar that cannot be used. May take its time, once."""

    def adapter(self, folder: Path) -> Any:
        """The adapter in a folder, for `lora` below. Raises `ArtifactError`, and `ConfigError` where this engine takes none."""

    def forget(self, lora: Any) -> None:
        """An adapter that nobody will ask for again."""

    def submit(self, prompt_ids: Seq[int], sampling: Sampling, index: int = 0, lora: Any = None, owner: str = "") -> Sequence:
        """Queues answer `index` of n. Texts of different owners share nothing in the prefix cache.

        Raises `ContextOverflow`, `DataError` for an empty prompt and an unknown token,
        `ConfigError` for what this engine cannot do."""

    def step(self) -> list[Event]:
        """Some sequences' next tokens; not to be called while `idle`."""

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence now. Of no effect on a finished one."""

    def score_top(self, requests: Seq[Request], top: int, lora: Any = None) -> list[Scored]:
        """Log-probabilities of ids[start:] of each (ids, start), with the `top` most likely tokens at each place.

        Raises `ContextOverflow`, and `DataError` for an unknown token and for a `start` outside 1..len(ids).
        """

    def embed(self, prompts: Seq[Seq[int]], lora: Any = None) -> list[np.ndarray]:
        """A unit vector [H] float32 a prompt. Raises `ConfigError` where the engine has none to give."""

    # -- looking

    @property
    def idle(self) -> bool:
        """No sequence waits or runs."""

    @property
    def waiting(self) -> Collection[Sequence]:
        """Sequences that no step has taken up yet."""

    @property
    def cache_usage(self) -> float:
        """The share of the key-value cache that is in use, from 0 to 1."""

    @property
    def preemptions(self) -> int:
        """How often a sequence had to wait again because memory was needed for others."""

    @property
    def prefix_cache_queries(self) -> int:
        """Tokens of prompts that were taken up."""

    @property
    def prefix_cache_hits(self) -> int:
        """Those of them that were in the cache already."""
