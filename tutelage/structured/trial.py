"""Tries a grammar in a process of its own first. The grammar library cannot be interrupted, and for some small grammars it takes
minutes and gigabytes, or holds the interpreter's lock for seconds at a token: a process can be killed.

`Trials` is the side that asks. Run as a program, this file is the side that may be killed; it imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

MEMORY = 64 << 20  # bytes that one compiled grammar may take
STEP_SECONDS = 0.25  # of processor time for one token's mask
WALKS, STEPS = 3, 12  # answers that a grammar is tried with, and tokens of each
ROOM = 1 << 30  # bytes of address space for the process beyond what it starts with
PATIENCE = 4  # times the processor time that a grammar may take, on a machine that does other things too
START_SECONDS = 60.0  # until the process has read the vocabulary


class GrammarProbe:
    """Up to `most` processes that try grammars for one tokenizer. Safe to use from several threads.

    told: `tokens` (bytes of each), `special` (ids of those that are no text), `ends`, `vocab_size`, `limits` of the library.
    """

    def __init__(self, told: dict[str, Any], most: int = 2) -> None:
        self._told = told
        self._free = threading.BoundedSemaphore(most)
        self._idle: list[_Process] = []
        weakref.finalize(self, _end_all, self._idle)

    def run(self, text: str, seconds: float) -> str | None:
        """What is wrong with a grammar, as the library reads it; None for one that may be used.

        Raises `TimeoutError` when it takes more than `seconds` of processor time, or the process more memory than it may have,
        `BlockingIOError` when others were being tried all that time.
        """
        if not self._free.acquire(timeout=max(seconds, 0.1)):
            raise BlockingIOError
        try:
            process = next((p for p in iter(self._take, None) if p.alive), None) or _Process(self._told)
            try:
                found = process.ask((text, seconds), PATIENCE * seconds)
            except BaseException:
                process.end()
                raise
            self._idle.append(process)
            return found
        finally:
            self._free.release()

    def _take(self) -> _Process | None:
        return self._idle.pop() if self._idle else None


class _Process:
    def __init__(self, told: dict[str, Any]) -> None:
        command = [sys.executable, "-P", __file__]  # not our folder on its path: `text.py` there is ours
        self._popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C stops an answer, not this
        )  # fmt: skip
        self.ask(told, START_SECONDS)

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def ask(self, question: Any, seconds: float) -> str | None:
        """The answer. Raises `TimeoutError` when there is none: the process was killed, by the clock or by its own limits."""
        assert self._popen.stdin is not None and self._popen.stdout is not None
        timer = threading.Timer(seconds, self._popen.kill)
        timer.start()
        try:
            self._popen.stdin.write(json.dumps(question).encode() + b"\n")
            self._popen.stdin.flush()
            found: str | None = json.loads(self._popen.stdout.readline())
            return found
        except (OSError, ValueError) as error:  # nothing, or half a line
            raise TimeoutError from error
        finally:
            timer.cancel()

    def end(self) -> None:
        self._popen.kill()
        self._popen.communicate()


def _end_all(processes: list[_Process]) -> None:
    for process in processes:
        process.end()


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


def _limit(kind: str, value: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        limit = getattr(resource, kind)
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


class _Tokens:
    """A vocabulary as the library asks for it; how a text is cut into tokens does not matter here."""

    bos_token_id = None

    def __init__(self, told: dict[str, Any]) -> None:
        self.tokens = [token.encode("latin-1") for token in told["tokens"]]  # a character a byte
        self.special_token_ids, self.eos_token_id = told["special"], told["ends"][0]
        self._byte = {token: i for i, token in reversed([*enumerate(self.tokens)]) if len(token) == 1}

    def __call__(self, text: bytes) -> list[int]:
        return [self._byte[text[i : i + 1]] for i in range(len(text)) if text[i : i + 1] in self._byte]


def main() -> None:
    """Reads the vocabulary, then grammars, until the other side closes; it may be gone while a grammar is tried."""
    import llguidance

    source, sink = sys.stdin.buffer, sys.stdout.buffer
    told = json.loads(source.readline())
    tokenizer = llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(_Tokens(told)), n_vocab=told["vocab_size"], eos_token=told["ends"]
    )
    limits = llguidance.LLParserLimits(**told["limits"])
    with contextlib.suppress(OSError):
        _limit("RLIMIT_AS", _address_space() + ROOM)
    answer: str | None = None
    while True:
        sink.write(json.dumps(answer).encode() + b"\n")
        sink.flush()
        line = source.readline()
        if not line:
            return
        text, seconds = json.loads(line)
        _limit("RLIMIT_CPU", math.ceil(time.process_time() + seconds))
        answer = _try(llguidance, tokenizer, limits, text)


if __name__ == "__main__":
    main()
