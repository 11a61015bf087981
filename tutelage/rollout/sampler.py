"""Prompts -> rollouts: the engine samples several answers to each prompt, each with its own seed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tutelage.engine import Engine, Sampling
from tutelage.engine.limits import ContextOverflow
from tutelage.models.adapters.lora import Lora
from tutelage.records import Message, Prompt, Rollout


@dataclass(slots=True)
class Sampler:
    """Answers prompts with the current weights.

    sampling: used for every answer; its seed and `n` are set here. lora: the adapter that the model uses.
    """

    engine: Engine
    sampling: Sampling
    lora: Lora | None = None

    def ids(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, the same as the server uses for these messages."""
        renderer = self.engine.renderer
        if prompt.style == "completion":
            return list(renderer.prompt_text(prompt.messages[-1].content))
        return list(renderer.prompt(prompt.messages, list(prompt.tools) or None))

    def room(self, prompt: Prompt) -> bool:
        """Whether the prompt and an answer of the maximum length fit the context."""
        return len(self.ids(prompt)) + (self.sampling.max_tokens or 1) <= self.engine.context_length

    def answer(
        self, prompts: Sequence[Prompt], samples: int, *, seed: int, step: int, version: int, greedy: bool = False
    ) -> list[list[Rollout]]:
        """`samples` rollouts of each prompt. Sample i of a prompt depends on (seed, step, prompt, i) and the weights alone.

        Raises `ContextOverflow` for a prompt that leaves no room for an answer.
        """
        texts = [self.ids(p) for p in prompts]
        for prompt, ids in zip(prompts, texts, strict=True):
            if len(ids) >= self.engine.context_length:
                raise ContextOverflow(
                    "a prompt fills the model's context", field=prompt.source, found=f"{len(ids)} tokens",
                    expected=f"fewer than {self.engine.context_length}", fix="leave it out, or shorten it",
                )  # fmt: skip
        names = unique_names(prompts)
        ways = [self._sampling(name, samples, seed, step, greedy) for name in names]
        done = iter(self.engine.generate(texts, ways, self.lora))
        return [
            [self._rollout(p, name, next(done), step, version) for _ in range(samples)]
            for p, name in zip(prompts, names, strict=True)
        ]

    def _sampling(self, name: str, samples: int, seed: int, step: int, greedy: bool) -> Sampling:
        if greedy:
            return replace(self.sampling, n=samples, temperature=0.0, seed=0, logprobs=0)
        return replace(self.sampling, n=samples, seed=noise(seed, step, name), logprobs=0)

    def _rollout(self, prompt: Prompt, name: str, made: Any, step: int, version: int) -> Rollout:
        return Rollout(
            id=f"{step}/{name}/{made.index}", prompt=prompt.id, step=step, sample=made.index, version=version,
            prompt_ids=tuple(made.prompt), ids=tuple(made.ids), mask=(1,) * len(made.ids),
            logprobs=tuple(s.logprob for s in made.scores), text=made.text, finish_reason=made.finish_reason,
            messages=(Message(role="assistant", content=made.text),), answer=prompt.answer, source=prompt.source,
            meta=dict(prompt.meta),
        )  # fmt: skip


def unique_names(prompts: Sequence[Prompt]) -> list[str]:
    """A unique name for each prompt; a prompt that occurs twice, at the end of an epoch, has two."""
    seen: Counter[str] = Counter()
    out = []
    for prompt in prompts:
        seen[prompt.id] += 1
        out.append(prompt.id if seen[prompt.id] == 1 else f"{prompt.id}#{seen[prompt.id]}")
    return out


def noise(seed: int, step: int, prompt: str) -> int:
    """The seed of a prompt's answers at a step: 48 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {prompt}".encode()).digest()[:6], "big")
