"""How far the log-probabilities of trainer and engine are apart, and the importance of each token that makes up for it.

Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training") and
masked importance sampling (Liu et al. 2025, "When speed kills stability").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Mode = Literal["truncate", "mask"]
Level = Literal["token", "sequence"]


def correction(
    trainer: npt.ArrayLike, engine: npt.ArrayLike, *, mode: Mode = "truncate", level: Level = "token", cap: float = 2.0,
    floor: float = 0.0,
) -> npt.NDArray[np.float64]:  # fmt: skip
    """[n]: p(trainer) / p(engine) of each token of an answer, or of all of them together. What is not between `floor` and `cap`
    is moved there ("truncate"), or becomes 0 ("mask")."""
    difference = np.asarray(trainer, np.float64) - np.asarray(engine, np.float64)
    if level == "sequence":
        difference = np.full_like(difference, difference.sum())
    ratio = np.exp(np.minimum(difference, 700.0))
    if mode == "truncate":
        return np.clip(ratio, floor, cap)
    return np.where((ratio < floor) | (ratio > cap), 0.0, ratio)


@dataclass(slots=True, frozen=True)
class Mismatch:
    """Log-probabilities of the same tokens by trainer and engine, compared: sums, so that those of batches and ranks add."""

    tokens: int = 0
    total: float = 0.0  # of absolute differences
    largest: float = 0.0
    excess: float = 0.0  # of (r - 1) - log r, r = p(trainer) / p(engine): k3, the engine's divergence from the trainer

    @classmethod
    def of(cls, trainer: Sequence[npt.ArrayLike], engine: Sequence[npt.ArrayLike]) -> Mismatch:
        """Of some answers."""
        pairs = [np.asarray(t, np.float64) - np.asarray(e, np.float64) for t, e in zip(trainer, engine, strict=True)]
        d = np.concatenate(pairs) if pairs else np.empty(0)
        if not len(d):
            return cls()
        return cls(len(d), float(np.abs(d).sum()), float(np.abs(d).max()), float((np.expm1(np.minimum(d, 700.0)) - d).sum()))

    def __add__(self, other: Mismatch) -> Mismatch:
        return Mismatch(
            self.tokens + other.tokens, self.total + other.total, max(self.largest, other.largest), self.excess + other.excess
        )

    def metrics(self) -> dict[str, float]:
        n = max(self.tokens, 1)
        return {"mismatch_mean": self.total / n, "mismatch_max": self.largest, "mismatch_kl": self.excess / n}
