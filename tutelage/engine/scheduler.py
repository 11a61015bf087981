"""Who runs in the next step. Decided anew at every step, so a sequence that ends makes room for the next at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tutelage.engine.blocks import SHARED_FROM, Held, Place, common_length
from tutelage.engine.memory import Memory
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
    """First come, first served. A step reads at most `prefill_tokens` of prompts, so that running answers never wait long. Where
    memory does not suffice for all that run to go on, the last to come gives its place back and waits again; what it has made is
    read again later.

    ahead: tokens that a step may add to a sequence. left: is told of places that were given back.
    """

    def __init__(
        self, memory: Memory, prefill_tokens: int = 2048, ahead: int = 1, left: Callable[[int], None] = lambda slot: None
    ) -> None:
        self.memory, self.slots, self.prefill_tokens, self.ahead, self.left = memory, memory.slots, prefill_tokens, ahead, left
        self.preemptions = 0
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
        self._make_way()
        admitted = self._admit()
        return Plan(admitted, self._prefill(), list(self.running))

    @property
    def active(self) -> list[Sequence]:
        """Sequences that have a place, first come first."""
        return [*self.running, *self.reading]

    def _make_way(self) -> None:
        """Memory for the next tokens of those that run."""
        while active := self.active:
            wanted = sum(self.memory.more(s.slot, s.cached + self.ahead) for s in self.running)
            if self.memory.make_room(wanted, active, self.ahead) or len(active) == 1:
                break
            last = active[-1]
            self.remove(last)
            last.cached = 0
            self.waiting.appendleft(last)
            self.preemptions += 1
        for sequence in self.running:
            self.memory.hold(sequence.slot, sequence.cached + self.ahead)

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
            active, needed = self.active, len(sequence.ids) + self.ahead
            if active and not self.memory.admits(needed, active, self.ahead):
                later.append(sequence)
                break
            held = ((s.slot, _held(s)) for s in active)
            place = self._in_memory(self.slots.place(sequence.ids, held, sequence.lora, sequence.owner), needed, active)
            sequence.slot, sequence.cached, sequence.target = place.slot, place.shared, len(sequence.ids)
            sequence.shared = max(sequence.shared, place.shared) if sequence.made else place.shared
            self.reading.append(sequence)
            admitted.append((sequence, place))
        self.waiting.extendleft(reversed(later))
        return admitted

    def _in_memory(self, place: Place, tokens: int, active: list[Sequence]) -> Place:
        """The place with memory for so many tokens; where its source would have to go for them, without that."""
        memory = self.memory
        if not memory.make_room(memory.more(place.slot, tokens), active, self.ahead, {place.slot, place.source}):
            memory.drop(place.slot, tokens)
            if place.source != place.slot and all(place.source != s.slot for s in active):
                place = Place(place.slot, place.slot, 0)
            memory.make_room(memory.more(place.slot, tokens), active, self.ahead, {place.slot})
        memory.hold(place.slot, tokens)
        return place

    @staticmethod
    def _gains(sequence: Sequence, reader: Sequence) -> bool:
        """True when `reader`, once it is through its prompt, will hold much of what `sequence` begins with."""
        if sequence.lora is not reader.lora or sequence.owner != reader.owner:
            return False
        common = common_length(sequence.ids, reader.ids, len(sequence.ids) - 1)
        return common >= max(4 * SHARED_FROM, reader.shared + SHARED_FROM)

    def _prefill(self) -> list[tuple[Sequence, int]]:
        """Prompts in order of arrival, as many as fit padded to the longest; one larger than the budget comes in parts."""
        chosen: list[tuple[Sequence, int]] = []
        longest = 0
        for sequence in self.reading:
            left = sequence.target - sequence.cached
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
        if sequence.cached < sequence.target:
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
            self.left(sequence.slot)
            self.slots.give(sequence.slot, _held(sequence))
            sequence.slot = -1


def _held(sequence: Sequence) -> Held:
    return Held(sequence.ids[: sequence.cached], sequence.lora, sequence.owner)
