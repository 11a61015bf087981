"""Readers: what a source string gives, and what a user is told when it cannot be read."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path

import pytest

from tutelage.data.sources.readers import ReadOptions, Rejections, Row, files_of, read, source_digest
from tutelage.data.sources.readers_base import chunks
from tutelage.errors import ConfigError, DataError, MissingExtra
from tutelage.records import Document


def texts(source: Path | str, **options: object) -> list[str]:
    return [d.text for d in read(str(source), ReadOptions(**options)) if isinstance(d, Document)]  # type: ignore[arg-type]


def test_a_text_file_is_one_document_named_by_its_file(tmp_path: Path) -> None:
    """A document whose source is lost cannot answer where a model's words come from."""
    (tmp_path / "a.txt").write_text("One.\n\nTwo.")
    (document,) = read(str(tmp_path / "a.txt"))
    assert isinstance(document, Document) and document.text == "One.\n\nTwo." and document.source == str(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("blank_lines", [(1, "a\nb"), (4, "c"), (8, "d")]),
        ("lines", [(1, "a"), (2, "b"), (4, "c"), (8, "d")]),
        ("form_feed", [(1, "a\nb\n\nc\n"), (6, " \n\nd")]),
    ],
)
def test_pieces_of_a_text_file_say_the_line_they_start_on(tmp_path: Path, split: str, expected: list[tuple[int, str]]) -> None:
    """Positions that drift by the blank lines between pieces point users at the wrong place."""
    (tmp_path / "a.txt").write_text("a\nb\n\nc\n\n\f \n\nd")
    documents = [d for d in read(str(tmp_path / "a.txt"), ReadOptions(split=split)) if isinstance(d, Document)]
    found = [(int(d.source.rpartition("#")[2]), d.text) for d in documents]
    assert [(n, t.strip()) for n, t in found] == [(n, t.strip()) for n, t in expected]


def test_chunks_join_to_the_text_and_end_at_paragraphs() -> None:
    """A cut that loses or repeats characters changes what the model learns from."""
    text = "\n\n".join(f"Paragraph {i} has some words in it." for i in range(200))
    parts = list(chunks(text, 500))
    assert "".join(parts) == text and all(len(p) <= 500 for p in parts) and all(p.endswith("\n\n") for p in parts[:-1])
    assert "".join(chunks("x" * 1234, 500)) == "x" * 1234


def test_a_long_text_becomes_pieces_with_positions(shared_data: Path) -> None:
    """One play of 1.1 MB as one document leaves nothing to hold out."""
    path = shared_data / "tinyshakespeare" / "input.txt"
    documents = [d for d in read(str(path), ReadOptions(chunk_chars=4000)) if isinstance(d, Document)]
    lines = path.read_text().split("\n")
    assert len(documents) > 270 and all(len(d.text) <= 4000 and not d.parents for d in documents)
    for d in documents[::50]:
        assert lines[int(d.source.rpartition("#")[2]) - 1] == d.text.split("\n")[0]


