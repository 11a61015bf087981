"""Judged rows whose numbers and labels are text, as all of CSV is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tutelage.data.clean.collect import collect
from tutelage.data.sources.feedback import read
from tutelage.errors import DataError
from tutelage.records import Preference, Rating, read_records


def table(tmp_path: Path, kind: str, columns: str, values: list[str]) -> dict[str, Any]:
    """The records of a CSV with these values beside a text, by their number."""
    (tmp_path / "rows.csv").write_text(columns + "\n" + "".join(f"Question {i}?,{v}\n" for i, v in enumerate(values)))
    (tmp_path / "out").mkdir()
    collect([str(tmp_path / "rows.csv")], tmp_path / "out", kind=kind, validation_share=0)
    of: Any = Preference if kind == "preferences" else Rating
    return {r.prompt[0].content[9:-1]: r for r in read_records(tmp_path / "out" / "train.jsonl", of)}


def test_labels_of_a_table(tmp_path: Path) -> None:
    """Guards against a CSV whose column `label` is refused: "a label is true or false, found: true"."""
    said = ["true", "TRUE", " yes ", "1", "false", "No", "0"]
    found = table(tmp_path, "ratings", "prompt,completion,label", [f"Answer {i}.,{v}" for i, v in enumerate(said)])
    assert [found[str(i)].scores for i in range(7)] == [{"desirable": float(i < 4)} for i in range(7)]


def test_scores_of_a_table(tmp_path: Path) -> None:
    """Guards against numbers that are refused because CSV has text only; an empty cell leaves the word to the next column."""
    rows = ["A.,,4", "B.,,-2.5e-1", "C.,no,", 'D.,,"{""kind"": ""3"", ""right"": 1}"']
    columns = "prompt,completion,label,score"
    found = table(tmp_path, "ratings", columns, rows[:3])
    assert [found[i].scores for i in "012"] == [{"score": 4.0}, {"score": -0.25}, {"desirable": 0.0}]
    (tmp_path / "aspects").mkdir()
    aspects = table(tmp_path / "aspects", "ratings", columns.replace("score", "scores"), rows[3:])
    assert aspects["0"].scores == {"kind": 3.0, "right": 1.0}


def test_margins_of_a_table(tmp_path: Path) -> None:
    """Guards against a margin that is refused as text, and against an empty cell that is taken for one."""
    found = table(tmp_path, "preferences", "prompt,chosen,rejected,margin", ["A.,B.,1.5", "C.,D.,", "E.,F.,+2"])
    assert [found[i].margin for i in "012"] == [1.5, None, 2.0]


def rated(**given: Any) -> Any:
    return read("ratings", {"prompt": "a", "completion": "b", **given}, file="r.csv", line=3, source="r.csv#3", fields=None)


def test_steps_may_be_judged_in_words() -> None:
    """Guards against JSON lines whose labels are text, and against lists in a CSV."""
    row = {"prompt": "a", "completions": '["b", "c"]', "labels": '["true", "0.5"]'}
    assert read("ratings", row, file="r", line=1, source="r", fields=None).step_scores == (1.0, 0.5)


BAD: list[tuple[dict[str, Any], str, str]] = [  # row, field, words
    ({"label": "maybe"}, "label", "yes, no, 1 or 0"),
    ({"label": 2}, "label", "true (desirable) or false"),
    ({"label": ""}, "label", "has no score or label"),
    ({"score": "four"}, "score", "a finite number"),
    ({"score": "nan"}, "score", "a finite number"),
    ({"score": "1e999"}, "score", "a finite number"),
    ({"score": "1_0"}, "score", "a finite number"),
    ({"scores": "4"}, "scores", "give one number as `score`"),
    ({"scores": {"kind": None}}, "scores.kind", "found:    null"),
]


@pytest.mark.parametrize(("given", "field", "words"), BAD)
def test_what_spells_neither_is_refused(given: dict[str, Any], field: str, words: str) -> None:
    """Guards against text that is guessed at, and against errors without a place or a way out."""
    with pytest.raises(DataError) as caught:
        rated(**given)
    assert caught.value.field == field and caught.value.fix and words in str(caught.value)
    assert str(caught.value).startswith("r.csv:3: ")
