"""Rows are read as their format says: tables, Parquet, CoNLL, lines."""

from __future__ import annotations

import datetime
import json
import sys
import types
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tutelage.data.clean.collect import collect
from tutelage.data.sources import conversations, feedback
from tutelage.data.sources.readers import ReadOptions, Rejections, Row, read
from tutelage.errors import DataError
from tutelage.records import Document


def rows(path: Path | str, report: Rejections | None = None, kind: str = "conversations") -> list[dict[str, Any]]:
    return [r.fields for r in read(str(path), ReadOptions(kind=kind), report) if isinstance(r, Row)]


def refused(path: Path | str, kind: str = "conversations") -> DataError:
    with pytest.raises(DataError) as caught:
        rows(path, kind=kind)
    return caught.value


def test_tsv_has_no_quoting(tmp_path: Path) -> None:
    """A cell that begins with a quotation mark took in the rows behind it, or lost its marks."""
    cells = ["The lamp works", '"Never again, said my sister', 'He "left"', '"Stop" means what?', '"Yes."', "a\u2028b"]
    path = tmp_path / "a.tsv"
    path.write_bytes("".join(f"{line}\r\n" for line in ["text\tlabel", *(f"{c}\tx" for c in cells)]).encode())
    assert rows(path) == [{"text": c, "label": "x"} for c in cells]
    path.write_text("text\tlabel\nOne\tx\nTwo\n")
    error = refused(path)
    assert error.line == 3 and "fewer fields" in error.message
    path.write_text('text\tlabel\n"He said ""no"""\tx\n')
    report = Rejections()
    assert rows(path, report) == [{"text": '"He said ""no"""', "label": "x"}] and sum(report.notes.values()) == 1


@pytest.mark.parametrize(
    ("table", "line", "kept"),
    [
        ('q,a\nWhat?,"That, said Tom.\nWho?,Me.\nWhere?,Here.\n', 2, ["Who?", "Where?"]),
        ('q,a\nWhat?,"a\nb"\n"Never again,No\nWho?,Me.\n"Solid" word,x\n', 4, ["What?", "Who?"]),
        ('q,a\nWho?,Me.\n"x ""y"",z\nWhat?,That.\n', 3, ["Who?", "What?"]),
    ],
)
def test_a_quotation_mark_that_never_closes_is_named_by_its_line(tmp_path: Path, table: str, line: int, kept: list[str]) -> None:
    """An open quotation mark made all rows behind it into one cell, in silence."""
    path = tmp_path / "a.csv"
    path.write_text(table)
    error = refused(path)
    assert error.line == line and "not closed" in error.message
    report = Rejections(on_error="skip")
    assert [r["q"] for r in rows(path, report)] == kept
    assert report.seen == len(kept) + report.errors and report.first[next(iter(report.reasons))].endswith(f":{line}")


def test_columns_without_a_name(tmp_path: Path) -> None:
    """pandas' index column made each row have "more fields than the header"; so did Excel's comma at the end of the header."""
    for table, left_out in ((",q,a\n0,What?,That.\n", 1), ("q,a,,\nWhat?,That.,,\n", 0), ("q,a\nWhat?,That.,\n", 0)):
        (tmp_path / "a.csv").write_text(table)
        report = Rejections()
        assert rows(tmp_path / "a.csv", report) == [{"q": "What?", "a": "That."}] and sum(report.notes.values()) == left_out
    (tmp_path / "a.csv").write_text("q,a\nWhat?,That.,more\n")
    assert "3 fields" in str(refused(tmp_path / "a.csv").found)


