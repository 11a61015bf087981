"""Two evaluations of the same questions: pairs, their interval, and what cannot be paired."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import World, world  # noqa: F401 (a fixture)
from tutelage import api
from tutelage.errors import ArtifactError, DataError
from tutelage.evaluate import comparison
from tutelage.evaluate.intervals import paired_shares
from tutelage.evaluate.questions import Prediction
from tutelage.files import read_json, write_json

NOW = {"add": "correct", "define": "recognisable"}


def predictions(right: str, task: str = "add") -> list[Prediction]:
    """A question for each character: `x` is answered as expected."""
    return [Prediction(f"{task}{i}", task, "?", "4", "4", c == "x", float(c == "x")) for i, c in enumerate(right)]


def earlier(folder: Path, rows: list[Prediction]) -> comparison.Earlier:
    (folder / "predictions.jsonl").write_text("".join(json.dumps(p.to_json()) + "\n" for p in rows), encoding="utf-8")
    write_json(folder / "scores.json", {"model": {"name": "chat-1"}})
    return comparison.Earlier.read(folder)


def test_the_gain_is_that_of_pairs(tmp_path: Path) -> None:
    """Shares compared as if other questions had been asked: the interval would be too wide to show anything."""
    before, after = predictions("x" * 30 + "-" * 70), predictions("x" * 45 + "-" * 55)
    row = earlier(tmp_path, before).gains(after, NOW, None)["questions"][0]
    expected = paired_shares([i < 45 for i in range(100)], [i < 30 for i in range(100)])
    assert (
        row["gain"]["value"] == pytest.approx(0.15) and row["gain"]["low"] == pytest.approx(expected.low) and expected.low > 0.05
    )
    assert (row["before"]["value"], row["after"]["value"]) == (0.3, 0.45)
    assert comparison.verdict(row).startswith("add: 30.0% to 45.0% right, gain 15.0 points (")


def test_several_tasks_have_a_row_together(tmp_path: Path) -> None:
    """Free text judged by exact match, or a mean of shares in place of the share of all questions."""
    near = [replace(p, correct=False) for p in predictions("xx--", "define")]  # recognisable, not equal
    before = [*predictions("------"), *[replace(p, score=0.0) for p in near]]
    found = earlier(tmp_path, before).gains([*predictions("xx----"), *near], NOW, None)
    assert [r["task"] for r in found["questions"]] == ["add", "define", comparison.ALL] and found["model"] == "chat-1"
    assert [r["gain"]["value"] for r in found["questions"]] == pytest.approx([2 / 6, 2 / 4, 4 / 10])
    assert comparison.verdict(found["questions"][0]).endswith("no clear change")


def test_what_cannot_be_paired_is_refused(tmp_path: Path) -> None:
    old = earlier(tmp_path, predictions("xx--"))
    with pytest.raises(DataError, match=r"other questions(.|\n)*3 in both, of 4 then and 3 now(.|\n)*max_questions"):
        old.check([p.id for p in predictions("xx-")], [], {})
    with pytest.raises(DataError, match="measured nothing that this one measures"):
        old.check([], ["d1"], {})
    old.check([p.id for p in predictions("xx--")], ["d1"], {})  # documents are measured for the first time


@pytest.mark.parametrize(
    ("name", "text"),
    [("predictions.jsonl", None), ("predictions.jsonl", '{"id": "a", "ta'), ("predictions.jsonl", '{"of": "another version"}\n'),
     ("scores.json", "{}"), ("scores.json", "[]"), ("scores.json", "{")],
)  # fmt: skip
def test_what_evaluate_did_not_write_is_refused(name: str, text: str | None, tmp_path: Path) -> None:
    """A traceback for the scores of a classifier, for a cut line, or for a file of another version."""
    earlier(tmp_path, predictions("xx"))
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match="no scores of `tutelage evaluate`"):
        comparison.Earlier.read(tmp_path)


def test_the_stage_says_what_was_gained(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Against itself nothing is gained, in questions and in documents; and the page of the run shows it."""
    same: dict[str, Any] = {
        "model": world.made["chat"], "questions": world.made["chats"], "documents": world.made["corpus"], "max_questions": 3,
        "max_tokens": 4, "max_documents": 3, "yardsticks": False, "runs": tmp_path, "device": "cpu",
    }  # fmt: skip
    first = api.evaluate(**same)
    second = api.evaluate(**same, before=first.path)
    found = read_json(second.path / "scores" / "scores.json")["gains"]
    assert found["questions"][-1]["gain"]["value"] == 0 and found["documents"]["share"]["value"] == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "gain 0.0 points" in said and "no clear change" in said
    with pytest.raises(DataError, match="of 3 then and 2 now"):
        api.evaluate(**(same | {"max_questions": 2, "before": first.path}))
    for how in ({"max_tokens": 5}, {"stride": 0.25}):
        with pytest.raises(DataError, match="was measured otherwise"):
            api.evaluate(**(same | how | {"before": first.path}))
