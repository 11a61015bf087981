"""Rewards are looked at before training: a reward that is the same everywhere teaches nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tutelage.errors import RewardError
from tutelage.records import Prompt, Rollout
from tutelage.rewards.rubric import RewardResult, Rubric


@dataclass(slots=True, frozen=True)
class Spread:
    """How values are distributed."""

    count: int
    mean: float
    std: float  # of the population
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(len(values), statistics.fmean(values), statistics.pstdev(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.std:.3f} ({self.least:g} to {self.most:g}, {self.count})"


def spreads(verdicts: Sequence[RewardResult]) -> dict[str, Spread]:
    """The spread of the reward, and of each term by its name."""
    out = {"reward": Spread.of([v.reward for v in verdicts])}
    return out | {name: Spread.of([v.terms[name] for v in verdicts]) for name in verdicts[0].terms}


def check_spread(verdicts: Sequence[RewardResult], rollouts: Sequence[Rollout], group: int = 0) -> float:
    """The share of groups whose rewards differ: of so many answers each, which are to one prompt and follow each other. 0: all
    are one group.

    Raises `RewardError` where no group has rewards that differ, with one text and what each term said of it.
    """
    rewards = [v.reward for v in verdicts]
    size = group or len(rewards)
    groups = [rewards[i : i + size] for i in range(0, len(rewards), size)]
    loud = sum(len(set(g)) > 1 for g in groups)
    if loud or len(rewards) < 2:
        return loud / max(1, len(groups))
    verdict, rollout = verdicts[0], rollouts[0]
    said = "; ".join(f"{name} = {value:g}" + _note(verdict, name) for name, value in verdict.terms.items())
    if len(set(rewards)) > 1:
        raise RewardError(
            f"rewards go from {min(rewards):g} to {max(rewards):g}, but in none of {len(groups)} groups of {size} answers to one "
            "prompt do they differ: a method that compares the answers to one prompt has nothing to learn from. "
            f"Of this text, as of the others in its group, was said: {said}",
            found=rollout.text, expected="some prompts whose answers are not all worth the same",
            fix="more samples or a higher temperature; prompts that are neither always right nor always wrong; a term that is "
            "not all or nothing; or a method that compares with more than the group (ppo)",
        )  # fmt: skip
    raise RewardError(
        f"all {len(verdicts)} rewards are {verdict.reward:g}: there is nothing to learn from. Of this text was said: {said}",
        found=rollout.text, expected="rewards that differ" + (f" (right is here {rollout.answer!r})" if rollout.answer else ""),
        fix="see whether the reward reads texts as the model writes them; easier prompts, a higher temperature, or a term "
        "that is not all or nothing give it something to tell apart",
    )  # fmt: skip


def judge_texts(rubric: Rubric, pairs: Iterable[tuple[Prompt, str]]) -> tuple[list[Rollout], list[RewardResult]]:
    """What the rubric says of given answers, as if a model had written them. They have no ids: a length in tokens is 0."""
    rollouts = [
        Rollout(
            id=f"0/{prompt.id}/{i}", prompt=prompt.id, step=0, sample=i, version=0, prompt_ids=(), ids=(), mask=(), logprobs=(),
            text=text, finish_reason="stop", source=prompt.source, answer=prompt.answer, meta=prompt.meta,
        )
        for i, (prompt, text) in enumerate(pairs)
    ]  # fmt: skip
    return rollouts, rubric.judge(rollouts)


def _note(verdict: RewardResult, name: str) -> str:
    return f" ({verdict.notes[name]})" if name in verdict.notes else ""