def test_one_name_for_two_values_is_refused(tmp_path: Path) -> None:
    """Of two columns or keys with one name the last won."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.csv").write_text("q,a,q\n1,2,3\n")
    (tmp_path / "b.tsv").write_text("q\ta\tq\n1\t2\t3\n")
    (tmp_path / "c.jsonl").write_text('{"q": 1, "m": {"a": 1, "a": 2}}\n')
    (tmp_path / "d.json").write_text('[{"q": 1, "q": 2}]')
    parquet.write_table(pa.table([["1"], ["2"]], names=["q", "q"]), tmp_path / "e.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert "one name" in refused(path).message or "comes twice" in refused(path).message, path


def test_deep_nesting_is_an_error_of_the_row(tmp_path: Path) -> None:
    """A RecursionError of the parser reached the user."""
    (tmp_path / "a.jsonl").write_text('{"q": ' + "[" * 100_000 + "\n")
    assert refused(tmp_path / "a.jsonl").line == 1


@pytest.mark.parametrize(
    ("text", "tokens", "tags"),
    [
        ("# text = Vitamin O\n1\tAnna\tB-PER\tO\n2\tsang\tO\tO\n\n", ["Anna", "sang"], ["B-PER", "O"]),
        ("#\thttp://a/b [2009-10-17]\n1\tAnna\tB-PER\tO\n", ["Anna"], ["B-PER"]),
        ("-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\n# # O O\n", ["EU", "#"], ["B-ORG", "O"]),
        ("a\u2028b\tB-X\r\n\u00a0c\tO\r\n", ["a\u2028b", "\u00a0c"], ["B-X", "O"]),
    ],
)
def test_conll_columns(tmp_path: Path, text: str, tokens: list[str], tags: list[str]) -> None:
    """Tokens were the numbers of an index column; comments were tags; a token with an odd space became two lines."""
    (tmp_path / "a.conll").write_bytes(text.encode())
    assert rows(tmp_path / "a.conll", kind="examples") == [{"tokens": tokens, "tags": tags}]


def test_conll_that_is_not_clear(tmp_path: Path) -> None:
    """Of two columns of tags one was taken in silence; a sentence lost its untagged token under skip."""
    (tmp_path / "a.conll").write_text("1\tAnna\tB-PER\tB-X\n")
    assert "columns 3, 4" in str(refused(tmp_path / "a.conll", "examples").found)
    (tmp_path / "a.conll").write_text("a B-X\nb\nc O\n\nd O\n")
    assert refused(tmp_path / "a.conll", "examples").line == 2
    report = Rejections(on_error="skip")
    assert [r["tokens"] for r in rows(tmp_path / "a.conll", report, "examples")] == [["d"]] and report.errors == 1


@pytest.mark.parametrize("split", ["lines", "blank_lines"])
def test_lines_end_in_newline_and_carriage_return_only(tmp_path: Path, split: str) -> None:
    """U+2028, U+0085 and form feeds are characters of a text; a lone carriage return ends a line."""
    between = "\n" if split == "lines" else "\n\n"
    for end in ("\n", "\r\n", "\r"):
        text = between.join(["One\u2028long\x85line\x0chere", "Two", "Three"]).replace("\n", end)
        (tmp_path / "a.txt").write_bytes(text.encode())
        found = [d for d in read(str(tmp_path / "a.txt"), ReadOptions(split=split)) if isinstance(d, Document)]
        assert [d.text for d in found] == ["One\u2028long\x85line\x0chere", "Two", "Three"]
        assert [d.source.rpartition("#")[2] for d in found] == (["1", "2", "3"] if split == "lines" else ["1", "3", "5"])


def test_parquet_values_become_json(tmp_path: Path) -> None:
    """Timestamps, decimals and bytes ended in a TypeError when records were written."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    day, moment = datetime.date(2026, 3, 1), datetime.datetime(2026, 3, 1, 12, 30, tzinfo=datetime.UTC)
    table = pa.table({
        "prompt": [b"What is 1 plus 1?"], "answer": [Decimal("2")], "day": [day], "moment": [moment], "share": [Decimal("0.25")],
        "exact": pa.array([Decimal("0.1234567890123456789")]), "picture": [b"\xff\xd8\0"],
        "map": pa.array([[("a", day)]], pa.map_(pa.string(), pa.date32())), "list": [[moment, None]],
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "a.parquet")
    report = Rejections()
    (row,) = rows(tmp_path / "a.parquet", report)
    json.dumps(row)
    assert row == {
        "prompt": "What is 1 plus 1?", "answer": 2, "day": "2026-03-01", "moment": "2026-03-01T12:30:00+00:00", "share": 0.25,
        "exact": "0.1234567890123456789", "picture": None, "map": {"a": "2026-03-01"},
        "list": ["2026-03-01T12:30:00+00:00", None],
    }  # fmt: skip
    assert sum(report.notes.values()) == 1
    card = collect([str(tmp_path / "a.parquet")], _folder(tmp_path), kind="prompts", validation_share=0)
    assert card["records"] == 1 and card["changed_by_readers"]
    record = json.loads((tmp_path / "out" / "train.jsonl").read_text())
    assert record["answer"] == "2" and record["meta"]["day"] == "2026-03-01"


def _folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_dates_of_text_formats_stay_text(tmp_path: Path) -> None:
    """What looks like a date is not for a reader to change."""
    (tmp_path / "a.csv").write_text("q,at\nx,01/02/2026\n")
    (tmp_path / "b.jsonl").write_text('{"q": "x", "at": "01/02/2026"}\n')
    assert rows(tmp_path / "a.csv") == rows(tmp_path / "b.jsonl") == [{"q": "x", "at": "01/02/2026"}]


def test_parquet_values_that_python_cannot_hold(tmp_path: Path) -> None:
    """A year past 9999 or invalid UTF-8 in any column was a traceback, with on_error=skip too."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    years = pa.array([0, 999_999_999_999, 0], pa.int64()).cast(pa.timestamp("s"))
    offsets, data = pa.array([0, 1, 2, 4], pa.int32()).buffers()[1], pa.py_buffer(b"ab\xff\xfe")
    broken = pa.StringArray.from_buffers(3, offsets, data)
    for name, column, line in (("at", years, 2), ("text", broken, 3)):
        parquet.write_table(pa.table({"q": ["x", "y", "z"], name: column}), tmp_path / "a.parquet")
        error = refused(tmp_path / "a.parquet")
        assert (error.line, error.field) == (line, name)
        assert len(rows(tmp_path / "a.parquet", Rejections(on_error="skip"))) == 2


def test_parquet_of_arrows_json_type(tmp_path: Path) -> None:
    """A JSON column was read as its encoded text: answers were learnt with quotation marks and backslashes."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    answers = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['"Hello,\\n\\"world\\""', "4", None]))
    calls = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": null}', '{"a": 1}', '{"b": []}']))
    nested = pa.StructArray.from_arrays([pa.ListArray.from_arrays([0, 1, 2, 3], calls)], names=["tool_calls"])
    parquet.write_table(pa.table({"answer": answers, "messages": nested}), tmp_path / "a.parquet")
    found = rows(tmp_path / "a.parquet")
    assert [r["answer"] for r in found] == ['Hello,\n"world"', 4, None]
    assert found[0]["messages"] == {"tool_calls": [{"a": None}]}  # JSON's own nulls stay
    broken = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['"x"', "{oops"]))
    parquet.write_table(pa.table({"answer": broken}), tmp_path / "a.parquet")
    assert (refused(tmp_path / "a.parquet").line, refused(tmp_path / "a.parquet").field) == (2, "answer")


