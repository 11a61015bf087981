"""A rubric: named terms with weights, and the breakdown of each reward."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tutelage.errors import RewardError, UserError, WorkerError
from tutelage.records import Rollout
from tutelage.rewards import Reward, TermScore


@dataclass(slots=True, frozen=True)
class RewardResult:
    """A rollout's reward and where it comes from."""

    reward: float  # sum of the terms with their weights
    terms: dict[str, float]  # values before their weights
    notes: dict[str, str]  # of the terms that said something


class Rubric:
    """Weighs what its terms say. `past_limits` counts the texts that a term gave up on, by its name. Close it after use."""

    def __init__(self, terms: Mapping[str, tuple[Reward, float]]) -> None:
        self.terms = dict(terms)
        self.past_limits: Counter[str] = Counter()

    def judge(self, rollouts: Sequence[Rollout]) -> list[RewardResult]:
        """A verdict a rollout, in their order.

        Raises `RewardError` naming the term, the rollout and its text for a value that is no finite number, and for a term that
        raises.
        """
        if not rollouts:
            return []
        columns = {name: self._ask(name, reward, rollouts) for name, (reward, _) in self.terms.items()}
        out = []
        for i in range(len(rollouts)):
            said = {name: column[i] for name, column in columns.items()}
            total = math.fsum(weight * said[name].value for name, (_, weight) in self.terms.items())
            notes = {name: one.note for name, one in said.items() if one.note}
            out.append(RewardResult(total, {name: one.value for name, one in said.items()}, notes))
        return out

    def _ask(self, name: str, reward: Reward, rollouts: Sequence[Rollout]) -> list[TermScore]:
        try:
            found = reward(rollouts)
        except (RewardError, WorkerError) as error:
            raise RewardError(
                f"reward `{name}`: {error.message}", file=error.file, line=error.line, field=error.field, found=error.found,
                expected=error.expected, fix=error.fix,
            ) from error  # fmt: skip
        except UserError:
            raise
        except Exception as error:
            culprit = next((r for r in rollouts if _raises(reward, r)), None)
            where = f"on rollout {culprit.id}" if culprit else f"on {len(rollouts)} rollouts together"
            raise RewardError(
                f"reward `{name}` raised {type(error).__name__} {where}: {error}", found=culprit and culprit.text
            ) from error
        if len(found) != len(rollouts):
            raise RewardError(f"reward `{name}` judged {len(found)} of {len(rollouts)} rollouts")
        for rollout, one in zip(rollouts, found, strict=True):
            if not math.isfinite(one.value):
                raise RewardError(
                    f"reward `{name}` is {one.value} on rollout {rollout.id}", found=rollout.text, expected="a finite number",
                    fix="give such texts a number of their own, for example 0",
                )  # fmt: skip
            self.past_limits[name] += one.past_limit
        return found

    def close(self) -> None:
        for reward, _ in self.terms.values():
            reward.close()

    def __enter__(self) -> Rubric:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _raises(reward: Reward, rollout: Rollout) -> bool:
    try:
        reward([rollout])
    except Exception:
        return True
    return False
