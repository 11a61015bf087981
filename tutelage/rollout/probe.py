"""Rewards of greedy answers to held-out prompts during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tutelage import log
from tutelage.files import whole_file
from tutelage.records import Prompt, Rollout, dump_line
from tutelage.rollout.source import Answering, Judging
from tutelage.train.hooks import Quiet
from tutelage.train.loop import State


class Probe(Quiet):
    """Measures the mean reward of greedy answers to `prompts` every `every` steps; retains the first and last measurement."""

    def __init__(self, prompts: Sequence[Prompt], sampler: Answering, judge: Judging, every: int, folder: Path) -> None:
        self.prompts, self.sampler, self.judge, self.every, self.folder = prompts, sampler, judge, every, folder
        self.rewards: dict[str, list[float]] = {}  # "before" and "after": a reward for each prompt

    def start(self, state: State) -> None:
        if state.progress.step == 0:
            self.rewards["before"] = self._ask(state)

    def after_step(self, state: State) -> None:
        if state.progress.step % self.every == 0 or state.last:
            self.rewards["after"] = self._ask(state)

    def _ask(self, state: State) -> list[float]:
        """All ranks generate, so that none waits; one writes."""
        step = state.progress.step
        made = [g[0] for g in self.sampler.answer(self.prompts, 1, seed=0, step=step, version=step, greedy=True)]
        verdicts = self.judge.judge(made)
        rewards = [float(v.reward) for v in verdicts]
        if log.rank() == 0:
            terms = {name: float(np.mean([v.terms[name] for v in verdicts])) for name in verdicts[0].terms}
            row = {"probe/reward": float(np.mean(rewards)), **{f"probe/{name}": value for name, value in terms.items()}}
            state.job.metrics.write(step=step, **row)
            self._write(made, verdicts, step)
            parts = "  ".join(f"{name} {value:.3f}" for name, value in terms.items()) if len(terms) > 1 else ""
            log.say(f"step {step}  held-out reward {np.mean(rewards):.3f} of {len(made)} greedy answers  {parts}".rstrip())
        return rewards

    def _write(self, made: list[Rollout], verdicts: Sequence[Any], step: int) -> None:
        with whole_file(self.folder / f"step_{step:06d}.jsonl") as f:
            for rollout, verdict in zip(made, verdicts, strict=True):
                f.write(dump_line(replace(rollout, reward=verdict.reward, terms=dict(verdict.terms))) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"rewards": self.rewards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.rewards = state["rewards"]


class Measured(Quiet):
    """Logs the metrics of the source's last rollouts."""

    def __init__(self, source: Any) -> None:
        self.source, self.last = source, -1

    def after_step(self, state: State) -> None:
        source = self.source
        if log.rank() == 0 and source.iteration != self.last and source.facts:  # none where it goes on with kept rollouts
            self.last = source.iteration
            state.job.metrics.write(step=state.progress.step, **{f"rollout/{k}": v for k, v in source.facts.items()})
