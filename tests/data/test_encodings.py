"""Bytes of files of all encodings: read as they are, or refused with the encoding that they may have."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from tutelage.data.sources import encodings
from tutelage.data.sources.readers import ReadOptions, Rejections, read
from tutelage.errors import ConfigError, DataError
from tutelage.records import Document

SIGN = "The sign said “We don’t sell – ask” for 20 € at Škoda … away."
ROWS = "".join(f'{{"text": "Zürich, row {i}"}}\n' for i in range(3))


def texts(source: Path, report: Rejections | None = None, **options: str) -> list[str]:
    return [d.text for d in read(str(source), ReadOptions(**options), report) if isinstance(d, Document)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (SIGN, "cp1252"),
        ("Это русский текст, который записан в старой кодировке, и его надо прочитать.", "cp1251"),
        ("これは日本語の文章です。東京は日本の首都で、とても大きな都市です。", "cp932"),
    ],
)
def test_the_advice_names_an_encoding_that_reads_the_file(tmp_path: Path, text: str, encoding: str) -> None:
    """The advice was latin-1 for every file, which deletes quotation marks, dashes and the euro sign."""
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(DataError) as caught:
        texts(path)
    assert f"encoding={encoding}" in str(caught.value.fix) and text[:8] in str(caught.value.fix)
    assert texts(path, encoding=encoding) == [text]


def test_latin_1_is_not_what_windows_writes(tmp_path: Path) -> None:
    """Control characters for quotation marks, which the filters then removed without a word."""
    (tmp_path / "a.txt").write_bytes(SIGN.encode("cp1252"))
    with pytest.raises(DataError, match=r"not latin-1 text(?s:.*)encoding=cp1252"):
        texts(tmp_path / "a.txt", encoding="latin-1")
    (tmp_path / "b.txt").write_bytes("Zürich".encode("latin-1"))
    assert texts(tmp_path / "b.txt", encoding="latin-1") == ["Zürich"]


def test_each_file_of_a_folder_is_read_by_the_first_encoding_that_fits_it(tmp_path: Path) -> None:
    """One file of another encoding stopped a folder, and one encoding for all of them spoiled the others."""
    (tmp_path / "a.txt").write_text("Zürich “a”", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(SIGN.encode("cp1252"))
    (tmp_path / "c.jsonl").write_bytes(ROWS.encode("cp1252"))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(ROWS.encode("cp1252")))
    (tmp_path / "e.csv").write_bytes("text\nZürich\n".encode("cp1252"))
    report = Rejections()
    rows = [f"Zürich, row {i}" for i in range(3)]
    assert texts(tmp_path, report, encoding="utf-8,cp1252") == ["Zürich “a”", SIGN, *rows, *rows, "Zürich"]
    assert report.other_encodings == {"cp1252": 4}
    assert texts(tmp_path / "b.txt", encoding="utf-8, latin-1, cp1252") == [SIGN]  # nor does latin-1 fit it


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_rows_of_wide_characters(tmp_path: Path, encoding: str, name: str) -> None:
    """ "not utf-16 text, expected utf-16": lines were cut in the middle of a character. U+0A0A and U+0D0A hold the byte of a line
    feed."""
    mark = "\ufeff" if encoding[-2:] in ("le", "be") else ""
    data = (mark + ROWS + '{"text": "\u0a0a\u0d0a"}').encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert texts(tmp_path / name) == [f"Zürich, row {i}" for i in range(3)] + ["\u0a0a\u0d0a"]
    data = ROWS.encode("utf-16-le")
    (tmp_path / "b.jsonl").write_bytes(data)
    assert len(texts(tmp_path / "b.jsonl", encoding="utf-16-le")) == 3
    (tmp_path / "cut.jsonl").write_bytes("\ufeff".encode("utf-16-le") + data[:-1])
    with pytest.raises(DataError, match=r"cut\.jsonl:\d: not utf-16 text"):
        texts(tmp_path / "cut.jsonl")


@pytest.mark.parametrize(
    "name", ["undefined", "idna", "punycode", "unicode_escape", "rot13", "a\0b", "", "utf-8,nope", "nope,utf-8"]
)
def test_what_is_no_encoding_of_text_is_a_config_error(name: str) -> None:
    """`undefined` and `idna` are names that Python knows, and tracebacks once a file is read."""
    with pytest.raises(ConfigError, match="unknown encoding"):
        ReadOptions(encoding=name)


@pytest.mark.parametrize("charset", ["undefined", "idna", "punycode", "base64", "utf-16", "klingon"])
def test_a_page_that_declares_a_strange_charset_is_read_by_the_setting(tmp_path: Path, charset: str) -> None:
    """A traceback for the declaration of one page."""
    pytest.importorskip("trafilatura")
    page = f"<html><head><meta charset={charset}></head><body><p>Zürich lies on a lake, and in a valley.</p></body></html>"
    (tmp_path / "a.html").write_text(page, encoding="utf-8")
    assert texts(tmp_path / "a.html") == ["Zürich lies on a lake, and in a valley."]


def test_pages_declare_what_browsers_read(tmp_path: Path) -> None:
    """ISO-8859-1 in a page means Windows' code page: quotation marks were control characters. A page that declares a wrong
    charset led back to the same error, whatever `encoding` was."""
    pytest.importorskip("trafilatura")
    body = f"<html><body><p>{SIGN}</p></body></html>"
    (tmp_path / "a.html").write_bytes(f"<meta charset=iso-8859-1>{body}".encode("cp1252"))
    (tmp_path / "b.xhtml").write_bytes(f'<?xml version="1.0" encoding="windows-1252"?>{body}'.encode("cp1252"))
    assert texts(tmp_path / "a.html") == texts(tmp_path / "b.xhtml") == [SIGN]
    (tmp_path / "c.html").write_bytes(f"<meta charset=utf-8>{body}".encode("cp1252"))
    with pytest.raises(DataError, match="encoding=cp1252"):
        texts(tmp_path / "c.html")
    assert texts(tmp_path / "c.html", encoding="cp1252") == [SIGN]


def test_a_line_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small .gz of one line of spaces took a gigabyte of memory, and was "empty"."""
    monkeypatch.setattr(encodings, "LINE_BYTES", 1 << 10)
    lines = b'{"text": "one"}\n' + b" " * 5000 + b'\n{"text": "' + b"x" * 5000 + b'"}\n{"text": "two"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    report = Rejections(on_error="skip")
    assert texts(tmp_path / "a.jsonl.gz", report) == ["one", "two"] and report.errors == 2 and report.seen == 4
