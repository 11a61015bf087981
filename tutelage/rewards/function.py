"""A reward function that the user wrote, run in a separate process."""

from __future__ import annotations

from collections.abc import Sequence

from tutelage import log
from tutelage.config import rewards as config
from tutelage.errors import ConfigError, RewardError, WorkerError
from tutelage.records import Rollout, to_json
from tutelage.rewards import TermScore
from tutelage.workers import Workers


class Function:
    """The result of the user's `score(rollout)`. Raises `ConfigError` if it can't be imported, before anything is judged.

    A function that raises, hangs or returns no number is a `RewardError` naming the rollout, the exception and the line; the
    traceback goes to the log. Its process is killed if need be, and the run stops with everything it had.
    """

    def __init__(self, settings: config.Function) -> None:
        self.settings = settings
        self._workers = Workers("tutelage.rewards.user_code:reward", settings.path, seconds=settings.seconds)
        try:
            self._workers.start()
        except WorkerError as error:
            raise ConfigError(
                "the reward function cannot be imported", field="path", found=f"{settings.path}: {error.found}",
                expected="module:function, found from the working folder, or file.py:function",
                fix="correct the path, or mend what its import raises; it must be importable where this command runs",
            ) from error  # fmt: skip

    def __call__(self, rollouts: Sequence[Rollout]) -> list[TermScore]:
        out = []
        for rollout in rollouts:
            answer = self._workers.ask(to_json(rollout))
            if answer.why:
                if answer.trace:
                    log.say(answer.trace.rstrip())
                fix = "mend the function: score(rollout) gives a number for every rollout.text, the empty one included"
                raise RewardError(
                    f"{self.settings.path} on rollout {rollout.id}: {answer.why}", found=rollout.text,
                    expected=f"a number within {self.settings.seconds:g} s",
                    fix=f"{fix}, or raise its `seconds`" if answer.lost.startswith("took more than") else fix,
                )  # fmt: skip
            out.append(TermScore(answer.value))
        return out

    def close(self) -> None:
        self._workers.close()
