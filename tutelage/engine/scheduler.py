"""Who runs in the next step. Decided anew at every step, so a sequence that ends makes room for the next at once."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tutelage.engine.blocks import SHARED_FROM, Held, Place, Slots, common_length
from tutelage.engine.sequence import Sequence


@dataclass(slots=True, frozen=True)
class Plan:
    """One step: prompts (or parts of one) to read, and sequences that get their next token."""

    admitted: list[tuple[Sequence, Place]]  # sequences that got a place, and what of their prompt is there to be had
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
        admitted = self._admit()
        return Plan(admitted, self._prefill(), list(self.running))

    def _admit(self) -> list[tuple[Sequence, Place]]:
        """Gives places to those who wait. One whose prompt begins like one that is being read waits for that reading to end, and
        then starts from it."""
        admitted: list[tuple[Sequence, Place]] = []
        later: list[Sequence] = []
        while self.waiting and len(self.slots):
            sequence = self.waiting.popleft()
            if self.slots.keep and any(self._gains(sequence, other) for other in self.reading):
                later.append(sequence)
                continue
            held = ((s.slot, _held(s)) for s in (*self.running, *self.reading))
            place = self.slots.place(sequence.ids, held, sequence.lora)
            sequence.slot, sequence.cached, sequence.shared = place.slot, place.shared, place.shared
            self.reading.append(sequence)
            admitted.append((sequence, place))
        self.waiting.extendleft(reversed(later))
        return admitted

    @staticmethod
    def _gains(sequence: Sequence, reader: Sequence) -> bool:
        """True when `reader`, once it is through its prompt, will hold much of what `sequence` begins with."""
        if sequence.lora is not reader.lora:
            return False
        common = common_length(sequence.ids, reader.ids, len(sequence.ids) - 1)
        return common >= max(4 * SHARED_FROM, reader.shared + SHARED_FROM)

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
            self.slots.give(sequence.slot, _held(sequence))
            sequence.slot = -1


def _held(sequence: Sequence) -> Held:
    return Held(sequence.ids[: sequence.cached], sequence.lora)
