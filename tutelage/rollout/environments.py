"""Environments that the user wrote, run in a separate process, where they may hang, raise or exit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from tutelage import log
from tutelage.errors import ConfigError, RewardError, WorkerError
from tutelage.records import Prompt, to_json
from tutelage.workers import Workers


class Environment(Protocol):
    """What the model talks with in one episode; each episode makes its own: `Class(prompt, seed)`. All randomness should come
    from the seed: a resumed run makes its episodes again, in another process.

    Example:
        class Guess:
            def __init__(self, prompt, seed): self.number, self.tries, self.right = int(prompt.answer), 0, False
            def reply(self, answer):
                self.tries += 1
                self.right = answer.strip() == str(self.number)
                return None if self.right else "higher" if answer.strip() < str(self.number) else "lower"
            def score(self): return self.right / self.tries
    """

    def reply(self, answer: str) -> str | None: ...  # what the user says to an answer; None ends the episode
    def score(self) -> float: ...  # of the whole episode, once; in the rollout's meta["environment"]


class Environments:
    """The environments of a run: one process for all episodes, which keeps their state. Each step may take `seconds`.

    Raises `ConfigError` if `path` ("module:Class" or "file.py:Class") can't be imported or is no environment. A step that
    raises, exits, takes too long or returns neither a reply nor a score is a `RewardError` that ends the process.
    """

    def __init__(self, path: str, seconds: float = 30.0) -> None:
        self.path, self.seconds = path, seconds
        self._workers, self._begun = Workers("tutelage.rewards.user_code:environment", path, seconds=seconds), 0
        try:
            self._workers.start()
        except WorkerError as error:
            raise ConfigError(
                f"cannot load the environment: {error.found}", field="environment", found=path,
                expected="module:Class, found from the working folder, or file.py:Class, with the methods reply and score",
                fix="correct the path, or fix the error that its import raises; it must be importable where this command runs",
            ) from error  # fmt: skip

    def begin(self, prompt: Prompt, seed: int) -> Hosted:
        self._begun += 1
        own = Hosted(self, prompt, self._begun)
        own.ask(prompt=to_json(prompt), seed=seed)
        return own

    def ask(self, own: Hosted, question: dict[str, Any]) -> Any:
        answer = self._workers.ask(question)
        why = answer.why
        if not why and isinstance(answer.value, float) and not math.isfinite(answer.value):
            why = f"score() gave {answer.value}"
        if not why:
            return answer.value
        self.close()
        if answer.trace:
            log.say(answer.trace.rstrip())
        asked = own.prompt.messages[-1].content if own.prompt.messages else ""
        after = f", after the answer {own.said[:200]!r}" if own.said is not None else ""
        fix = "mend the class: any text may come, the empty one included"
        raise RewardError(
            f"the environment {self.path}: {why}", field="environment",
            found=f"prompt {own.prompt.id} ({asked[:200]!r}){after}",
            expected=f"replies of text or None, and a finite score, each within {self.seconds:g} s",
            fix=f"{fix}, or raise environment_seconds" if answer.lost.startswith("took") else fix,
        )  # fmt: skip

    def close(self) -> None:
        self._workers.close()


@dataclass(slots=True)
class Hosted:
    """The environment of one episode, as the parent sees it. Raises as `Environments` documents."""

    owner: Environments
    prompt: Prompt
    number: int
    said: str | None = None  # the last answer

    def reply(self, answer: str) -> str | None:
        self.said = answer
        found: str | None = self.ask(answer=answer)
        return found

    def score(self) -> float:
        return float(self.ask())

    def ask(self, **what: Any) -> Any:
        return self.owner.ask(self, {"episode": self.number, **what})
