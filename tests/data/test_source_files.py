"""Files of a folder: one that is broken, forbidden or no file at all is counted, and stops nothing where the user says so."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tutelage.data.clean.collect import collect
from tutelage.data.sources.readers import ReadOptions, Rejections, files_of, read, source_digest
from tutelage.errors import ConfigError, DataError
from tutelage.inference.input_file import InputFile
from tutelage.records import Document

GOOD = 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for i in range(GOOD):
        (tmp_path / "texts" / f"t{i:02}.txt").write_text(f"Text number {i} is about {i} apples and {i * 10} pears in a basket.")
    return tmp_path / "texts"


def taken(folder: Path | str, **options: object) -> tuple[int, Rejections]:
    report = Rejections(on_error="skip")
    found = [d for d in read(str(folder), ReadOptions(**options), report) if isinstance(d, Document)]  # type: ignore[arg-type]
    return len(found), report


def _flipped() -> bytes:
    data = bytearray(gzip.compress("".join(f'{{"text": "row {i} of {i * 7}"}}\n' for i in range(500)).encode()))
    data[len(data) // 2] ^= 0x55
    return bytes(data)


BROKEN = {
    "latin.txt": "café, for the whole day".encode("latin-1"), "a.pdf": b"%PDF-1.4\nnot really", "b.jsonl.gz": _flipped(),
    "c.json": b'[{"text": 1}', "d.csv": b"text\n\xff\xfe\xfd\n", "e.html": b"<meta charset=utf-8><p>caf\xe9</p>",
    "f.json": b"[" * 100_000, "g.json": b'[{"text": ' + b"1" * 5000 + b"}]",
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_counts_as_a_row(folder: Path, tmp_path: Path, name: str) -> None:
    """One file of another encoding, or one damaged download, stopped a folder even with on_error=skip."""
    (folder / name).write_bytes(BROKEN[name])
    with pytest.raises(DataError) as caught:
        list(read(str(folder)))
    assert caught.value.file == folder / name and "on_error=skip" in str(caught.value.fix)
    out = tmp_path / "out"
    out.mkdir()
    card = collect([str(folder)], out, on_error="skip", validation_share=0, dedup="none")
    assert card["records"] == GOOD and card["offered"] == GOOD + 1 and sum(card["rejected"].values()) == 1
    (row,) = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    assert row["file"] == str(folder / name) and row["reason"].startswith("unreadable: ")


def test_too_many_broken_files_stop(folder: Path, tmp_path: Path) -> None:
    """Files that are skipped without a limit: a folder of the wrong encoding gives a few records that train 'well'."""
    for i in range(5):
        (folder / f"bad{i}.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"5 of 35 rows are unreadable(?s:.*)bad0\.txt(?s:.*)max_reject_share=0\.15"):
        collect([str(folder)], tmp_path, on_error="skip", validation_share=0)


def test_one_broken_file_of_a_few_may_be_left_out(tmp_path: Path) -> None:
    """A share of three files means nothing: on_error=skip did not help in a small folder."""
    for name, data in (("a.txt", b"One text."), ("b.txt", b"caf\xe9"), ("c.txt", b"Another text.")):
        (tmp_path / name).write_bytes(data)
    for share, allowed in ((0.05, True), (0.0, False)):
        report = Rejections(on_error="skip", max_share=share)
        assert len(list(read(str(tmp_path), report=report))) == 2
        with contextlib.nullcontext() if allowed else pytest.raises(DataError, match="1 of 3 rows"):
            report.check()


def test_damaged_rows_of_a_gzip_file_are_not_learnt(tmp_path: Path) -> None:
    """Inflating damaged data gives rows of other words long before the checksum at the end is reached."""
    (tmp_path / "b.jsonl.gz").write_bytes(_flipped())
    count, report = taken(tmp_path)
    assert count == 0 and report.errors == report.seen == 1 and next(iter(report.reasons)).startswith("unreadable: broken gzip")


@pytest.mark.parametrize("depth", [150, 100_000])
def test_a_row_without_end_of_nesting_is_one_row(tmp_path: Path, depth: int) -> None:
    """RecursionError, with on_error=skip too, from Python's reader of JSON, or later from its writer."""
    deep = '{"text": "a", "more": ' + "[" * depth + "]" * depth + "}"
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n{deep}\n{{"text": "two"}}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: nested more than"):
        list(read(str(tmp_path / "a.jsonl")))
    count, report = taken(tmp_path / "a.jsonl")
    assert count == 2 and report.errors == 1