def call(name: str) -> dict[str, Any]:
    """A row in which one tool is offered and called."""
    arguments = {name: {"x": 1}}
    asked = {"role": "user", "content": f"Use {name}.", "tool_calls": None}
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
    parameters = {"type": "object", "properties": {name: {"type": "object"}}}
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}}]
    return {"messages": [asked, called], "tools": tools}


CALLS = [call("weather"), call("clock")]


def test_nulls_that_columns_add_to_tools_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments and schemas of one row had the keys of all others, as nulls, and a model learnt to write them."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_pylist(CALLS)
    parquet.write_table(table, tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: table.to_pylist()))
    for source in (str(tmp_path / "a.parquet"), "hf:o/n"):
        report = Rejections()
        for row, given in zip(rows(source, report), CALLS, strict=True):
            assert row["messages"][1]["tool_calls"] == given["messages"][1]["tool_calls"] and row["tools"] == given["tools"]
        assert sum(report.notes.values()) == 4
    (tmp_path / "b.jsonl").write_text('{"tools": [{"name": "a", "parameters": {"default": null}}]}\n')
    assert rows(tmp_path / "b.jsonl")[0]["tools"][0]["parameters"] == {"default": None}  # there, a null was written


def test_names_of_classes_in_parquet(tmp_path: Path) -> None:
    """Labels were "0" and "1" where the file has their names."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    label, tags = {"names": ["neg", "pos"], "_type": "ClassLabel"}, {"names": ["O", "B-P"], "_type": "ClassLabel"}
    features = {"label": label, "ner_tags": {"feature": tags, "_type": "List"}}
    table = pa.table({"text": ["a", "b", "c"], "label": [1, 0, -1], "ner_tags": [[0, 1], [], None]})
    meta = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(table.replace_schema_metadata(meta), tmp_path / "a.parquet")
    found = rows(tmp_path / "a.parquet", kind="examples")
    assert [r["label"] for r in found] == ["pos", "neg", None] and found[0]["ner_tags"] == ["O", "B-P"]
    assert [r["label"] for r in rows(tmp_path / "a.parquet", kind="ratings")] == [1, 0, -1]
    parquet.write_table(pa.table({"label": [7]}).replace_schema_metadata(meta), tmp_path / "a.parquet")
    assert "class 7" in refused(tmp_path / "a.parquet", "examples").message


def test_checksums_of_parquet_pages_are_verified(tmp_path: Path) -> None:
    """Two flipped bits changed rows, and nobody noticed."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, table = tmp_path / "a.parquet", pa.table({"q": [f"question {i} of them all" for i in range(30)]})
    parquet.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"question 7 ", b"question 9 ", 1))
    assert "checksum" in refused(path).message.lower()


