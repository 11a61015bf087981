"""Rows with labels: what each form becomes, and what is refused where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tutelage.data.clean.collect import collect
from tutelage.data.demo import python_areas
from tutelage.data.sources import labelled
from tutelage.errors import DataError
from tutelage.records import Example, Span, dump_line, read_records


def read(row: dict[str, Any], **fields: str) -> Example:
    return labelled.read(row, file="rows.jsonl", line=3, source="rows.jsonl#3", fields=fields or None)


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({"text": "a b", "label": "x"}, {}, {"label": "x"}),
        ({"comment": "a b", "toxic": "False"}, {"text": "comment", "label": "toxic"}, {"label": "false"}),
        ({"text": "a b", "label": True}, {}, {"label": "true"}),
        ({"text": "a b", "label": "true"}, {}, {"label": "true"}),
        ({"text": "a b", "label": False}, {}, {"label": "false"}),
        ({"text": "a b", "label": 2}, {}, {"label": "2"}),
        ({"text": "a b", "label": 0}, {}, {"label": "0"}),
        ({"text": "a b", "label": 0.0}, {}, {"label": "0"}),
        ({"text": "a b", "label": "-1.0"}, {}, {"label": "-1"}),
        ({"text": "a b", "label": "TRUE"}, {}, {"label": "true"}),
        ({"text": "a b", "label": "2.10"}, {}, {"label": "2.10"}),
        ({"text": "a b", "label": "007"}, {}, {"label": "007"}),
        ({"text": "a b", "label": 1.5}, {}, {"label": "1.5"}),
        ({"text": "a b", "labels": ["y", "x", "x"]}, {}, {"labels": ("x", "y")}),
        ({"text": "a b", "labels": "[]"}, {}, {"labels": ()}),
        ({"prompt": "a b\n", "completion": "World<|endoftext|>"}, {}, {"label": "World"}),
        ({"full_text": "a b", "spans": [{"entity_type": "P", "start_position": 2, "end_position": 3}]}, {},
         {"spans": (Span(start=2, end=3, label="P"),)}),
        ({"text": "abcdef", "spans": "[4, 0, 1]"}, {},
         {"spans": (Span(start=0, end=2, label="span"), Span(start=4, end=5, label="span"))}),
        ({"tokens": ["New", "York", "is", "big"], "tags": ["B-P", "I-P", "O", "I-Q"]}, {},
         {"text": "New York is big", "spans": (Span(start=0, end=8, label="P"), Span(start=12, end=15, label="Q"))}),
        ({"premise": "a", "hypothesis": "b", "label": "no"}, {}, {"text": "a", "pair": "b", "label": "no"}),
    ],
)  # fmt: skip
def test_every_form_becomes_an_example(row: dict[str, Any], fields: dict[str, str], expected: dict[str, Any]) -> None:
    """A field that is overlooked: labels would be missing, or spans one character off."""
    found = read(row, **fields)
    assert {key: getattr(found, key) for key in expected} == expected
    assert "text" in expected or found.text in ("a b", "abcdef")


def test_labels_of_tables_and_json_meet(tmp_path: Path) -> None:
    """The same label was another class in CSV than in JSONL: 1, 1.0, "1.0" and true, "True" were four."""
    csv, jsonl = tmp_path / "a.csv", tmp_path / "b.jsonl"
    csv.write_text("text,label\na,1\nb,1.0\nc,True\nd,false\n")
    jsonl.write_text(
        "".join(json.dumps({"text": t, "label": v}) + "\n" for t, v in zip("efgh", (1, 1.0, True, False), strict=True))
    )
    (tmp_path / "out").mkdir()
    collect([str(csv), str(jsonl)], tmp_path / "out", kind="examples", validation_share=0)
    found = [e.label for e in read_records(tmp_path / "out" / "train.jsonl", Example)]
    assert found == ["1", "1", "true", "false"] * 2


@pytest.mark.parametrize(
    ("row", "field", "said"),
    [
        ({"text": "a"}, None, "no label"),
        ({"label": "x"}, None, "no text"),
        ({"text": "  ", "label": "x"}, "text", "empty text"),
        ({"text": "a", "label": ""}, "label", "no label"),
        ({"text": "a", "label": None}, "label", "no label"),
        ({"text": "a", "label": float("nan")}, "label", "no label"),
        ({"prompt": "a", "completion": "<|endoftext|>"}, "completion", "no label"),
        ({"text": "a", "labels": "x, y"}, "labels", "not a list"),
        ({"text": "abc", "spans": [{"start": 1, "end": 9, "label": "P"}]}, "spans", "outside"),
        ({"text": "abc", "spans": [[0, 2, "P"], [1, 3, "Q"]]}, "spans", "overlap"),
        ({"text": "abc", "spans": [{"start": "0", "end": 1, "label": "P"}]}, "spans[0]", "no place"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "tags", "each token"),
        ({"tokens": ["a"], "ner_tags": [3]}, "ner_tags[0]", "not a tag"),
    ],
)
def test_rows_that_cannot_be_trusted_are_named(row: dict[str, Any], field: str | None, said: str) -> None:
    """A guess in place of an error; an error without file, line and field."""
    with pytest.raises(DataError, match=said) as error:
        read(row)
    assert (error.value.file, error.value.line) == ("rows.jsonl", 3) and (field is None or error.value.field == field)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    """Spans that come back as dictionaries, labels as lists: equality and tags would fail later."""
    made = [
        read({"text": "abc", "spans": [[0, 2, "P"]]}),
        read({"text": "abd", "labels": ["x", "y"]}),
        read({"text": "e", "label": "f"}),
    ]
    (tmp_path / "r.jsonl").write_text("".join(dump_line(e) + "\n" for e in made))
    assert list(read_records(tmp_path / "r.jsonl", Example)) == made


def test_the_data_stage_collects_them(tmp_path: Path) -> None:
    """Texts that are trimmed although spans point into them (they stay byte for byte); one text on both sides of the split."""
    rows = [{"text": f"  x{i}  y\r\n", "label": "a" if i % 2 else "b"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, rows[0]]))
    (tmp_path / "tagged.conll").write_text("-DOCSTART- -X- O\n\nAda NNP B-P\nsat VBD O\n\nEve NNP B-P\n")
    out = tmp_path / "out"
    out.mkdir()
    facts = collect([str(tmp_path / "rows.jsonl")], out, kind="examples", validation_share=0.2, dedup="exact")
    found = [e for part in ("train", "validation") for e in read_records(out / f"{part}.jsonl", Example)]
    assert (
        len(found) == 20
        and facts["rejected"] == {"duplicate": 1}
        and {e.text for e in found} == {f"  x{i}  y\r\n" for i in range(20)}
    )
    assert json.loads((out / "schema.json").read_text())["type"] == "Example"
    other = tmp_path / "other"
    other.mkdir()
    collect([str(tmp_path / "tagged.conll")], other, kind="examples", validation_share=0)
    tagged = list(read_records(other / "train.jsonl", Example))
    assert [(e.text, e.spans) for e in tagged] == [
        ("Ada sat", (Span(start=0, end=3, label="P"),)),
        ("Eve", (Span(start=0, end=3, label="P"),)),
    ]


def test_docstrings_have_areas() -> None:
    """One area that outweighs all others; examples that come in another order from one call to the next."""
    found = list(python_areas.read({"most": "20"}))
    assert found == list(python_areas.read({"most": "20"}))
    counts = {name: sum(e.label == name for e in found) for name in {e.label for e in found}}
    assert len(counts) == 12 and max(counts.values()) == 20 and len({e.id for e in found}) > 200
