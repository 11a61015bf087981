"""Readers of one file each: text, HTML, PDF, JSON lines, JSON, CSV, Parquet, CoNLL."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tutelage.data.sources import conll, encodings, strict_json, tables
from tutelage.data.sources.columns import Columns, features_of
from tutelage.data.sources.mapping import value_at
from tutelage.data.sources.readers_base import BOMS, ReadOptions, Rejections, Row, decode, pieces
from tutelage.errors import DataError, MissingExtra
from tutelage.records import Document

Item = Document | Row
Reader = Callable[[Path, ReadOptions, Rejections], Iterator[Item]]
BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)
MAX_DEPTH = 100  # levels of lists and objects in a row
TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"


def read_text(path: Path, options: ReadOptions, report: Rejections) -> Iterator[Item]:
    """Plain text and Markdown: one document, or several by `split` and `chunk_chars`."""
    text = decode(path.read_bytes(), str(path), options.encoding)
    if not text.strip():
        yield from _empty(path, report)
    elif options.split == "none" and options.chunk_chars is None:
        yield Document.make(text, source=str(path))
    else:
        for line, piece in pieces(text, options):
            yield Document.make(piece, source=f"{path}#{line}")


def read_html(path: Path, options: ReadOptions, report: Rejections) -> Iterator[Item]:
    """The main text of a page, without navigation, by trafilatura. A `<meta charset>` wins over `encoding`."""
    try:
        from tutelage.data.sources import html_text

        text = html_text.main_text(html_text.decoded(path.read_bytes(), str(path), options.encoding))
    except ImportError as error:
        raise MissingExtra("trafilatura", "data", "reading HTML") from error
    if not text:
        yield from _empty(path, report, "no main text found in this page")
        return
    yield from _whole(text, path, options)


def read_pdf(path: Path, options: ReadOptions, report: Rejections) -> Iterator[Item]:
    """The text layer of a PDF, pages in order, by PDFium. Pages that are pictures have none (OCR gives one): they are named."""
    try:
        import pypdfium2  # noqa: F401
    except ImportError as error:
        raise MissingExtra("pypdfium2", "data", "reading PDF") from error
    from tutelage.data.sources import pdf_text

    pages = pdf_text.read(path)
    if not pages.text.strip():
        yield from _empty(path, report, "no text layer (a scan?): run OCR first, for example ocrmypdf")
        return
    for number in pages.pictures:
        report.add("a page of a PDF without text (a scan? run OCR first, for example ocrmypdf)",
                   source=f"{path}#page={number}", file=str(path), excerpt=f"page {number} of {pages.page_count}")  # fmt: skip
    yield from _whole(pages.text, path, options, pages=pages.page_count)


def read_jsonl(path: Path, options: ReadOptions, report: Rejections) -> Iterator[Item]:
    """One object a line, gzip where the name ends in .gz."""
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    offset = number = 0
    try:
        with opener(path, "rb") as f:
            rows, encoding = encodings.lines(f, options.encoding)
            for number, (data, whole) in enumerate(rows, 1):
                start, offset = offset, offset + len(data)
                if number == 1 and data.startswith(BOMS[0][0]):
                    data = data[3:]
                if whole and data.isspace():
                    continue
                report.seen += 1
                source, shown = f"{path}#{number}", data[:300].decode("utf-8", "replace").strip()
                try:
                    if not whole:
                        raise too_long_a_line(path, number, shown)
                    fields = _json_object(decode(data, str(path), encoding, line=number, offset=start), path, number)
                except DataError as error:
                    report.broken(error, source=source, excerpt=shown)
                    continue
                yield from _item(fields, source, path, number, options, report)
    except BROKEN_GZIP as error:
        found, fix = f"{number:,} lines before that" if number else None, "fetch or write the file again"
        raise DataError(f"broken gzip file ({error})", file=path, found=found, fix=fix) from error
    except UnicodeError as error:  # of an encoding whose lines are text before they are cut
        expected, fix = encodings.marked(path.read_bytes()[:4]) or options.encoding, "fetch or write the file again"
        raise DataError(f"not {expected} text", file=path, line=number + 1, expected=expected, fix=fix) from error


def check_gzip(path: Path) -> None:
    """Reads a gzip file to its end, where its checksum is. Raises `DataError` for one that is cut or damaged."""
    try:
        with gzip.open(path, "rb") as f:
            while f.read(encodings.BLOCK):
                pass
    except BROKEN_GZIP as error:
        raise DataError(f"broken gzip file ({error})", file=path, fix="fetch or write the file again") from error


def too_long_a_line(path: Path, number: int, shown: str) -> DataError:
    message = f"a line of more than {encodings.LINE_BYTES >> 20} MiB"
    return DataError(message, file=path, line=number, found=shown, fix="cut the row into several, one object a line")


def _json_object(text: str, path: Path, number: int) -> dict[str, Any]:
    try:
        value = strict_json.loads(text)
        if _too_deep(value):
            raise RecursionError
    except RecursionError as error:
        raise DataError(TOO_DEEP, file=path, line=number, found=text[:80], fix="flatten the row") from error
    except ValueError as error:
        at = getattr(error, "colno", None)
        place = f" at column {at}" if at else ""
        detail = getattr(error, "msg", str(error))
        fix = "one JSON object a line, in double quotes"
        raise DataError(f"not valid JSON: {detail}{place}", file=path, line=number, found=text.strip(), fix=fix) from error
    if not isinstance(value, dict):
        raise DataError("a row must be a JSON object", file=path, line=number, found=text.strip(), expected='{"field": …}')
    return value


def _too_deep(value: Any) -> bool:
    """Whether a row is nested past `MAX_DEPTH`: how deep Python's own reader and writer of JSON go depends on who calls them."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [x for v in level if isinstance(v, dict | list) for x in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return False
    return True


