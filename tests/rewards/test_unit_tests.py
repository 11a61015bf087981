"""Unit tests as a reward: HumanEval's own solutions pass, broken ones and cheats do not."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rewards.rollouts import rollout, rubric
from tutelage.errors import RewardError, SandboxError
from tutelage.rewards.rubric import Rubric
from tutelage.sandbox.limits import Limits
from tutelage.sandbox.sandbox import Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="NOT CHECKED: the sandbox needs Linux")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(Limits(seconds=20, cpu_seconds=2, memory=256 << 20), parallel=2) as made:
        try:
            assert made.walls
        except SandboxError as error:
            pytest.skip(f"NOT CHECKED: no sandbox on this machine ({error.message})")
        yield made


@pytest.fixture(scope="module")
def by_tests(sandbox: Sandbox) -> Rubric:
    return rubric({"tests": 1.0}, sandbox=sandbox)


def problems(shared_data: Path) -> list[dict[str, Any]]:
    with gzip.open(shared_data / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def asked(problem: dict[str, Any], text: str, number: int = 0) -> Any:
    return rollout(text, number=number, **{key: problem[key] for key in ("prompt", "test", "entry_point")})


def test_humaneval_solutions_pass_and_mutated_ones_fail(by_tests: Rubric, shared_data: Path) -> None:
    """Guards the format of the field: completions, whole functions in fences, and both broken in one place."""
    few = problems(shared_data)[:40:4]
    solutions = [p["canonical_solution"] for p in few]
    fenced = [f"Here it is:\n```python\n{p['prompt']}{p['canonical_solution']}```\nDone." for p in few]
    broken = [f"    return None\n{s}" for s in solutions]
    verdicts = by_tests.judge(
        [asked(p, text) for texts in (solutions, fenced, broken) for p, text in zip(few, texts, strict=True)]
    )
    assert [v.reward for v in verdicts] == [1.0] * 20 + [0.0] * 10
    assert all(v.notes["tests"] for v in verdicts[20:])


CHEATS = [
    "import os; os._exit(0)", "import sys; sys.exit(0)", "raise SystemExit", "quit()", "print('all tests passed')",
    "import builtins; builtins.AssertionError = Exception", "while True: pass", "x = [0] * 10**10", "import os\nos.fork()",
    "import threading\nthreading.Thread(target=lambda: __import__('os')._exit(0)).start()\nwhile True: pass",
    "def f(x): return x",
    "import atexit, os; atexit.register(os._exit, 0)", "open('answer.py', 'w').write('')", "(", "", "\x00", "\ud800", "f = print",
]  # fmt: skip


def test_no_cheat_passes(by_tests: Rubric) -> None:
    """Guards the reward against programs that leave before their tests, or keep them from being run."""
    rollouts = [rollout(text, number=n, tests=["assert f(2) == 4"]) for n, text in enumerate(CHEATS)]
    passed = [CHEATS[n] for n, verdict in enumerate(by_tests.judge(rollouts)) if verdict.reward != 0]
    assert not passed
    assert by_tests.past_limits["tests"] == 2


def test_a_program_of_one_long_line_is_said_to_be_wrong(by_tests: Rubric) -> None:
    """Guards against a note that says how much was cut, where the error's name stood behind the line that it shows."""
    verdicts = by_tests.judge([rollout(text, tests=["assert f"]) for text in ("f = " + "9" * 10**6, "(" * 10**5)])
    assert verdicts[0].notes["tests"].startswith("SyntaxError: Exceeds the limit")
    assert "cut" not in verdicts[1].notes["tests"] and verdicts[1].reward == 0


def test_a_share_of_the_tests(sandbox: Sandbox, by_tests: Rubric) -> None:
    """Guards `partial`, and what a failure is said to be."""
    tests = ["assert f(1) == 1", "assert f(2) == 4, 'two'", "assert f(0) == 0", "assert f(-1) == 1"]
    texts = ["def f(x): return x", "def f(x): return x * x", "f = 1"]
    with rubric({"tests": {"partial": True}}, sandbox=sandbox) as made:
        verdicts = made.judge([rollout(text, tests=tests) for text in texts])
    assert [v.reward for v in verdicts] == [0.5, 1.0, 0.0]
    whole = by_tests.judge([rollout(text, tests=tests) for text in texts])
    assert [v.reward for v in whole] == [0, 1, 0] and whole[0].notes["tests"] == "AssertionError: two"


@pytest.mark.parametrize("meta", [{}, {"tests": []}, {"tests": [1]}, {"tests": {"a": 1}}, {"entry_point": "f"}])
def test_a_prompt_without_tests_is_named(by_tests: Rubric, meta: dict[str, Any]) -> None:
    """Guards against programs that pass because nothing was asked of them."""
    with pytest.raises(RewardError, match="0/abc/0"):
        by_tests.judge([rollout("def f(x): return x", **meta)])
