"""The input of `generate` and `label`: rows of a file in order, one at a time, each with its place, broken ones too."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tutelage import log
from tutelage.data.sources import encodings
from tutelage.data.sources.readers import READERS, TABLES, suffix_of
from tutelage.data.sources.readers_base import ReadOptions, Rejections, Row, decode
from tutelage.data.sources.readers_files import read_jsonl, read_text, too_long_a_line
from tutelage.errors import DataError
from tutelage.files import file_digest, whole_file

STDIN = "-"
LINE = re.compile(rb"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+")


@dataclass(slots=True, frozen=True)
class InputRow:
    """One row of an archive.

    Example:
        Entry(index=0, line=1, fields={"prompt": "Once upon a time"})
    """

    index: int  # from 0, in the order of the archive; blank lines are no rows
    line: int  # from 1; the number of the row where the format has no lines
    fields: dict[str, Any]
    error: DataError | None = None  # set where the row cannot be read; `fields` is empty then


@dataclass(slots=True)
class _Broken(Rejections):
    """Rows that a reader could not read, until they are handed on."""

    waiting: list[DataError] = field(default_factory=list)

    def broken(self, error: DataError, *, source: str, excerpt: str = "") -> None:
        self.waiting.append(error)


class InputFile:
    """A file of rows. Raises `DataError` where there is none, or one that holds no rows.

    key: the field that a line of plain text becomes. blank_lines: they are rows of plain text too.
    """

    def __init__(self, path: Path, key: str = "prompt", *, blank_lines: bool = False) -> None:
        self.path, self.key, self.blank_lines = path, key, blank_lines
        self._read = False  # whether a pass was begun: what readers change is said once
        if not path.is_file():
            raise DataError("no such file", file=path, fix="check the path, or give - for standard input")
        if not os.access(path, os.R_OK):
            raise DataError("no permission to read this file", file=path, fix="chmod +r it")
        self.reader = READERS.get(suffix_of(path))
        if path.suffix == ".stdin" and _first_byte(path) == b"{":
            self.reader = read_jsonl
        if self.reader not in (*TABLES, read_text, None):
            raise DataError(
                f"{key}s are not read from such a file", file=path, expected=f"JSONL, JSON, CSV, Parquet, or a {key} a line"
            )

    def digest(self) -> str:
        return file_digest(self.path)

    def entries(self) -> Iterator[InputRow]:
        """Every row, in order; one pass through the file."""
        report = _Broken()
        index = 0
        first, self._read = not self._read, True
        for row in self._rows(report):
            while report.waiting:
                yield _unreadable(index, report.waiting.pop(0))
                index += 1
            yield InputRow(index, row.line, row.fields)
            index += 1
        for error in report.waiting:
            yield _unreadable(index, error)
            index += 1
        for what, count in report.notes.most_common() if first else ():
            log.say(f"{count:,} {what}")

    def _rows(self, report: Rejections) -> Iterator[Row]:
        if self.reader is None or self.reader is read_text:
            yield from self._lines(report)
            return
        for item in self.reader(self.path, ReadOptions(kind="conversations"), report):
            assert isinstance(item, Row)
            yield item

    def _lines(self, report: Rejections) -> Iterator[Row]:
        """Plain text, a row a line."""
        offset = 0
        with self.path.open("rb") as f:
            rows, encoding = encodings.lines(f, "utf-8")
            for number, (data, whole) in enumerate(_short_lines(rows), 1):
                start, offset = offset, offset + len(data)
                if whole and data.isspace() and not self.blank_lines:
                    continue
                source = f"{self.path}#{number}"
                try:
                    if not whole:
                        raise too_long_a_line(self.path, number, data[:80].decode("utf-8", "replace"))
                    text = decode(data, str(self.path), encoding, line=number, offset=start)
                except DataError as error:
                    report.broken(error, source=source)
                    continue
                yield Row({self.key: text.rstrip("\r\n")}, source, str(self.path), number)


def _short_lines(rows: Iterator[tuple[bytes, bool]]) -> Iterator[tuple[bytes, bool]]:
    """Lines with their ends: \\n, \\r\\n or \\r."""
    for data, whole in rows:
        yield from ((line, True) for line in LINE.findall(data)) if whole else ((data, False),)


def _unreadable(index: int, error: DataError) -> InputRow:
    return InputRow(index, error.line or 0, {}, error)


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as f:
        return f.read(4096).lstrip()[:1]


@contextlib.contextmanager
def opened(source: str, output: Path, key: str = "prompt", *, blank_lines: bool = False) -> Iterator[InputFile]:
    """The archive at `source`. Standard input, which is read more than once, is copied beside the output."""
    if source != STDIN:
        yield InputFile(Path(source).expanduser(), key, blank_lines=blank_lines)
        return
    copy = output.with_name(f"{output.name}.stdin")
    try:
        with whole_file(copy, "wb", "--output") as f:
            shutil.copyfileobj(sys.stdin.buffer, f)
        yield InputFile(copy, key, blank_lines=blank_lines)
    finally:
        copy.unlink(missing_ok=True)
