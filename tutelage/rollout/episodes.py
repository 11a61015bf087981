"""Episodes of several turns: the model answers, tools or an environment reply, it goes on. Its own ids are carried verbatim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tutelage.chat.tool_calls import parse_calls
from tutelage.engine import Sampling
from tutelage.engine.tools import Tool, run_calls
from tutelage.records import Message, Prompt, Rollout
from tutelage.rollout.environments import Environments, Hosted
from tutelage.rollout.sampler import Sampler, noise
from tutelage.structured.tool_choice import CallStyle, call_style


@dataclass(slots=True)
class _Episode:
    prompt: Prompt
    sample: int
    prompt_ids: list[int]
    environment: Hosted | None
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    reason: str = ""

    def heard(self, ids: Sequence[int]) -> None:
        """Words of others, as they stand between two answers."""
        self.ids += ids
        self.mask += [0] * len(ids)
        self.logprobs += [0.0] * len(ids)


@dataclass(slots=True)
class Episodes:
    """Like a `Sampler`, over several turns: at most `rounds` answers of the model, each of at most the sampling's tokens.

    tools: that it may call. environments: who replies where it calls none. All episodes go on together, round by round.
    """

    sampler: Sampler
    rounds: int
    tools: Sequence[Tool] = ()
    environments: Environments | None = None
    style: CallStyle | None = None

    def __post_init__(self) -> None:
        if self.tools:
            self.style = call_style(self.sampler.engine.renderer)
            sampling = self.sampler.sampling
            shown = tuple(sorted({*sampling.shown_ids, *self.style.visible}))
            self.sampler = replace(self.sampler, sampling=replace(sampling, shown_ids=shown))

    @property
    def offered(self) -> list[dict[str, Any]]:
        return [tool.to_json() for tool in self.tools]

    def ids(self, prompt: Prompt) -> list[int]:
        return self.sampler.ids(replace(prompt, tools=(*prompt.tools, *self.offered)))

    def room(self, prompt: Prompt) -> bool:
        return len(self.ids(prompt)) + (self.sampler.sampling.max_tokens or 1) <= self.sampler.engine.context_length

    def answer(
        self, prompts: Sequence[Prompt], samples: int, *, seed: int, step: int, version: int, greedy: bool = False
    ) -> list[list[Rollout]]:
        """`samples` episodes of each prompt; each depends on (seed, step, prompt, sample) and the weights alone."""
        groups = [[self._begin(p, i, seed, step) for i in range(samples)] for p in prompts]
        active = [e for group in groups for e in group]
        for number in range(self.rounds):
            ways = [self._sampling(e, number, seed, step, greedy) for e in active]
            done = self.sampler.engine.generate([e.prompt_ids + e.ids for e in active], ways, self.sampler.lora)
            for episode, made in zip(active, done, strict=True):
                self._take(episode, made, last=number + 1 == self.rounds)
            active = [e for e in active if not e.reason]
            if not active:
                break
        return [[self._rollout(e, step, version) for e in group] for group in groups]

    def close(self) -> None:
        if self.environments is not None:
            self.environments.close()

    def _begin(self, prompt: Prompt, sample: int, seed: int, step: int) -> _Episode:
        own = None if self.environments is None else self.environments.begin(prompt, noise(seed, step, f"{prompt.id}/{sample}"))
        return _Episode(prompt, sample, self.ids(prompt), own)

    def _sampling(self, episode: _Episode, number: int, seed: int, step: int, greedy: bool) -> Sampling:
        own = noise(seed, step, f"{episode.prompt.id}/{episode.sample}/{number}")
        room = self.sampler.engine.context_length - len(episode.prompt_ids) - len(episode.ids)
        most = min(self.sampler.sampling.max_tokens or room, room)
        temperature = 0.0 if greedy else self.sampler.sampling.temperature
        return replace(self.sampler.sampling, n=1, max_tokens=most, seed=own, logprobs=0, temperature=temperature)

    def _take(self, episode: _Episode, made: Any, last: bool) -> None:
        """An answer joins its episode, and what follows it, if anything does."""
        episode.ids += made.ids
        episode.mask += [1] * len(made.ids)
        episode.logprobs += [s.logprob for s in made.scores]
        content, calls = parse_calls(made.text, self.style) if self.style is not None else (made.text, [])
        said = Message(role="assistant", content=content, tool_calls=tuple(call.to_json() for call in calls))
        episode.messages.append(said)
        whole = made.finish_reason == "stop"
        # The environment hears every answer that calls nothing, also the last one and one that was cut.
        heard = [] if calls else self._reply(episode, content)
        if not whole or last:
            episode.reason = "max_rounds" if whole and (calls or heard) else made.finish_reason
            return
        if calls:
            heard = [Message.from_json(m) for m in run_calls(calls, self.tools)]
        if not heard:
            episode.reason = "stop"
            return
        episode.messages += heard
        turns = [*episode.prompt.messages, *episode.messages]
        between = self.sampler.engine.renderer.following(turns, [*episode.prompt.tools, *self.offered] or None)
        if len(episode.prompt_ids) + len(episode.ids) + len(between) >= self.sampler.engine.context_length:
            episode.reason = "length"
            return
        episode.heard(between)

    def _reply(self, episode: _Episode, content: str) -> list[Message]:
        if episode.environment is None:
            return []
        reply = episode.environment.reply(content)
        return [] if reply is None else [Message(role="user", content=reply)]

    def _rollout(self, e: _Episode, step: int, version: int) -> Rollout:
        meta = dict(e.prompt.meta)
        if e.environment is not None:
            meta["environment"] = e.environment.score()
        text = next((m.content for m in reversed(e.messages) if m.role == "assistant"), "")
        return Rollout(
            id=f"{step}/{e.prompt.id}/{e.sample}", prompt=e.prompt.id, step=step, sample=e.sample, version=version,
            prompt_ids=tuple(e.prompt_ids), ids=tuple(e.ids), mask=tuple(e.mask), logprobs=tuple(e.logprobs), text=text,
            finish_reason=e.reason, source=e.prompt.source, messages=tuple(e.messages), answer=e.prompt.answer, meta=meta,
        )  # fmt: skip
