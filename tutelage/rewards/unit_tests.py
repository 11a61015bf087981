"""Python that a model wrote, run against the prompt's tests in the sandbox."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tutelage.config import rewards as config
from tutelage.errors import RewardError
from tutelage.records import Rollout
from tutelage.rewards import TermScore
from tutelage.rewards.texts import place, told
from tutelage.sandbox.limits import Limits, Outcome
from tutelage.sandbox.sandbox import Sandbox

_FENCED = re.compile(r"^```[ \t]*(?:python3?|py)?[ \t]*\r?\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE | re.IGNORECASE)
_LIMITS = ("time", "cpu", "memory")


class UnitTests:
    """1 where the program passes. A prompt's facts are `tests` (a text or a list of texts, each a test), or those of HumanEval:
    `test`, which defines `check`, and `entry_point`; there the answer continues the `prompt`.

    A program that leaves before its tests have run has not passed them.
    """

    def __init__(self, settings: config.Tests, *, sandbox: Sandbox | None = None) -> None:
        self.settings = settings
        patience = 2 * settings.seconds + 5  # on a machine that does other things too
        limits = Limits(seconds=patience, cpu_seconds=settings.seconds, memory=settings.memory_mb << 20)
        self._ours = sandbox is None
        self._sandbox = sandbox or Sandbox(limits, parallel=settings.parallel or None)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[TermScore]:
        programs = [self._programs(rollout) for rollout in rollouts]
        flat = iter(self._sandbox.run_all([parts for several in programs for parts in several]))
        return [self._judgement([next(flat) for _ in several], several) for several in programs]

    def _programs(self, rollout: Rollout) -> list[list[str]]:
        """One program in parts, the tests last; with `partial` one for each test."""
        code, tests = code_of(rollout.text), tests_of(rollout)
        if "entry_point" in rollout.meta:
            code = continued(str(rollout.meta.get("prompt", "")), code, str(rollout.meta["entry_point"]))
        return [[code, test] for test in tests] if self.settings.partial else [[code, *tests]]

    def _judgement(self, outcomes: Sequence[Outcome], programs: Sequence[Sequence[str]]) -> TermScore:
        passed = sum(outcome.done for outcome in outcomes)
        failed = next((outcome for outcome in outcomes if not outcome.done), None)
        past = any(outcome.reason in _LIMITS for outcome in outcomes)
        return TermScore(passed / len(programs), "" if failed is None else _why(failed), past_limit=past)

    def close(self) -> None:
        if self._ours:
            self._sandbox.close()


def code_of(text: str) -> str:
    """The last fenced block, open ones included; without a fence the whole text."""
    blocks = _FENCED.findall(text)
    return blocks[-1] if blocks else text


def tests_of(rollout: Rollout) -> list[str]:
    """The tests of a rollout's prompt. Raises `RewardError` where it has none."""
    if "entry_point" in rollout.meta:
        return [f"{told(rollout, 'test', 'test')}\n\ncheck({rollout.meta['entry_point']})\n"]
    tests = told(rollout, "tests", "tests")
    out = [tests] if isinstance(tests, str) else tests
    if not isinstance(out, list) or not out or not all(isinstance(test, str) and test.strip() for test in out):
        raise RewardError(
            f"the tests of rollout {rollout.id} are no texts", **place(rollout), field="meta.tests", found=tests,
            expected='Python, or a list of it: ["assert f(2) == 4"]', fix="mend the prompt's row",
        )  # fmt: skip
    return out


def continued(prompt: str, code: str, entry_point: str) -> str:
    """The program of a prompt and its answer. An answer that defines the function itself needs only what stands before it."""
    definition = f"def {entry_point}("
    if definition in code:
        return prompt[: max(prompt.rfind(definition), 0)] + "\n" + code
    return prompt + code


def _why(outcome: Outcome) -> str:
    said = outcome.stderr.strip().rsplit("\n", 1)[-1][:200]
    words = {"time": "took too long", "cpu": "took too long", "memory": "took too much memory", "exit": "left before its end"}
    return words.get(outcome.reason, said or outcome.reason)
