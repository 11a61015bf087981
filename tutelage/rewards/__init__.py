"""Rewards: what a rollout is worth. Verifiers, a reward model, a judge, functions of the user; weighed in a `Rubric`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tutelage.records import Rollout


@dataclass(slots=True, frozen=True)
class TermScore:
    """What one term says of one rollout."""

    value: float
    note: str = ""  # why, for people: what was read, which test failed
    past_limit: bool = False  # the text took more time or memory than it may, and got the worst value for it


class Reward(Protocol):
    """A term of a rubric. It may keep processes, until it is closed."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[TermScore]:
        """One judgement a rollout. Raises `RewardError` where there can't be one; texts, however odd, are no reason."""
        ...

    def close(self) -> None: ...