def test_fields_take_paths_into_nested_rows() -> None:
    """Self-instruct's seed tasks keep the answer at instances.0.output, which no mapping could name."""
    row = {"instruction": "Add.", "instances": [{"input": "", "output": "Four."}], "a.b": "whole"}
    fields = {"prompt": "instruction", "completion": "instances.0.output"}
    assert conversations.to_conversation(row, fields=fields).messages[1].content == "Four."
    place: dict[str, Any] = {"file": "a.jsonl", "line": 1, "source": "a"}
    names = {"question": "a.b", "answer": "instances.0.output"}
    found = feedback.read("prompts", row, fields=names, **place)
    assert (found.messages[0].content, found.answer) == ("whole", "Four.")
    for path, said in (
        ("instances.1.output", "no item '1'"),
        ("instances.0.outptu", "instances.0.output"),
        ("a.c", "no key 'a'"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            feedback.read("prompts", row, fields={"question": path}, **place)
        assert caught.value.field == "fields.question"
    assert [d.text for d in _documents(row)] == ["Four."]  # type: ignore[union-attr]


def _documents(row: dict[str, Any]) -> list[Any]:
    from tutelage.data.sources.readers_files import _item

    return list(_item(row, "a", "a", 1, ReadOptions(text_field="instances.0.output"), Rejections()))


def test_numbers_are_answers_of_dialogues() -> None:
    """`{"question": "2+2?", "answer": 4}` was told to remove images."""
    assert conversations.to_conversation({"question": "2+2?", "answer": 4}).messages[1].content == "4"
    assert conversations.to_conversation({"instruction": "2+2.5?", "output": 4.5}).messages[1].content == "4.5"
    with pytest.raises(DataError, match="write it as text"):
        conversations.to_conversation({"question": 4, "answer": "4"})
