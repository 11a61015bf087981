"""What an answer's tokens weigh in a policy's loss, and what becomes of answers that were cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tutelage.rollout.advantages import Baseline, Scale

Normaliser = Literal["length", "longest", "sum", "token"]
Truncated = Literal["keep", "mask", "penalise"]
UNITS: dict[Normaliser, str] = {"length": "sequences", "longest": "sequences", "sum": "sequences", "token": "tokens"}


@dataclass(slots=True, frozen=True)
class AdvantageSpec:
    """How rewards become advantages and weights."""

    baseline: Baseline
    scale: Scale
    normaliser: Normaliser


# By the objective's name; its own unit is that of the normaliser. PPO's advantages are those of its value head.
ADVANTAGE_SPECS: dict[str, AdvantageSpec] = {
    "reinforce": AdvantageSpec("none", "none", "sum"),
    "rloo": AdvantageSpec("leave_one_out", "none", "length"),
    "grpo": AdvantageSpec("mean", "group", "length"),
    "dr_grpo": AdvantageSpec("mean", "none", "longest"),
    "dapo": AdvantageSpec("mean", "group", "token"),
    "gspo": AdvantageSpec("mean", "group", "length"),
    "cispo": AdvantageSpec("mean", "group", "token"),
}


def compares_groups(method: str) -> bool:
    """Whether an answer's advantage is over the others to its prompt."""
    return method in ADVANTAGE_SPECS and ADVANTAGE_SPECS[method].baseline != "none"


def weights(normaliser: Normaliser, lengths: npt.ArrayLike, max_tokens: int) -> npt.NDArray[np.float64]:
    """[S]: the weight of each token of an answer, from the answers' supervised tokens.

    "length": every answer counts alike, 1/length (GRPO). "longest": every token does, over the answers, 1/max_tokens (Dr. GRPO).
    "sum": likewise, undivided (REINFORCE). "token": every token does, over the tokens of all answers (DAPO).
    """
    n = np.asarray(lengths, np.float64)
    if normaliser == "length":
        return 1 / np.maximum(n, 1)
    return np.full_like(n, 1 / max_tokens if normaliser == "longest" else 1.0)


@dataclass(slots=True, frozen=True)
class Cut:
    """What a policy about cut answers came to."""

    rewards: npt.NDArray[np.float64]  # [S]
    kept: npt.NDArray[np.bool_]  # [S]: False where no token may count
    count: int  # answers that were cut


def cut(policy: Truncated, rewards: npt.ArrayLike, reasons: Sequence[str], penalty: float = 1.0) -> Cut:
    """Answers whose finish reason is "length": "keep" them, "mask" their tokens, or take `penalty` off their reward. A masked
    answer still counts in the baseline of its group."""
    r, was = np.asarray(rewards, np.float64), np.array([reason == "length" for reason in reasons], bool)
    return Cut(r - penalty * was if policy == "penalise" else r, ~was if policy == "mask" else np.ones_like(was), int(was.sum()))
