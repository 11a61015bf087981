"""Two evaluations of the same questions: pairs, their interval, and what cannot be paired."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import World, world  # noqa: F401 (a fixture)
from tutelage import api
from tutelage.cli.show import headline, show_run
from tutelage.errors import ArtifactError, DataError
from tutelage.evaluate import comparison
from tutelage.evaluate.intervals import paired_shares
from tutelage.evaluate.questions import grade_all
from tutelage.files import read_json, write_json
from tutelage.records import Conversation, Message

LONG = "the list of all items in their order"


def asked(n: int, task: str = "add", expected: str = "4", **meta: Any) -> list[Conversation]:
    turns = [(Message(role="user", content=f"{task} {i}?"), Message(role="assistant", content=expected)) for i in range(n)]
    return [Conversation.make(t, source="test", meta={"task": task} | meta) for t in turns]


def answers(right: str, expected: str = "4") -> list[str]:
    """An answer for each character: `x` is the expected one."""
    return [expected if c == "x" else "?" for c in right]


def reference(folder: Path, questions: list[Conversation], given: list[str], scorer: str | None = None) -> comparison.Reference:
    rows = [p.to_json() for p in grade_all(questions, given, scorer)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_json(folder / "scores.json", {"model": {"name": "chat-1"}})
    return comparison.Reference.read(folder)


def compared(theirs: comparison.Reference, questions: list[Conversation], given: list[str]) -> dict[str, Any]:
    return comparison.compare("rl-1", grade_all(questions, given), None, theirs, theirs.graded(questions, None))


def test_the_difference_is_that_of_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shares compared as if other questions had been asked: the interval would be too wide to show anything."""
    questions = asked(100)
    found = compared(reference(tmp_path, questions, answers("x" * 30 + "-" * 70)), questions, answers("x" * 45 + "-" * 55))
    (row,) = found["questions"]
    expected = paired_shares([i < 45 for i in range(100)], [i < 30 for i in range(100)])
    difference = row["difference"]
    assert (difference["value"], difference["low"]) == pytest.approx((0.15, expected.low)) and expected.low > 0.05
    assert (row["reference"]["value"], row["model"]["value"], row["scorer"]) == (0.3, 0.45, "answer")
    said = "rl-1 against chat-1, add: 45.0% right against 30.0%, difference +15.0 points (+"
    assert comparison.verdict(found).startswith(said)
    assert "warning" not in capsys.readouterr().err


def test_several_tasks_have_a_row_together(tmp_path: Path) -> None:
    """Free text graded by exact match, or a mean of shares in place of the share of all questions."""
    questions = [*asked(6), *asked(4, "define", LONG)]
    theirs = reference(tmp_path, questions, [*answers("------"), *answers("----")])
    found = compared(theirs, questions, [*answers("xx----"), *answers("xx--", LONG.replace("all", "the"))])
    assert [r["task"] for r in found["questions"]] == ["add", "define", comparison.ALL] and found["reference"] == "chat-1"
    assert [r["scorer"] for r in found["questions"][:2]] == ["answer", "word_overlap"]
    assert [r["difference"]["value"] for r in found["questions"]] == pytest.approx([2 / 6, 2 / 4, 4 / 10])
    one = found | {"questions": found["questions"][:1]}
    assert comparison.verdict(one).endswith("no clear difference")


def test_other_grades_are_not_paired_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores of `exact` paired with those of `answer`: a difference of scorers shown as one of models."""
    questions = asked(10)
    theirs = reference(tmp_path, questions, ["The answer is 4."] * 10, scorer="exact")
    found = compared(theirs, questions, ["4"] * 10)
    assert found["questions"][0]["difference"]["value"] == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "graded by exact, these by answer: 10 of its 10 grades differ" in said and "evaluate chat-1 again" in said


def test_scores_of_the_earlier_layout_can_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Predictions that hold `score`, and no scorer: their answers are all that is needed."""
    questions = asked(2)
    rows = [
        {"id": c.id, "task": "add", "prompt": "?", "expected": "4", "answer": "4", "correct": True, "score": 1.0}
        for c in questions
    ]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_json(tmp_path / "scores.json", {"version": 1, "model": {"name": "chat-1"}, "gains": {"model": "base-1"}})
    found = compared(comparison.Reference.read(tmp_path), questions, ["4", "5"])
    assert found["questions"][0]["difference"]["value"] == -0.5 and "warning" in capsys.readouterr().err