def test_wrong_encoding_names_line_byte_and_way_out(tmp_path: Path) -> None:
    """`UnicodeDecodeError: invalid continuation byte` does not say which file or what to do."""
    path = tmp_path / "latin.txt"
    path.write_bytes("first line\nZürich\n".encode("latin-1"))
    with pytest.raises(DataError) as caught:
        texts(path)
    shown = str(caught.value)
    assert f"{path}:2:" in shown and "0xfc at offset 12" in shown and "iconv" in shown
    assert "encoding=cp1252" in shown and "“Zürich” is right" in shown
    assert texts(path, encoding="latin-1") == ["first line\nZürich\n"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_wins_and_is_not_text(tmp_path: Path, encoding: str) -> None:
    """A mark left in the text is a character that the model learns to start with."""
    (tmp_path / "a.txt").write_bytes("Zürich".encode(encoding))
    assert texts(tmp_path / "a.txt") == ["Zürich"]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    assert texts(tmp_path / "a.jsonl") == ["x"]


NO_TEXT = [
    ("a.zip", b"PK\x03\x04\x14\0rest", "a ZIP archive or an office document"),
    ("a.txt.gz", gzip.compress(b"some text", mtime=0), "a gzip archive"),
    ("a.png", b"\x89PNG\r\n\x1a\n", "an image"),
    ("a.out", b"\x7fELF\x02\x01", "a program"),
    ("a.txt", b"MZ\x90\0\x03", "binary data"),
]


@pytest.mark.parametrize(("name", "content", "what"), NO_TEXT)
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_file_without_text_is_refused_by_name(tmp_path: Path, name: str, content: bytes, what: str, encoding: str) -> None:
    """An archive decoded as latin-1 and learnt, or an advice to convert it with iconv."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"not text but {what}") as caught:
        texts(tmp_path / name, encoding=encoding)
    assert (
        caught.value.file == tmp_path / name
        and ".jsonl.gz" in str(caught.value.expected)
        and ".pdf" in str(caught.value.expected)
    )


def test_files_without_text_among_others_are_counted(tmp_path: Path) -> None:
    """A corpus that stops at one picture among its thousand files, or that loses it without a word."""
    for name, content, _ in NO_TEXT:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "b.log").write_text("text under another ending")
    (tmp_path / "wide.txt").write_bytes("wide".encode("utf-16"))
    report = Rejections()
    assert [d.text for d in read(str(tmp_path), ReadOptions(), report)] == ["wide"]
    assert report.reasons == {"unknown file type": 5, "not text but binary data": 1}
    report = Rejections()
    assert not list(read(f"{tmp_path}/*.zip", ReadOptions(), report))
    assert report.reasons == {"not text but a ZIP archive or an office document": 1}
    assert texts(tmp_path / "b.log") == ["text under another ending"]


def test_unknown_encoding_is_a_config_error() -> None:
    """Python's LookupError names no setting."""
    with pytest.raises(ConfigError, match="encoding"):
        ReadOptions(encoding="utf8000")


def test_a_broken_json_line_names_its_place(tmp_path: Path) -> None:
    """A traceback from json.loads names neither file nor line."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": bad}\n')
    with pytest.raises(DataError) as caught:
        texts(path)
    assert f"{path}:2: not valid JSON" in str(caught.value) and "column 10" in str(caught.value)


def test_skipping_broken_rows_counts_them_and_has_a_limit(tmp_path: Path) -> None:
    """A skip policy without a limit turns a file of the wrong format into an empty data set that trains 'well'."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join('{"text": "row"}\n' if i % 25 else "oops\n" for i in range(100)))
    report = Rejections(tmp_path / "rejected.jsonl", on_error="skip")
    assert len(list(read(str(path), ReadOptions(), report))) == 96
    report.check()
    report.close()
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [r["line"] for r in rejected] == [1, 26, 51, 76] and rejected[0]["excerpt"] == "oops"
    strict = Rejections(None, on_error="skip", max_share=0.01)
    list(read(str(path), ReadOptions(), strict))
    with pytest.raises(DataError, match="4 of 100 rows are unreadable"):
        strict.check()


def test_a_missing_text_field_lists_the_ones_there(tmp_path: Path) -> None:
    """`KeyError: 'text'` is the field's most common first message."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x", "id": 3}\n')
    with pytest.raises(DataError) as caught:
        texts(path)
    assert "text fields: body" in str(caught.value) and "text_field" in str(caught.value)
    assert texts(path, text_field="body") == ["x"]


def test_tables_of_every_format_give_the_same_rows(tmp_path: Path) -> None:
    """A reader that renames, reorders or retypes fields makes the format matter."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "eins, zwei", "note": 'he said "x"'}, {"text": "line\nbreak", "note": "ü"}]
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    (tmp_path / "d.csv").write_text('text,note\n"eins, zwei","he said ""x"""\n"line\nbreak",ü\n', newline="")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    for path in files_of(str(tmp_path)):
        assert texts(path) == [r["text"] for r in rows], path
        found = [r.fields for r in read(str(path), ReadOptions(kind="conversations")) if isinstance(r, Row)]
        assert found == rows, path


def test_a_cut_gzip_file_is_named(tmp_path: Path) -> None:
    """An interrupted download must not pass for a short data set."""
    whole = gzip.compress(b'{"text": "row"}\n' * 5000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: broken gzip file"):
        texts(tmp_path / "a.jsonl.gz")


def test_html_gives_the_text_and_not_the_navigation(tmp_path: Path) -> None:
    """Menus and scripts in the text are what a model then writes."""
    pytest.importorskip("trafilatura")
    body = "".join(f"<p>This is paragraph {i} of the article, and it is long enough to be taken for text.</p>" for i in range(5))
    page = "<html><head><meta charset='latin-1'><script>var hidden=1</script></head><body><nav>Home Shop</nav>"
    (tmp_path / "a.html").write_bytes(f"{page}<article><h1>Zürich</h1>{body}</article></body></html>".encode("latin-1"))
    (text,) = texts(tmp_path / "a.html")
    assert "paragraph 4" in text and "Zürich" in text and "hidden" not in text and "Shop" not in text


def test_pdf_text_of_all_pages(tmp_path: Path) -> None:
    """A reader that stops at the first page, or glues pages together, loses text silently."""
    pytest.importorskip("pypdfium2")
    canvas = pytest.importorskip("reportlab.pdfgen.canvas")
    page = canvas.Canvas(str(tmp_path / "a.pdf"))
    for number in (1, 2):
        page.drawString(72, 700, f"Words of page {number}.")
        page.showPage()
    page.save()
    assert texts(tmp_path / "a.pdf") == ["Words of page 1.\n\nWords of page 2."]
    (tmp_path / "b.pdf").write_bytes(b"%PDF-1.4 not really")
    with pytest.raises(DataError, match="not a readable PDF"):
        texts(tmp_path / "b.pdf")


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ImportError tells nobody what to install."""
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(MissingExtra, match=r"tutelage\[data\]"):
        texts(tmp_path / "a.pdf")


def test_folders_are_read_in_order_and_unknown_files_are_reported(tmp_path: Path) -> None:
    """Files that vanish without a word are the field's quietest data loss."""
    for name in ("b.txt", "sub/a.md", ".hidden/c.txt", "a.txt", "image.png", ".secret.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    report = Rejections()
    found = [d.text for d in read(str(tmp_path), ReadOptions(), report)]  # type: ignore[union-attr]
    assert found == ["a.txt", "b.txt", "sub/a.md"] and report.unknown_suffixes == {".png": 1}
    assert report.reasons["unknown file type"] == 1


def test_globs_and_named_files(tmp_path: Path) -> None:
    """A file named by hand is wanted, whatever its ending."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.log").write_text("log")
    (tmp_path / "b.log").write_text("other")
    assert texts(f"{tmp_path}/**/*.log") == ["other", "log"]
    assert texts(tmp_path / "b.log") == ["other"]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    """A path with a typing error must not train on nothing."""
    (tmp_path / "texts.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no such file or folder(?s:.*)texts\.jsonl"):
        texts(tmp_path / "text.jsonl")
    with pytest.raises(DataError, match="no file matches"):
        texts(f"{tmp_path}/*.pdf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        texts(tmp_path / "empty")


def test_the_hub_is_reached_only_through_datasets_and_errors_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the library raises one of five unrelated exceptions."""
    asked: list[object] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, config, split, streaming))
        if name == "o/offline":
            raise ConnectionError("no route to host")
        return [{"text": "row"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert texts("hf:o/n") == texts("hf:o/n:test") == texts("hf:o/n:en") == texts("hf:o/n:en:test") == ["row"]
    assert asked == [
        ("o/n", None, "train", True),
        ("o/n", None, "test", True),
        ("o/n", "en", "train", True),
        ("o/n", "en", "test", True),
    ]
    with pytest.raises(DataError, match=r"cannot read this data set(?s:.*)huggingface\.co"):
        texts("hf:o/offline")


def test_the_digest_follows_content_not_place(tmp_path: Path) -> None:
    """A digest of names or times reruns what is unchanged, or worse, keeps what has changed."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in ("a", "b"):
        (tmp_path / folder / "x.txt").write_text("same")
    before = source_digest([str(tmp_path / "a")])
    assert before == source_digest([str(tmp_path / "b")])
    (tmp_path / "a" / "x.txt").write_text("else")
    assert before != source_digest([str(tmp_path / "a")])
    assert source_digest(["skill:add?count=1"]) != source_digest(["skill:add?count=2"])
