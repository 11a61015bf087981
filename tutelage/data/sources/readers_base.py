"""What every reader shares: its options, the row it yields, and the account of what was left out."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tutelage.data.sources.encodings import BOMS, decode, listed, marked
from tutelage.data.sources.text_lines import lines
from tutelage.errors import ConfigError, DataError, Setting, with_settings
from tutelage.unicode import printable

__all__ = ["BOMS", "ReadOptions", "Rejections", "Row", "TooManyBroken", "chunks", "decode", "not_text", "pieces"]

SKIP_FILE = f"or leave such files out with {Setting('on_error', 'skip')}"
SKIP = f"or leave such rows out with {Setting('on_error', 'skip')}"

SPLITS = ("none", "blank_lines", "form_feed", "lines")
EXCERPT_CHARS = 200
HEAD_BYTES = 8192
# First bytes that no text has
MARKS = (
    (b"PK\x03\x04", "a ZIP archive or an office document"), (b"\x1f\x8b", "a gzip archive"), (b"BZh91AY&SY", "a bzip2 archive"),
    (b"\xfd7zXZ\0", "an xz archive"), (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"), (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"), (b"\x89PNG\r\n", "an image"), (b"\xff\xd8\xff", "an image"),
    (b"GIF87a", "an image"), (b"GIF89a", "an image"), (b"\x7fELF", "a program"), (b"%PDF-", "a PDF under another name"),
    (b"{\\rtf", "a Rich Text document"), (b"%!PS", "a PostScript document"),
    (b"SQLite format 3\0", "a database"), (b"\xd0\xcf\x11\xe0", "an old office document"),
)  # fmt: skip
MAIL = re.compile(rb"From \S+ [^\n]*\d{4}\r?\n[\w-]+: ")  # how a mailbox begins
MAIL_SUFFIXES = {".mbox", ".mbx", ".eml", ".mht", ".mhtml"}


@dataclass(slots=True, frozen=True, kw_only=True)
class ReadOptions:
    """How sources are read. Raises `ConfigError` for a value that means nothing."""

    kind: str = "documents"  # what the caller wants, a kind of `config.stages.Data`
    text_field: str = "text"  # field of a JSON, CSV or Parquet row that holds the text
    encoding: str = "utf-8"  # of text files, or several that are tried in order; a byte-order mark in the file wins
    split: str = "none"  # none | blank_lines | form_feed | lines: where one text file becomes several documents
    chunk_chars: int | None = None  # documents longer than this are cut, at paragraph borders where there are any
    fields: dict[str, str] = field(default_factory=dict)  # conversations: {"prompt": field name, "completion": field name}
    format: str = "auto"  # conversations: a format of data/sources/conversations.py; auto looks at each row
    seed: int = 0  # of generated sources that name no seed of their own

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError("unknown way to split text files", field="split", found=self.split, expected=" | ".join(SPLITS))
        if self.chunk_chars is not None and self.chunk_chars < 100:
            raise ConfigError("pieces too short to learn from", field="chunk_chars", found=self.chunk_chars, expected=">= 100")
        listed(self.encoding)


class TooManyBroken(DataError):
    """More was unreadable than `on_error="skip"` allows: the end of the reading, not of one file."""


@dataclass(slots=True, frozen=True)
class Row:
    """One object of a JSON, CSV or Parquet file, not yet a record."""

    fields: dict[str, Any]
    source: str  # file#line
    file: str
    line: int  # from 1; the number of the row where a format has no lines


@dataclass(slots=True)
class Rejections:
    """What was left out and why: counted, and written to rejected.jsonl as it happens.

    `broken` applies the policy for rows that cannot be read: `stop` raises at the first one, `skip` goes on
    until they are more than `max_share` of all rows.
    """

    path: Path | None = None  # rejected.jsonl; None keeps only the counts
    on_error: str = "stop"  # stop | skip
    max_share: float = 0.05
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # by reason, the place of the first that was left out for it
    unknown_suffixes: Counter[str] = field(default_factory=Counter)  # of files in folders that no reader knows
    notes: Counter[str] = field(default_factory=Counter)  # what readers changed or left out inside of rows
    other_encodings: Counter[str] = field(default_factory=Counter)  # of files that the first encoding named does not fit
    seen: int = 0  # rows and documents offered by the readers
    errors: int = 0  # of them not readable
    broken_files: int = 0  # of these whole files
    _file: TextIO | None = None

    def __post_init__(self) -> None:
        if self.on_error not in ("stop", "skip"):
            raise ConfigError("unknown policy", field="on_error", found=self.on_error, expected="stop | skip")
        if self.path is not None:
            self._file = self.path.open("w", encoding="utf-8")

    def add(self, reason: str, *, source: str, file: str | None = None, line: int | None = None, excerpt: str = "") -> None:
        self.reasons[reason] += 1
        self.first.setdefault(reason, source if file is None else f"{file}:{line}" if line else file)
        if self._file is not None:
            source, file = printable(source), None if file is None else printable(file)
            row = {"reason": reason, "source": source, "file": file, "line": line, "excerpt": excerpt[:EXCERPT_CHARS]}
            self._file.write(json.dumps(row, ensure_ascii=True) + "\n")

    def note(self, what: str, count: int = 1) -> None:
        """Counts what a reader changed or left out inside of a row that it gave."""
        if count:
            self.notes[what] += count

    def broken(self, error: DataError, *, source: str, excerpt: str = "") -> None:
        """Raises `error` under `on_error="stop"`; otherwise records it, and raises once too many rows are broken."""
        if self.on_error == "stop":
            if error.fix and "on_error" in error.fix:
                raise error
            raise error.but(fix=f"{with_settings(error.fix) or 'mend the row'}, {SKIP}")
        self.errors += 1
        file = None if error.file is None else str(error.file)
        self.add(f"unreadable: {printable(error.message)}", source=source, file=file, line=error.line, excerpt=excerpt)
        if self.seen >= 1000:
            self.check(error)

    def broken_file(self, error: DataError, path: Path) -> None:
        """`broken` of a whole file, or of what follows the rows read from it: it counts as one row."""
        self.seen += 1
        self.broken_files += 1
        fix = (
            error.fix if error.fix and "on_error" in error.fix else f"{with_settings(error.fix) or 'mend the file'}, {SKIP_FILE}"
        )
        self.broken(error.but(file=path, fix=fix), source=str(path), excerpt=str(error.found or ""))

    def check(self, last: DataError | None = None) -> None:
        """Raises `DataError` when more than `max_share` of the rows seen were unreadable. Of a few files a share says little: one
        may always be broken, unless `max_share` is 0."""
        pardoned = min(self.broken_files, 1) if self.max_share else 0
        if self.errors - pardoned > self.max_share * max(self.seen, 1):
            share = math.ceil(100 * self.errors / max(self.seen, 1)) / 100
            firsts = [f"{reason} ({place})" for reason, place in self.first.items() if reason.startswith("unreadable")]
            raise TooManyBroken(
                f"{self.errors} of {self.seen} rows are unreadable (a file counts as a row), more than "
                f"{Setting('on_error', 'skip')} allows",
                found="; ".join(firsts[:3]) if last is None else last.render(), expected=f"at most {self.max_share:.0%}",
                fix=f"mend the file (run once with {Setting('on_error', 'stop')} to see the first), or allow it "
                f"({Setting('max_reject_share', str(share))})",
            )  # fmt: skip

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def not_text(path: Path, encoding: str) -> str | None:
    """What a file is that holds no text, by its first bytes; None for text. Text has no zero byte, unless its encoding does."""
    with path.open("rb") as f:
        head = f.read(HEAD_BYTES)
    for mark, name in MARKS:
        if head.startswith(mark):
            return name
    if MAIL.match(head) or path.suffix.lower() in MAIL_SUFFIXES:
        return "mail, whose headers and encoded parts are no text"
    wide = marked(head) or any(b"\0" in " ".encode(name.strip()) for name in encoding.split(","))
    return "binary data" if b"\0" in head and not wide else None


def pieces(text: str, options: ReadOptions, *, cut: bool = True) -> Iterator[tuple[int, str]]:
    """(line, text) of the documents inside one text; the line, from 1, is where the piece starts.

    `cut=False` leaves out `options.split` (rows of a table are documents already) and keeps `chunk_chars`.
    """
    line = 1
    if cut and options.split in ("lines", "blank_lines"):
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    for part in _parts(text, options.split if cut else "none"):
        inner = line
        for chunk in chunks(part, options.chunk_chars):
            body = chunk.lstrip("\n\f")
            if body.strip():
                yield inner + chunk.count("\n", 0, len(chunk) - len(body)), body.rstrip("\n\f")
            inner += chunk.count("\n")
        line += part.count("\n")


def _parts(text: str, split: str) -> Iterator[str]:
    """Consecutive parts that join to `text`."""
    if split == "none":
        yield text
    elif split == "lines":
        yield from lines(text)
    elif split == "form_feed":
        start = 0
        while (end := text.find("\f", start)) >= 0:
            yield text[start : end + 1]
            start = end + 1
        yield text[start:]
    else:
        held: list[str] = []
        for row in lines(text):
            if not row.strip() and held:
                yield "".join(held)
                held = []
            held.append(row)
        yield "".join(held)


def chunks(text: str, limit: int | None) -> Iterator[str]:
    """Consecutive chunks of at most `limit` characters that join to `text`.

    The border is the last paragraph end in the second half of a chunk, else the last line end, else the last space.
    """
    start = 0
    while limit is not None and len(text) - start > limit:
        low, high = start + limit // 2, start + limit
        for mark in ("\n\n", "\n", " "):
            at = text.rfind(mark, low, high)
            if at >= 0:
                high = at + len(mark)
                break
        yield text[start:high]
        start = high
    yield text[start:]
