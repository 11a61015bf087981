"""Who runs in the next step. Decided anew at every step, so a sequence that ends makes room for the next at once."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tutelage.engine.blocks import Slots
from tutelage.engine.sequence import Sequence


@dataclass(slots=True, frozen=True)
class Plan:
    """One step: prompts (or parts of one) to read, and sequences that get their next token."""

    prefill: list[tuple[Sequence, int]]  # sequence, tokens of its prompt to read now
    decode: list[Sequence]

    def __bool__(self) -> bool:
        return bool(self.prefill or self.decode)


class Scheduler:
    """First come, first served. A step reads at most `prefill_tokens` of prompts, so that running answers never wait long."""

    def __init__(self, slots: Slots, prefill_tokens: int = 2048) -> None:
        self.slots, self.prefill_tokens = slots, prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.reading: deque[Sequence] = deque()  # have a slot; their prompt is not all read
        self.running: list[Sequence] = []

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.reading or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def plan(self) -> Plan:
        """The next step. Sequences with a prompt that is read by it count as running afterwards (see `read`)."""
        while self.waiting and len(self.slots):
            sequence = self.waiting.popleft()
            sequence.slot = self.slots.take()
            self.reading.append(sequence)
        return Plan(self._prefill(), list(self.running))

    def _prefill(self) -> list[tuple[Sequence, int]]:
        """Prompts in order of arrival, as many as fit padded to the longest; one larger than the budget comes in parts."""
        chosen: list[tuple[Sequence, int]] = []
        longest = 0
        for sequence in self.reading:
            left = sequence.prompt_length - sequence.cached
            longest = max(longest, left)
            if chosen and longest * (len(chosen) + 1) > self.prefill_tokens:
                break
            chosen.append((sequence, min(left, self.prefill_tokens)))
            if left > self.prefill_tokens:
                break
        return chosen

    def read(self, sequence: Sequence, count: int) -> bool:
        """Notes that `count` more tokens of the prompt are in the cache; True when that was the last part."""
        sequence.cached += count
        if sequence.cached < sequence.prompt_length:
            return False
        self.reading.remove(sequence)
        self.running.append(sequence)
        return True

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its slot."""
        for queue in (self.running, self.reading, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
        if sequence.slot >= 0:
            self.slots.give(sequence.slot)
            sequence.slot = -1
