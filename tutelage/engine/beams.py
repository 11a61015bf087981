"""Beam search: whole answers that are likely, instead of likely next tokens.

The `beams` best beginnings of an answer go on together, each a sequence with a slot of its own; where one forks, its slot is
copied. Equal to `generate(num_beams=...)` of `transformers`. The beams of a prompt begin and end together, apart from the
scheduler; as many prompts run at a time as there are slots for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tutelage.engine.runner import Runner, Work
from tutelage.engine.sampler import adjusted
from tutelage.engine.sequence import Completion, Sampling, Sequence, TokenScore
from tutelage.errors import ConfigError

if TYPE_CHECKING:
    from tutelage.engine.engine import Engine


@dataclass(slots=True, frozen=True)
class Ended:
    """An answer of a group."""

    score: float  # log-probability over length ** length_penalty
    ids: list[int]  # the tokens made


class Group:
    """The beams of one prompt, with their sums of log-probabilities. `forced`: tokens that every target begins with and that
    count for its length."""

    def __init__(self, first: Sequence, slots: list[int], forced: int) -> None:
        self.first, self.slots, self.forced = first, slots, forced
        self.beams, self.scores = [first], torch.zeros(1)
        first.slot = slots[0]
        self.ended: list[Ended] = []  # best first

    @property
    def sampling(self) -> Sampling:
        return self.first.sampling

    def work(self) -> list[Work]:
        return [Work(beam, beam.ids[beam.cached :]) for beam in self.beams]

    def advance(self, logits: Tensor, vocabulary: int | None, runner: Runner) -> bool:
        """Takes the logits [beams alive, V] of what `work` gave out; True when the search is over."""
        for beam in self.beams:
            beam.cached = len(beam.ids)
        logprobs = adjusted(logits.float().log_softmax(-1)[:, :vocabulary], self.beams)
        total = (self.scores.to(logprobs)[:, None] + logprobs).flatten()
        count, made = self.sampling.beams, self.beams[0].made + 1
        # So many that enough go on even where every beam could end with each of its end tokens.
        best = total.topk(min(count * max(2, 1 + len(self.first.ends)), len(total)))
        going: list[tuple[float, int, int]] = []  # score, beam, token
        for rank, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            beam, token = divmod(place, logprobs.shape[-1])
            over = token in self.first.ends or made == self.first.limit
            if score == -torch.inf:
                break
            if over and rank < count:
                ids = [*self.beams[beam].ids[self.first.prompt_length :], token]
                self.ended.append(Ended(score / (made + self.forced) ** self.sampling.length_penalty, ids))
            elif not over and len(going) < count:
                going.append((score, beam, token))
        self.ended = sorted(self.ended, key=lambda e: -e.score)[:count]
        if self._settled(going, made):
            return True
        self._fork(going, runner)
        return False

    def _settled(self, going: list[tuple[float, int, int]], made: int) -> bool:
        """Whether nothing that goes on can be better than what has ended."""
        how = self.sampling
        if not going or len(self.ended) < how.beams:
            return not going
        if how.early_stopping is True:
            return True
        hoped = self.first.limit if how.early_stopping == "never" and how.length_penalty > 0 else made
        return going[0][0] / (hoped + self.forced) ** how.length_penalty <= self.ended[-1].score

    def _fork(self, going: list[tuple[float, int, int]], runner: Runner) -> None:
        """Makes the next beams: a beam's first child takes its slot, others get a copy in a slot that nobody goes on from."""
        parents = {beam: self.beams[beam].slot for _, beam, _ in going}
        free = [slot for slot in self.slots if slot not in parents.values()]
        children: list[tuple[float, Sequence]] = []
        for score, beam, token in going:
            parent = self.beams[beam]
            child = fork(parent, [*parent.ids, token])
            child.slot, child.cached = parents.pop(beam, -1), parent.cached
            if child.slot < 0:
                child.slot = free.pop()
                runner.fork(parent.slot, child.slot, parent.cached)
            children.append((score, child))
        children.sort(key=lambda c: c[1].slot)  # rows of a cache that stay where they are
        self.beams, self.scores = [child for _, child in children], torch.tensor([score for score, _ in children])


def fork(of: Sequence, ids: list[int]) -> Sequence:
    """A sequence of the same prompt that has come to `ids`."""
    out = Sequence(
        of.ids[: of.prompt_length], of.sampling, of.stream, seed=0, index=0, limit=of.limit, ends=of.ends, source=of.source,
        lora=of.lora, rules=of.rules,
    )  # fmt: skip
    out.ids = ids
    return out


@torch.inference_mode()
def search(engine: Engine, firsts: list[Sequence]) -> list[Completion]:
    """The best `n` answers to each prompt; `firsts` are sequences with nothing made yet. Raises `ConfigError` for more beams than
    there are slots, and for prompts that want none."""
    slots, runner = engine.scheduler.slots, engine.runner
    for beams in (s.sampling.beams for s in firsts):
        if not 1 < beams <= slots.count:
            expected = f"from 2 to the engine's {slots.count} slots, for every prompt of the call"
            raise ConfigError("not a number of beams", field="beams", found=beams, expected=expected)
    waiting, running = deque(firsts), list[Group]()
    found: dict[int, list[Completion]] = {}
    vocabulary = None if engine.vocabulary is None else len(engine.vocabulary)
    try:
        while waiting or running:
            while waiting and len(slots) >= waiting[0].sampling.beams:
                first = waiting.popleft()
                taken = [slots.take(slots.lowest) for _ in range(first.sampling.beams)]
                running.append(Group(first, taken, first.prompt_length - 1 if engine.encodes else 0))
            if not running:
                engine.step()  # others have the slots
                continue
            work = [group.work() for group in running]
            logits = runner.logits([w for part in work for w in part]).split([len(part) for part in work])
            for group, rows in list(zip(running, logits, strict=True)):
                if group.advance(rows, vocabulary, runner):
                    running.remove(group)
                    _leave(group, engine)
                    found[id(group.first)] = _answers(group, engine)
    finally:
        for group in running:
            _leave(group, engine)
    return [answer for first in firsts for answer in found[id(first)]]


def _leave(group: Group, engine: Engine) -> None:
    for slot in group.slots:
        engine.runner.release(slot)
        engine.scheduler.slots.give(slot)


def _answers(group: Group, engine: Engine) -> list[Completion]:
    out = []
    for index, ended in enumerate(group.ended[: group.sampling.n]):
        answer = engine.prepare(group.first.prompt, group.sampling, index, group.first.lora)
        for token in ended.ids:
            answer.append(TokenScore(token, 0.0))
        out.append(answer.completion())
    return out
