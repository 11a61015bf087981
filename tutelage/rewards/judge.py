"""A language model as judge."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tutelage.config import rewards as config
from tutelage.errors import ConfigError, RewardError
from tutelage.records import Rollout
from tutelage.rewards import TermScore
from tutelage.rewards.endpoint import Endpoint
from tutelage.rewards.texts import accepted, place

if TYPE_CHECKING:
    from tutelage.engine.tools import Generate

MAX_CHARS = 50_000  # of a text that is shown to the judge
LAST = 2000  # characters of its answer in which the score is looked for
_SCORE = re.compile(r"score[\s*:=_]{1,8}(\d{1,6}(?:\.\d{1,6})?)", re.IGNORECASE)
_BLANK = re.compile(r"\{(prompt|answer|text|highest)\}")


class Judge:
    """The judge's score over the highest one. Asked is the server of the settings, or else `generate`.

    `asked` gives a rollout's prompt as text; without it the prompt's fact `prompt` is used. An answer without a score is asked
    for again; a text that gets none in the end has 0, with a note, and is counted. A server that fails raises `RewardError`.
    """

    def __init__(
        self, settings: config.Judge, *, generate: Generate | None = None, asked: Callable[[Rollout], str] | None = None
    ) -> None:  # fmt: skip
        self.settings, self._asked = settings, asked
        self._ask = _ask_of(settings, generate)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[TermScore]:
        with ThreadPoolExecutor(self.settings.parallel) as threads:
            return list(threads.map(self._one, rollouts))

    def _one(self, rollout: Rollout) -> TermScore:
        if len(rollout.text) > MAX_CHARS:
            return TermScore(0.0, f"longer than {MAX_CHARS:,} characters", past_limit=True)
        messages = [{"role": "user", "content": self._question(rollout)}]
        for _ in range(self.settings.retries + 1):
            said = self._ask(messages)
            scores = _SCORE.findall(said[-LAST:])
            if scores and float(scores[-1]) <= self.settings.highest:
                return TermScore(float(scores[-1]) / self.settings.highest, said.strip()[-300:])
        return TermScore(0.0, f"the judge gave no score: {said.strip()[-200:]}", past_limit=True)

    @staticmethod
    def _answers(rollout: Rollout) -> str:
        return " or ".join(accepted(rollout)) if rollout.answer else "none"

    def _question(self, rollout: Rollout) -> str:
        """Filled in one pass: what a text holds is never filled in again."""
        known = {"answer": self._answers(rollout), "text": rollout.text, "highest": str(self.settings.highest)}
        if "{prompt}" in self.settings.question:
            prompt = self._asked(rollout) if self._asked else rollout.meta.get("prompt")
            if prompt is None:
                raise RewardError(
                    f"the judge can't be shown the prompt of rollout {rollout.id}", **place(rollout), field="meta.prompt",
                    fix="leave {prompt} out of the judge's question, or put the text in the prompt's row as `prompt`",
                )  # fmt: skip
            known["prompt"] = str(prompt)
        return _BLANK.sub(lambda blank: known[blank[1]], self.settings.question)

    def close(self) -> None: ...


def _ask_of(settings: config.Judge, generate: Generate | None) -> Callable[[list[dict[str, Any]]], str]:
    if settings.base_url is None:
        if generate is None:
            raise ConfigError("the judge has no model to ask", field="base_url", fix="give base_url: http://HOST:PORT/v1")
        return lambda messages: generate(messages, []).content
    key = None
    if settings.key_variable is not None:
        key = os.environ.get(settings.key_variable)
        if not key:
            raise ConfigError(
                "the environment variable with the judge's key is not set", field="key_variable", found=settings.key_variable
            )
    return Endpoint(
        settings.base_url, settings.model, key, max_tokens=settings.max_tokens, timeout_seconds=settings.timeout_seconds,
        retries=settings.retries,
    )  # fmt: skip
