"""A list of right answers: any of them counts, from the row to the reward and the evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.rewards.rollouts import rollout, rubric
from tutelage.data.clean.collect import collect
from tutelage.data.sources.conversations import to_conversation
from tutelage.errors import DataError, RewardError
from tutelage.evaluate.questions import grade
from tutelage.records import Conversation, Prompt, read_records

ROW = {"question": "Which city has the Atomium?", "answer": ["Brussels", "Bruxelles", "Brussels"]}


def records(tmp_path: Path, kind: str, record: type, *rows: dict[str, Any]) -> list[Any]:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / kind
    out.mkdir()
    collect([str(tmp_path / "a.jsonl")], out, kind=kind, validation_share=0)
    return list(read_records(out / "train.jsonl", record))


def test_records_keep_all_right_answers(tmp_path: Path) -> None:
    """A list became one text, `["Brussels", "Bruxelles"]`, that no answer equals."""
    (prompt,) = records(tmp_path, "prompts", Prompt, ROW)
    assert prompt.answer == "Brussels" and prompt.meta["accepted"] == ["Bruxelles"]
    (talk,) = records(tmp_path, "conversations", Conversation, ROW)
    assert talk.messages[1].content == "Brussels" and Prompt.of(talk).meta["accepted"] == ["Bruxelles"]
    answers = ("Brussels", "Bruxelles", "bruxelles", "Antwerp")  # case counts: a grade is never generous
    assert [grade(talk, text).correct for text in answers] == [True, True, False, False]


@pytest.mark.parametrize("answer", [[], [""], [["a"], ["b"]], [{"a": 1}, "x"]])
def test_lists_that_are_no_list_of_answers_are_refused(tmp_path: Path, answer: list[Any]) -> None:
    """Guessing what a list means would reward the wrong thing."""
    with pytest.raises(DataError) as caught:
        records(tmp_path, "prompts", Prompt, ROW | {"answer": answer})
    assert (caught.value.field, caught.value.line) == ("answer", 1)


def test_parts_of_a_message_are_one_answer() -> None:
    """OpenAI's list of text parts is no list of answers."""
    found = to_conversation({"question": "a?", "answer": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]})
    assert found.messages[1].content == "bc" and not found.meta


@pytest.mark.parametrize(
    ("reward", "texts", "right"),
    [
        ("exact", ["four", "4", "5"], [1, 1, 0]),
        ("numeric", ["it is 4", "it is 44", "it is 5"], [1, 1, 0]),
        ("maths", ["$4$", "$44$", "$5$"], [1, 1, 0]),
    ],
)
def test_rewards_take_any_right_answer(reward: str, texts: list[str], right: list[float]) -> None:
    """Only the first of several right answers earned a reward."""
    if reward == "maths":
        pytest.importorskip("math_verify")
    others = ["four", "44"] if reward != "exact" else ["four"]
    with rubric({reward: {}}) as made:
        found = made.judge([rollout(text, "4", i, accepted=others) for i, text in enumerate(texts)])
    assert [verdict.reward for verdict in found] == right


def test_other_answers_that_are_no_list_are_named() -> None:
    """`accepted: "Bruxelles"` would be read as nine answers of a letter each, and an object as answers that are its keys."""
    with rubric({"exact": {}}) as made:
        found = made.judge([rollout(text, "Brussels", i, accepted="Bruxelles") for i, text in enumerate(("B", "Bruxelles"))])
        assert [verdict.reward for verdict in found] == [0, 1]
        for accepted in ({"Bruxelles": 1}, [["Bruxelles"]]):
            with pytest.raises(RewardError, match="other right answers are a list"):
                made.judge([rollout("Bruxelles", "Brussels", accepted=accepted)])
