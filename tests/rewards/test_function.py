"""Functions of the user, and the rubric that weighs what terms say."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.rewards.rollouts import rollout, rubric
from tutelage.errors import ConfigError, RewardError
from tutelage.records import Prompt
from tutelage.rewards import check

SOURCE = """
import os, time
from tutelage.records import Rollout

calls = 0

def length(rollout: Rollout) -> float:
    global calls
    calls += 1
    print("printing is allowed")
    return len(rollout.text) + rollout.meta.get("bonus", 0) + len(rollout.ids)

def raises(rollout):
    return 1 / len(rollout.text)

def hangs(rollout):
    while rollout.text == "hang":
        time.sleep(1)
    return 1.0

def nan(rollout):
    return float("nan") if rollout.text == "nan" else 1.0

def none(rollout):
    return None

def leaves(rollout):
    os._exit(3)

def text(rollout):
    return "0.5"

def huge(rollout):
    return 10**400

def two(rollout, more):
    return 1.0

def exits(rollout):
    raise SystemExit(3)

def library(rollout):
    import json
    return json.loads("{")

def process(rollout):
    return os.getpid()

number = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize("where", ["my_rewards:length", "my_rewards.py:length"])
def test_a_function_sees_the_whole_record(mine: Path, where: str) -> None:
    """Guards the interface that users write against: the record with its facts, an empty text included."""
    with rubric({"mine": {"kind": "function", "path": where, "weight": 0.5}}) as made:
        found = made.judge([rollout("ab cd", bonus=10), rollout("")])
    assert [(v.reward, v.terms) for v in found] == [(8.5, {"mine": 17.0}), (0.0, {"mine": 0.0})]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("raises", "", "ZeroDivisionError: division by zero"), ("hangs", "hang", "took more than 3 s"), ("nan", "nan", "is nan"),
        ("none", "x", "TypeError"), ("leaves", "x", "ended its process (status 3)"),
    ],
)  # fmt: skip
def test_a_function_that_gives_no_number_stops_with_its_rollout(mine: Path, name: str, text: str, said: str) -> None:
    """Guards against a run that hangs, or trains on a reward that is none; the next call works again."""
    with rubric(
        {"mine": {"kind": "function", "path": f"my_rewards:{name}", "seconds": 3.0 if name == "hangs" else 60.0}}
    ) as made:
        with pytest.raises(RewardError) as caught:
            made.judge(
                [rollout("fine", number=0), rollout(text, number=1)]
                if name not in ("none", "leaves")
                else [rollout(text, number=1)]
            )
        message = str(caught.value)
        assert said in message and "`mine`" in message and "0/abc/1" in message and (text in message)
        if name in ("raises", "hangs", "nan"):
            assert made.judge([rollout("fine")])[0].reward > 0


@pytest.mark.parametrize(
    ("name", "said", "line"),
    [
        ("raises", "ZeroDivisionError: division by zero", "return 1 / len"), ("none", "gave None, not a number", "def none"),
        ("text", "gave str '0.5', not a number", "def text"),
        ("huge", "gave an integer of 1,329 bits, not a number", "def huge"),
        ("two", "missing 1 required positional argument: 'more'", "def two"), ("exits", "SystemExit: 3", "raise SystemExit"),
        ("library", "JSONDecodeError: Expecting property name", "return json.loads"),
    ],
)  # fmt: skip
def test_what_was_raised_stands_apart_from_what_was_expected(
    mine: Path, capsys: pytest.CaptureFixture[str], name: str, said: str, line: str
) -> None:
    """Guards against a traceback that is printed as what was expected, and one that ends in a library: the user's own last line
    is named."""
    row = next(n for n, text in enumerate(SOURCE.split("\n"), 1) if line in text)
    with rubric({"mine": {"kind": "function", "path": f"my_rewards:{name}"}}) as made, pytest.raises(RewardError) as caught:
        made.judge([rollout("")])
    error = caught.value
    assert said in error.message and error.message.endswith(f"(my_rewards.py:{row})")
    assert error.expected == "a number within 30 s" and "Traceback" not in str(error)
    assert "Traceback" in capsys.readouterr().err


def test_a_function_runs_in_one_process_that_is_not_ours(mine: Path) -> None:
    """Guards functions that keep something between calls, and this process from them."""
    with rubric({"mine": {"kind": "function", "path": "my_rewards:process"}}) as made:
        first, second = (v.reward for v in made.judge([rollout("a"), rollout("b")]))
    assert first == second != os.getpid()
    for _ in range(100):
        if not Path(f"/proc/{first:.0f}").exists():
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{first:.0f}").exists()


