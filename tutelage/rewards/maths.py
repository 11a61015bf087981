"""Answers compared as mathematics."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from tutelage.config import rewards as config
from tutelage.errors import MissingExtra
from tutelage.records import Rollout
from tutelage.rewards import TermScore, verify
from tutelage.rewards.plain import Numeric
from tutelage.rewards.texts import accepted


class Maths:
    """1 where the final answer equals the expected one, by math-verify. Raises `MissingExtra` without it: nothing stands in
    for it unless `by: numbers` was asked for."""

    def __init__(self, settings: config.Maths) -> None:
        self.settings = settings
        self._numbers = Numeric(config.Numeric(tag=settings.tag, tolerance=1e-9))
        if settings.by == "math-verify" and importlib.util.find_spec("math_verify") is None:
            raise MissingExtra(
                "math-verify", "rl", "the reward `maths` (`by: numbers`, which compares numbers only, does without)"
            )
        self._workers = verify.workers("mathematics:maths", settings.seconds)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[TermScore]:
        if self.settings.by == "numbers":
            return self._numbers(rollouts)
        return verify.judge(
            self._workers, rollouts, self.settings.tag, self._question, "the expected answer can't be read as mathematics"
        )

    def _question(self, rollout: Rollout, text: str) -> dict[str, Any]:
        return {"answers": accepted(rollout), "text": text[-self.settings.last_chars :]}

    def close(self) -> None:
        self._workers.close()