def read_json(path: Path, options: ReadOptions, report: Rejections) -> Iterator[Item]:
    """A JSON file that holds one array of objects (or one object)."""
    text = decode(path.read_bytes(), str(path), options.encoding)
    if not text.strip():
        yield from _empty(path, report)
        return
    try:
        value = strict_json.loads(text)
    except RecursionError as error:
        raise DataError(TOO_DEEP, file=path, found=text[:80], fix="flatten the rows") from error
    except json.JSONDecodeError as error:
        fix = "if it has one object a line, name it .jsonl" if error.msg == "Extra data" else "mend the file"
        found, message = text[max(error.pos - 40, 0) : error.pos + 40], f"not valid JSON: {error.msg} at column {error.colno}"
        raise DataError(message, file=path, line=error.lineno, found=found, fix=fix) from error
    except ValueError as error:  # a key twice, or a number of too many digits
        raise DataError(f"not valid JSON: {error}", file=path, fix="mend the file") from error
    rows = value if isinstance(value, list) else [value]
    for number, fields in enumerate(rows, 1):
        report.seen += 1
        source = f"{path}#{number}"
        if not isinstance(fields, dict):
            wrong = DataError(f"item {number} is not an object", file=path, found=fields, expected='[{"field": …}, …]')
            report.broken(wrong, source=source, excerpt=repr(fields))
            continue
        if _too_deep(fields):
            wrong = DataError(TOO_DEEP, file=path, line=number, found=str(fields)[:80], fix="flatten the row")
            report.broken(wrong, source=source, excerpt=str(fields)[:80])
            continue
        yield from _item(fields, source, path, number, options, report)


def read_csv(path: Path, options: ReadOptions, report: Rejections) -> Iterator[Item]:
    """Comma-separated (.csv) or tab-separated (.tsv, without quoting) rows under a header line."""
    text = decode(path.read_bytes(), str(path), options.encoding)
    for line, fields in tables.rows(text, path, report):
        yield from _item(fields, f"{path}#{line}", path, line, options, report)


def read_parquet(path: Path, options: ReadOptions, report: Rejections) -> Iterator[Item]:
    """Rows of a Parquet file, a batch at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "hf", "reading Parquet") from error
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            columns = Columns(schema, features_of(schema.metadata), kind=options.kind, file=path, report=report, stored=True)
            first = 1
            for batch in file.iter_batches(batch_size=1024):
                for number, fields in columns.rows(batch, first):
                    yield from _item(fields, f"{path}#{number}", path, number, options, report)
                first += batch.num_rows
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"not a readable Parquet file ({error})", file=path, fix="write or fetch the file again") from error


def read_conll(path: Path, options: ReadOptions, report: Rejections) -> Iterator[Item]:
    """Sentences of a token a line, with its tag; a blank line ends a sentence."""
    text = decode(path.read_bytes(), str(path), options.encoding)
    for first, tokens, tags in conll.sentences(text, path, report):
        yield from _item({"tokens": tokens, "tags": tags}, f"{path}#{first}", path, first, options, report)


def _item(
    fields: dict[str, Any], source: str, path: Path | str, number: int, options: ReadOptions, report: Rejections
) -> Iterator[Item]:
    """A row as the caller wants it: the documents of its text field, or for all other kinds as it is."""
    if options.kind != "documents":
        yield Row(fields, source, str(path), number)
        return
    text = _text_of(fields, options.text_field)
    if not isinstance(text, str):
        names = ", ".join(str(k) for k, v in fields.items() if isinstance(v, str)) or "none that holds text"
        message = "no such text field" if text is None and options.text_field not in fields else "this field is not text"
        error = DataError(
            message, file=path, line=number, field=options.text_field, found=text,
            expected=f"one of the row's text fields: {names}",
            fix="set text_field to one of them" if text is None else "mend the row",
        )  # fmt: skip
        report.broken(error, source=source, excerpt=str(fields))
        return
    if not text.strip():
        report.add("empty", source=source, file=str(path), line=number)
        return
    licence = fields.get("licence") or fields.get("license")
    licence = licence if isinstance(licence, str) else None
    if options.chunk_chars is None or len(text) <= options.chunk_chars:
        yield Document.make(text, source=source, licence=licence)
        return
    for part, (_, piece) in enumerate(pieces(text, options, cut=False), 1):
        yield Document.make(piece, source=f"{source}.{part}", licence=licence)


def _text_of(fields: dict[str, Any], name: str) -> Any:
    """What the row holds under a key or a path; None where there is no such."""
    try:
        return value_at(fields, name, "text_field")
    except DataError:
        return None


def _whole(text: str, path: Path, options: ReadOptions, **meta: Any) -> Iterator[Item]:
    """A text that was taken out of a page: one document, cut only by `chunk_chars`."""
    if options.chunk_chars is None or len(text) <= options.chunk_chars:
        yield Document.make(text, source=str(path), meta=meta)
        return
    for line, piece in pieces(text, options, cut=False):
        yield Document.make(piece, source=f"{path}#{line}", meta=meta)


def _empty(path: Path, report: Rejections, why: str = "empty") -> Iterator[Item]:
    report.add("empty file", source=str(path), file=str(path), excerpt=why)
    yield from ()
