"""Rows of CSV (RFC 4180, strict) and TSV (no quoting at all: https://www.iana.org/assignments/media-types/text/tab-separated-values)."""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tutelage.data.sources.readers_base import Rejections
from tutelage.data.sources.text_lines import lines, without_end
from tutelage.errors import DataError

Cells = tuple[int, list[str]]  # the line on which a row begins, from 1, and its cells
QUOTED = re.compile(r'"[^"]*""(?:[^"]|"")*"')  # a cell as CSV quotes it: marks inside are doubled


def rows(text: str, path: Path, report: Rejections) -> Iterator[tuple[int, dict[str, str | None]]]:
    """(line, row) of a table under a header line. A row that does not fit goes to `report`.

    Columns without a name (pandas' index, a comma at the end of Excel's header) are left out and counted. Raises `DataError`
    for a file whose header names a column twice.
    """
    tabs = path.suffix.lower() == ".tsv"
    found = _tabbed(text, path, report) if tabs else _quoted(text, path, report)
    line, names = next(found, (1, []))
    _check_names(names, path, line)
    for line, cells in found:
        report.seen += 1
        extra = any(cells[len(names) :])
        if extra or (tabs and len(cells) < len(names)):
            report.broken(_uneven(cells, names, path, line, tabs), source=f"{path}#{line}", excerpt=str(cells))
            continue
        fields: dict[str, str | None] = dict.fromkeys(name for name in names if name.strip())
        for name, cell in zip(names, cells, strict=False):
            if name.strip():
                fields[name] = cell
            elif cell.strip():
                report.note("cells under no column name left out")
        yield line, fields


def _check_names(names: list[str], path: Path, line: int) -> None:
    twice = [name for name, n in Counter(names).items() if n > 1 and name.strip()]
    if twice:
        raise DataError(
            "two columns have one name", file=path, line=line, field=twice[0], found=", ".join(names),
            expected="a name for each column", fix="rename or remove one of them",
        )  # fmt: skip


def _uneven(cells: list[str], names: list[str], path: Path, line: int, tabs: bool) -> DataError:
    more = len(cells) > len(names)
    fix = "write a tab or a line break inside a cell as a space, or save the table as CSV" if tabs else "quote cells with commas"
    return DataError(
        f"a row with {'more' if more else 'fewer'} fields than the header", file=path, line=line,
        found=f"{len(cells)} fields: {cells}", expected=f"{len(names)} fields, as in the header", fix=fix,
    )  # fmt: skip


def _tabbed(text: str, path: Path, report: Rejections) -> Iterator[Cells]:
    """Cells are what stands between tabs, quotation marks included."""
    for number, line in enumerate(lines(text), 1):
        bare = without_end(line)
        if not bare:
            continue
        cells = bare.split("\t")
        for cell in cells:
            if QUOTED.fullmatch(cell):
                report.note("cells of a .tsv that are quoted as in CSV: read with their quotation marks")
        yield number, cells


def _quoted(text: str, path: Path, report: Rejections) -> Iterator[Cells]:
    """Cells by RFC 4180. Where a quotation mark does not end as it should, the row that it is in is broken, and reading goes on
    with the line behind the one on which it opened."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    every = list(lines(text))
    at = 0
    while at < len(every):
        start = at
        reader = csv.reader(_from(every, at), strict=True)
        try:
            for cells in reader:
                number, at = at + 1, start + reader.line_num
                if cells:
                    yield number, cells
        except csv.Error as error:
            opened = at + _opening("".join(every[at : start + reader.line_num]))
            report.seen += 1
            wrong = DataError(
                f"a quotation mark that opens a cell is not closed as it should be ({error})", file=path, line=opened + 1,
                found=without_end(every[opened]), expected='marks inside a quoted cell doubled, and one at its end: "say ""hi"""',
                fix="close it, or quote the cell and double its marks; a table without quoting is a .tsv",
            )  # fmt: skip
            if opened == 0:
                raise wrong from error  # without the header no row can be read
            report.broken(wrong, source=f"{path}#{opened + 1}", excerpt=every[opened])
            at = opened + 1


def _from(every: list[str], at: int) -> Iterator[str]:
    for i in range(at, len(every)):
        yield every[i]


def _opening(record: str) -> int:
    """On which line of a broken record, from 0, its last quoted cell opens."""
    at = opened = 0
    while at < len(record):
        if record[at] == '"':
            opened = at
            end = at + 1
            while (end := record.find('"', end)) >= 0 and record[end + 1 : end + 2] == '"':
                end += 2
            if end < 0 or record[end + 1 : end + 2] not in (",", "\r", "\n"):
                break
            at = end + 1
        stop = re.compile(r"[,\r\n]").search(record, at)
        if stop is None:
            break
        at = stop.end()
    return len(list(lines(record[:opened]))) - (0 if record[:opened].endswith(("\n", "\r")) or not opened else 1)
