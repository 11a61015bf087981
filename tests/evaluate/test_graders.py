"""Graders: hand-labelled answers by kind, and GSM8K's own solutions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.rewards.rollouts import rollout, rubric
from tutelage.data.demo.skills import generate, skills
from tutelage.errors import DataError
from tutelage.evaluate import questions as qs
from tutelage.records import Conversation, Message
from tutelage.rewards.answers import right

LABELLED = [
    json.loads(line)
    for name in ("graded_pairs.jsonl", "graded_pairs_unseen.jsonl")
    for line in Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
]
KINDS = sorted({row["kind"] for row in LABELLED})


def conversation(question: str, expected: str | list[str], **meta: Any) -> Conversation:
    first, *others = [expected] if isinstance(expected, str) else expected
    turns = [Message(role="user", content=question), Message(role="assistant", content=first)]
    return Conversation.make(turns, source="test", meta=meta | ({"accepted": others} if others else {}))


def mistakes(kind: str) -> Counter[str]:
    rows = [row for row in LABELLED if row["kind"] == kind]
    found = qs.grade_all([conversation(r["question"], r["expected"]) for r in rows], [r["given"] for r in rows])
    wrong = [(r, p) for r, p in zip(rows, found, strict=True) if p.correct != r["right"]]
    for row, _ in wrong:
        print("missed" if row["right"] else "GENEROUS", row)
    return Counter("missed" if row["right"] else "generous" for row, _ in wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_no_wrong_answer_is_called_right(kind: str) -> None:
    """Lower case was upper, 103 was 10³, nothing was "...", `#### 999999` was every number; and B) was not B."""
    found = mistakes(kind)
    assert found["generous"] == 0
    assert found["missed"] <= 1


def test_few_right_answers_are_missed() -> None:
    """At most three of eighty, over all kinds."""
    rights = sum(row["right"] for row in LABELLED)
    assert rights > 500 and len(LABELLED) - rights > 800
    assert sum(mistakes(kind)["missed"] for kind in KINDS) <= 3


def test_the_skill_that_capitalises_counts_case() -> None:
    """A model that copies the letters was 100% right."""
    asked = list(generate("upper", skills()["upper"], 0, 20, 0))
    copied = [c.messages[0].content.split(": ")[1] for c in asked]
    assert not any(p.correct for p in qs.grade_all(asked, copied))
    graded = qs.grade_all(asked, [text.upper() for text in copied])
    assert all(p.correct and p.scorer == "exact" for p in graded)


@pytest.mark.parametrize(("text", "scorer"), [
    ("18", "answer"), ("He has 2 + 2 = 4.\n#### 4", "numeric"), (r"So it is $\boxed{\frac{1}{2}}$.", "numeric"),
    ("There are 3 boxes with 4 each, so he has 3 * 4 = 12 eggs.", "numeric"), ("the year in which the war ended, 1945", "answer"),
    (r"The set is $\boxed{\{1, 2\}}$ as was to be shown", "answer"), ("x = 3", "answer"),
])  # fmt: skip
def test_the_expected_answer_decides_unless_told(text: str, scorer: str) -> None:
    """Worked solutions were judged by their words, which a wrong number hardly changes."""
    assert qs.scorer_for(text) == scorer


def test_the_choice_comes_before_the_question_and_that_before_the_answer() -> None:
    """One task says otherwise for itself, and an evaluation for all."""
    asked = conversation("q", "Foo bar", scorer="exact")
    assert not qs.grade(asked, "The answer is Foo bar.").correct
    assert qs.grade(asked, "The answer is Foo bar.", "answer").correct
    assert qs.grade(asked, "bar Foo baz", "word_overlap").correct
    assert qs.grade(conversation("q", "4", answer="4 eggs", accepted="four"), "four").correct
    with pytest.raises(DataError, match=r"(?s)meta.scorer.*did you mean `numeric`"):
        qs.grade(conversation("q", "4", scorer="numerik"), "4")


@pytest.mark.parametrize(("n", "guess"), [(1, 1 / 17_576), (2, 1 / 17_576), (20, 1 / 17_576)])
def test_guessing_does_not_know_the_answer(n: int, guess: float) -> None:
    """The commonest held-out answer, each question's own among them, was 50% for two questions and 5% for twenty."""
    rows = [qs.grade(conversation(f"q{i}", chr(97 + i), task="t"), "?") for i in range(n)]
    score = qs.scores(rows, {"t": 1 / 17_576})[0]
    assert (score.guess, score.guess_from, score.guess_interval) == (guess, "stated chance", None)


def test_a_measured_guess_has_an_interval() -> None:
    """A level that was measured on a few questions stood beside an interval without one."""
    rows = [qs.grade(conversation(f"q{i}", "yes" if i % 5 else "no", task="t"), "yes") for i in range(20)]
    score = qs.scores(rows)[0]
    assert score.guess == 0.8 and score.guess_interval is not None and score.guess_interval.low < 0.6
    assert not score.above_guess


def test_rewards_and_evaluation_grade_alike() -> None:
    """Two readers of answers would train for one thing and measure another."""
    rows = [row for row in LABELLED if row["kind"] in ("number", "percent", "several")]
    texts = [rollout(r["given"], r["expected"] if isinstance(r["expected"], str) else r["expected"][0], i,
                     accepted=r["expected"] if isinstance(r["expected"], list) else []) for i, r in enumerate(rows)]  # fmt: skip
    with rubric({"answer": 1.0}, asked=lambda one: rows[one.sample]["question"]) as made:
        rewards = [v.reward for v in made.judge(texts)]
    assert rewards == [float(right(r["expected"], r["given"], r["question"])) for r in rows]


def test_gsm8k_is_graded_by_its_final_numbers(shared_data: Path) -> None:
    """Of its solutions with #### 999999, overlap of words called all right; of the right numbers alone, none."""
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    gold = [json.loads(line)["answer"] for line in lines]
    numbers = [text.rsplit("#### ", 1)[1] for text in gold]
    others = [next(n for n in (*numbers[i + 1 :], *numbers) if n != own) for i, own in enumerate(numbers)]
    asked = [conversation("q", text) for text in gold]
    rights = (gold, numbers, [f"The answer is ${n}." for n in numbers], [rf"So \boxed{{{n}}}" for n in numbers])
    wrongs = ([text.rsplit("####", 1)[0] + f"#### {other}" for text, other in zip(gold, others, strict=True)], others)
    for texts, share in (*((texts, 1.0) for texts in rights), *((texts, 0.0) for texts in wrongs)):
        found = qs.grade_all(asked, texts)
        assert sum(p.correct for p in found) == share * len(gold) and found[0].scorer == "numeric"
    assert qs.scores(qs.grade_all(asked[:50], gold[:50]))[0].scorers == ("numeric",)