def test_links_and_pipes_are_counted(folder: Path) -> None:
    """A link whose target is gone is lost data; a pipe or a loop must not be opened or followed."""
    before = source_digest([str(folder)])
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "self.txt").symlink_to("self.txt")
    (folder / "loop").symlink_to(".")
    os.mkfifo(folder / "pipe.txt")
    count, report = taken(folder)
    assert count == GOOD == len(files_of(str(folder))) and source_digest([str(folder)]) == before
    assert report.reasons == {
        "a link that leads nowhere": 2, "a link to a folder: name that folder too if it is wanted": 1,
        "a pipe, a socket or a device": 1,
    }  # fmt: skip
    count, report = taken(f"{folder}/**/*.txt")
    assert count == GOOD and report.reasons == {"a link that leads nowhere": 2, "a pipe, a socket or a device": 1}
    for name, what in (("pipe.txt", "a pipe"), ("gone.txt", "a link that leads nowhere")):
        with pytest.raises(DataError, match=f"not a file but {what}"):
            files_of(str(folder / name))


def test_names_of_any_bytes(folder: Path, tmp_path: Path) -> None:
    """A traceback for a name that is not UTF-8; a name that colours the terminal, or forges a line of an error."""
    name = os.fsdecode(b"caf\xe9\x1b[31m\nerror: forged.txt")
    (folder / name).write_bytes(b"Another text, about nothing but words in a row.")
    out = tmp_path / "out"
    out.mkdir()
    assert collect([str(folder)], out, validation_share=0, dedup="none")["records"] == GOOD + 1
    sources = [json.loads(line)["source"] for line in (out / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any("caf\\xe9" in source for source in sources)
    (folder / name).write_bytes(b"\xff")
    with pytest.raises(DataError) as caught:
        list(read(str(folder)))
    first = str(caught.value).splitlines()[0]
    assert first.endswith("caf\\xe9\\x1b[31m\\nerror: forged.txt:1: not utf-8 text") and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("source", ["", "  "])
def test_an_empty_name_is_not_the_working_folder(source: str) -> None:
    """`--sources "$UNSET"` read everything below the folder that the user stood in."""
    with pytest.raises(ConfigError, match="an empty name of a source"):
        files_of(source)


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder, entered as a user to whom things can be forbidden."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o777)
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    yield root
    if was == 0:
        os.seteuid(was)
    for path in root.rglob("*"):
        path.chmod(0o700)
    shutil.rmtree(root)


def test_what_is_forbidden_is_said_and_counted(nobody: Path) -> None:
    """A traceback for a file without permission, and a sub-folder without it that was left out silently."""
    for name in ("a.txt", "b.txt", "sub/c.txt"):
        (nobody / name).parent.mkdir(exist_ok=True)
        (nobody / name).write_text(f"Text of {name}")
    (nobody / "a.txt").chmod(0)
    (nobody / "sub").chmod(0)
    source_digest([str(nobody)])
    for source in (nobody, f"{nobody}/**/*.txt"):
        count, report = taken(source)
        assert count == 1 and report.errors == 2 and report.reasons.keys() == {
            "unreadable: no permission to read this file", "unreadable: a folder that cannot be listed (Permission denied)",
        }  # fmt: skip
        with pytest.raises(DataError, match=r"no permission|cannot be listed"):
            list(read(str(source)))
    for name in ("sub", "sub/c.txt"):
        with pytest.raises(DataError, match="Permission denied"):
            files_of(str(nobody / name))


def test_mail_and_office_documents_are_no_text(tmp_path: Path) -> None:
    """A mailbox was one plain text of headers and encoded parts, without a word."""
    mail = "From ada@example.org Mon Jan  5 10:00:00 2026\nSubject: Hello\n\nSGVsbG8=\n"
    for name in ("a.mbox", "b.eml", "c.txt"):
        (tmp_path / name).write_text(mail)
        with pytest.raises(DataError, match="not text but mail"):
            list(read(str(tmp_path / name)))
    (tmp_path / "d.txt").write_text("From Monday on it rains.\nThat is all: nothing else happened.")
    count, report = taken(tmp_path)
    assert count == 1 and sum(report.reasons.values()) == 3
    (tmp_path / "e.csv").write_bytes(b"PK\x03\x04 a sheet")
    with pytest.raises(DataError, match="not text but a ZIP archive or an office document"):
        list(read(str(tmp_path / "e.csv")))


def test_rows_to_answer_are_read_alike(tmp_path: Path) -> None:
    """`generate` and `label` ended in a traceback at a row that nests without end, and cut lines of wide characters in two."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n{"prompt": ' + "[" * 100_000 + '\n{"prompt": "two"}\n')
    first, deep, last = InputFile(tmp_path / "a.jsonl").entries()
    assert (first.fields, last.fields) == ({"prompt": "one"}, {"prompt": "two"}) and "nested" in str(deep.error)
    (tmp_path / "b.txt").write_text("Zürich\n\u0a0a\n", encoding="utf-16")
    assert [entry.fields["prompt"] for entry in InputFile(tmp_path / "b.txt").entries()] == ["Zürich", "\u0a0a"]
    (tmp_path / "c.jsonl.gz").write_bytes(_flipped())
    with pytest.raises(DataError, match="broken gzip"):
        list(InputFile(tmp_path / "c.jsonl.gz").entries())
