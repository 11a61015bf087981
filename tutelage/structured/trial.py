"""Tries each grammar in a worker process first. The grammar library cannot be interrupted, and for some small grammars it takes
minutes and gigabytes, or holds the interpreter's lock for seconds at a token: a process can be killed.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tutelage.workers import Workers

MEMORY = 64 << 20  # bytes that one compiled grammar may take
STEP_SECONDS = 0.25  # of processor time for one token's mask
WALKS, STEPS = 3, 12  # answers that a grammar is tried with, and tokens of each
PATIENCE = 4  # times the processor time that a grammar may take, on a machine that does other things too


class GrammarProbe(Workers):
    """Up to `most` processes that try grammars for one tokenizer. Safe to use from several threads.

    setup: `tokens` (bytes of each), `special` (ids that are no text), `ends`, `vocab_size`, `limits` of the library.
    seconds: processor time for one grammar.
    """

    def __init__(self, setup: dict[str, Any], seconds: float, most: int = 2) -> None:
        super().__init__(
            f"{__name__}:grammar_checker", setup, seconds=seconds, wall_seconds=PATIENCE * seconds, most=most, bounded=True
        )
        self._wait = max(seconds, 0.1)

    def run(self, text: str) -> str | None:
        """What is wrong with a grammar, as the library reads it; None for one that may be used.

        Raises `TimeoutError` when it takes more processor time or memory than it may, `BlockingIOError` when all processes were
        busy for as long as one grammar may take.
        """
        answer = self.ask(text, wait=self._wait)
        if answer.why:
            raise TimeoutError(answer.why)
        found: str | None = answer.value
        return found


def _try(library: Any, tokenizer: Any, limits: Any, text: str) -> str | None:
    """Compiles a grammar and walks through it, as answers would."""
    before = _resident()
    first = library.LLMatcher(tokenizer, text, log_level=0, limits=limits)
    first.compute_bitmask()
    if first.is_error():
        return str(first.get_error())
    wrong = next(filter(None, (_walk(first.deep_copy(), random.Random(seed)) for seed in range(WALKS))), None)
    return wrong or (f"it takes more than {MEMORY >> 20} MiB" if _resident() - before > MEMORY else None)


def _walk(matcher: Any, rng: random.Random) -> str | None:
    """What goes wrong in the first tokens of an answer at random."""
    for _ in range(STEPS):
        began = time.process_time()
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        if time.process_time() - began > STEP_SECONDS:
            return "it takes too long at every token"
        if matcher.is_error():
            return str(matcher.get_error())
        if matcher.is_stopped() or not bits:
            return None
        allowed = [i for i, bit in enumerate(reversed(f"{bits:b}")) if bit == "1"]
        if not matcher.consume_token(rng.choice(allowed)):
            return str(matcher.get_error())
    return None


def _resident() -> int:
    """Bytes of memory held; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class _Tokens:
    """A vocabulary as the library asks for it; how a text is cut into tokens does not matter here."""

    bos_token_id = None

    def __init__(self, setup: dict[str, Any]) -> None:
        self.tokens = [token.encode("latin-1") for token in setup["tokens"]]  # a character a byte
        self.special_token_ids, self.eos_token_id = setup["special"], setup["ends"][0]
        self._byte = {token: i for i, token in reversed([*enumerate(self.tokens)]) if len(token) == 1}

    def __call__(self, text: bytes) -> list[int]:
        return [self._byte[text[i : i + 1]] for i in range(len(text)) if text[i : i + 1] in self._byte]


def grammar_checker(setup: dict[str, Any]) -> Callable[[str], str | None]:
    """The worker's side: `_try` with the vocabulary of `setup`."""
    import llguidance

    tokenizer = llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(_Tokens(setup)), n_vocab=setup["vocab_size"], eos_token=setup["ends"]
    )
    return partial(_try, llguidance, tokenizer, llguidance.LLParserLimits(**setup["limits"]))