def test_what_cannot_be_paired_is_refused(tmp_path: Path) -> None:
    """Other questions, or nothing in common: differences between them are not those of the models."""
    questions = asked(4)
    ids = [c.id for c in questions]
    old = reference(tmp_path, questions, answers("xx--"))
    with pytest.raises(DataError, match=r"other questions(.|\n)*3 in both, of 4 there and 3 here(.|\n)*max_questions"):
        old.check(ids[:3], [], {})
    with pytest.raises(DataError, match="measured nothing that this one measures"):
        old.check([], ["d1"], {})
    old.check(ids, ["d1"], {})  # documents that the reference did not read


@pytest.mark.parametrize(
    ("name", "text"),
    [("predictions.jsonl", None), ("predictions.jsonl", '{"id": "a", "ta'), ("predictions.jsonl", '{"of": "another version"}\n'),
     ("scores.json", "{}"), ("scores.json", "[]"), ("scores.json", "{")],
)  # fmt: skip
def test_what_evaluate_did_not_write_is_refused(name: str, text: str | None, tmp_path: Path) -> None:
    """A traceback for the scores of a classifier, for a cut line, or for a file of another version."""
    reference(tmp_path, asked(2), answers("xx"))
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"not scores of `tutelage evaluate`|not valid JSON"):
        comparison.Reference.read(tmp_path)


def test_the_stage_compares(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """A model against itself differs in nothing, neither in questions nor in documents."""
    same: dict[str, Any] = {
        "model": world.made["chat"], "questions": world.made["chats"], "documents": world.made["corpus"], "max_questions": 3,
        "max_tokens": 4, "max_documents": 3, "baselines": False, "runs": tmp_path, "device": "cpu",
    }  # fmt: skip
    first = api.evaluate(**same)
    second = api.evaluate(**same, compare_with=first.path)
    found = read_json(second.path / "scores" / "scores.json")["comparison"]
    assert found["questions"][-1]["difference"]["value"] == 0 and found["documents"]["share"]["value"] == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "difference +0.0 points" in said and "no clear difference" in said
    with pytest.raises(DataError, match="of 3 there and 2 here"):
        api.evaluate(**(same | {"max_questions": 2, "compare_with": first.path}))
    for how in ({"max_tokens": 5}, {"stride": 0.25}):
        with pytest.raises(DataError, match="used another setting"):
            api.evaluate(**(same | how | {"compare_with": first.path}))


def test_runs_and_show_name_the_model(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """`1.462 bits per byte` in a list, of one model or of another that was made from it, on these texts or those."""
    model, corpus, chats = (world.made[name] for name in ("chat", "corpus", "chats"))
    run = api.evaluate(
        model=model, questions=chats, documents=corpus, max_questions=3, max_tokens=4, max_documents=3, baselines=False,
        runs=tmp_path, device="cpu",
    )  # fmt: skip
    row = read_json(run.path / "run.json")
    assert row["model"] == model.name and row["documents"] == corpus.name and row["questions"] == chats.name
    line = headline(row)
    assert line.startswith(f"{model.name}: {row['bits_per_byte']['value']:.3f} bits per byte (")
    assert f"perplexity {row['perplexity']['value']:.1f} (" in line and f"on {corpus.name}" in line
    assert f"right on {chats.name}" in line
    show_run(str(run.path), tmp_path)
    shown = capsys.readouterr().out
    assert "perplexity " in shown and all(f"correct {task}" in shown for task in row["correct"])