@pytest.mark.parametrize("where", ["my_rewards:missing", "my_rewards:number", "no_such_module:f", "no_such_file.py:f"])
def test_a_function_that_can_not_be_imported_is_an_error_before_the_run(mine: Path, where: str) -> None:
    """Guards against finding out after the model was loaded and the first answers were written."""
    with pytest.raises(ConfigError, match="cannot be imported") as caught:
        rubric({"mine": {"kind": "function", "path": where}})
    assert where in str(caught.value) and caught.value.field == "rewards.mine.path" and "correct the path" in str(caught.value)


def test_a_file_that_does_not_parse_is_named_with_its_line(mine: Path) -> None:
    """Guards against `invalid syntax` that does not say where."""
    mine.write_text("x = 1\ndef score(rollout:\n")
    with pytest.raises(ConfigError, match=r"SyntaxError: .* \(my_rewards.py:2\)"):
        rubric({"mine": {"kind": "function", "path": "my_rewards.py:score"}})


def test_the_breakdown_is_kept() -> None:
    """Guards what is logged: each term before its weight, and the reward as their weighted sum."""
    with rubric({"right": {"kind": "exact", "weight": 2}, "short": {"kind": "length", "target": 2, "weight": 0.1}}) as made:
        verdict = made.judge([rollout("four", "four")])[0]
    assert verdict.terms == {"right": 1.0, "short": 0.5} and verdict.reward == pytest.approx(2.05)
    assert verdict.notes == {"short": "1 tokens"}
    assert made.judge([]) == []


def test_a_wired_callable_that_raises_is_named_with_its_rollout() -> None:
    """Guards against a traceback that does not say which of a thousand texts it was."""

    def score(texts: list[list[int]]) -> list[float]:
        return [1 / (len(ids) - 2) for ids in texts]  # the prompt alone has 2

    with rubric({"model": 1.0}, score_texts=score) as made, pytest.raises(RewardError, match=r"`model` raised ZeroDiv.*0/abc/5"):
        made.judge([rollout("a"), rollout("", number=5)])
    with (
        rubric({"model": 1.0}, score_texts=lambda texts: [1.0]) as made,
        pytest.raises(RewardError, match="1 scores for 2 texts"),
    ):
        made.judge([rollout("a"), rollout("b")])


def test_a_flat_reward_is_an_error_that_says_so() -> None:
    """Guards hours of training on a reward that never sees what the model writes."""
    prompt = Prompt.make([], source="test", answer="4")
    with rubric({"exact": 1.0, "numeric": {"weight": 2.0}}) as made:
        rollouts, verdicts = check.judge_texts(made, [(prompt, "five"), (prompt, "I do not know")])
        with pytest.raises(RewardError) as caught:
            check.check_spread(verdicts, rollouts)
        message = str(caught.value)
        assert all(part in message for part in ("all 2 rewards are 0", "exact = 0", "numeric = 0 (no number)", "five", "'4'"))
        rollouts, verdicts = check.judge_texts(made, [(prompt, "4"), (prompt, "I do not know"), (prompt, "It is 4.")])
        assert check.check_spread(verdicts, rollouts) == 1.0
    spread = check.spreads(verdicts)
    assert spread["reward"].mean == pytest.approx(5 / 3) and spread["exact"].most == 1 and spread["numeric"].least == 0
    assert str(spread["exact"]) == "0.333 ± 0.471 (0 to 1, 3)"


def test_rewards_that_differ_between_prompts_only() -> None:
    """Guards hours of training where each answer is worth what the others to its prompt are: their advantages are all 0."""
    easy, hard = (Prompt.make([], source="test", answer=a) for a in ("4", "5"))
    with rubric({"exact": 1.0}) as made:
        rollouts, verdicts = check.judge_texts(made, [(easy, "4"), (easy, "4"), (hard, "4"), (hard, "4")])
        assert check.check_spread(verdicts, rollouts) == 1.0
        with pytest.raises(RewardError) as caught:
            check.check_spread(verdicts, rollouts, group=2)
        message = str(caught.value)
        assert all(part in message for part in ("from 0 to 1", "none of 2 groups of 2", "exact = 1", "samples", "ppo"))
        rollouts, verdicts = check.judge_texts(made, [(easy, "4"), (easy, "4"), (hard, "4"), (hard, "5")])
        assert check.check_spread(verdicts, rollouts, group=2) == 0.5
