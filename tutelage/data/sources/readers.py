"""Readers: one source string -> documents, or rows that will become conversations.

A source is a file, a folder, a glob, `hf:org/name[:config][:split]`, `python-docs:`, `python-code:`, `python-questions:`,
`python-areas:` or `skill:add,reverse?count=2000&seed=0`. Everything streams: no reader holds more than one file.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from tutelage.data.sources.columns import Columns
from tutelage.data.sources.encodings import choose
from tutelage.data.sources.readers_base import ReadOptions, Rejections, Row, TooManyBroken, not_text
from tutelage.data.sources.readers_files import (
    Item,
    Reader,
    _item,
    check_gzip,
    read_conll,
    read_csv,
    read_html,
    read_json,
    read_jsonl,
    read_parquet,
    read_pdf,
    read_text,
)
from tutelage.data.sources.source_files import files_of, found_in, is_glob
from tutelage.errors import ConfigError, DataError, MissingExtra, Setting
from tutelage.files import file_digest
from tutelage.records import Conversation, Document, Example
from tutelage.unicode import printable

__all__ = ["ReadOptions", "Rejections", "Row", "files_of", "parse_spec", "read", "source_digest"]

READERS: dict[str, Reader] = {
    ".txt": read_text, ".text": read_text, ".md": read_text, ".markdown": read_text, ".rst": read_text,
    ".html": read_html, ".htm": read_html, ".xhtml": read_html,
    ".pdf": read_pdf,
    ".jsonl": read_jsonl, ".ndjson": read_jsonl, ".jsonl.gz": read_jsonl, ".ndjson.gz": read_jsonl,
    ".json": read_json, ".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet,
    ".conll": read_conll, ".iob": read_conll, ".bio": read_conll,
}  # fmt: skip
NOT_UNICODE = re.compile("[\ud800-\udfff]+")
TABLES = {read_jsonl, read_json, read_csv, read_parquet, read_conll}
SCHEMES = ("python-docs", "python-code", "python-questions", "python-areas", "skill", "hf")


def read(
    source: str, options: ReadOptions | None = None, report: Rejections | None = None
) -> Iterator[Item | Conversation | Example]:
    """Documents of `source`, or with `kind="conversations"` its rows (`Row`) and ready `Conversation`s.

    What cannot be read goes to `report` by its policy. Raises `DataError` for a source that is missing or of the wrong
    kind, `MissingExtra` for a format whose library is not installed.
    """
    options, report = options or ReadOptions(), report or Rejections()
    scheme, parameters, rest = parse_spec(source)
    if scheme in ("python-docs", "python-code"):
        yield from _python(scheme, parameters, options, report)
    elif scheme in ("python-questions", "skill"):
        if options.kind not in ("conversations", "prompts"):
            fix = f"set {Setting('kind', 'conversations')} or {Setting('kind', 'prompts')}"
            raise ConfigError("this source yields conversations", field="sources", found=source, fix=fix)
        from tutelage.data.demo import questions, skills

        parameters.setdefault("seed", str(options.seed))
        made = questions.read(parameters) if scheme == "python-questions" else skills.read(rest, parameters)
        for conversation in made:
            report.seen += 1
            yield conversation
    elif scheme == "python-areas":
        if options.kind != "examples":
            fix = f"set {Setting('kind', 'examples')}"
            raise ConfigError("this source gives examples", field="sources", found=source, fix=fix)
        from tutelage.data.demo import python_areas

        for example in python_areas.read(parameters):
            report.seen += 1
            yield example
    elif scheme == "hf":
        yield from _hub(rest, options, report)
    else:
        yield from _files(source, options, report)


def parse_spec(source: str) -> tuple[str, dict[str, str], str]:
    """(scheme, parameters, rest) of a source such as `skill:add?count=10`; the scheme is "" for paths."""
    scheme, colon, rest = source.partition(":")
    if not colon or scheme not in SCHEMES:
        return "", {}, source
    rest, _, query = rest.partition("?")
    return scheme, dict(parse_qsl(query, keep_blank_values=True)), rest


def _python(scheme: str, parameters: dict[str, str], options: ReadOptions, report: Rejections) -> Iterator[Item]:
    from tutelage.data.demo import python_code, python_docs
    from tutelage.data.sources.readers_base import pieces

    if options.kind != "documents":
        fix = f"set {Setting('kind', 'documents')}, or use python-questions: for conversations made from them"
        raise ConfigError(f"{scheme}: gives documents", field="sources", fix=fix)
    for document in python_docs.documents() if scheme == "python-docs" else python_code.documents(parameters):
        report.seen += 1
        if options.chunk_chars is None or len(document.text) <= options.chunk_chars:
            yield document
            continue
        for line, piece in pieces(document.text, options, cut=False):
            yield Document.make(piece, source=f"{document.source}#{line}", licence=document.licence, meta=document.meta)


def _files(source: str, options: ReadOptions, report: Rejections) -> Iterator[Item]:
    named = _is_named(source)
    for found in found_in(source):
        path = found.path
        if found.problem is not None:
            if found.unreadable:
                report.broken_file(DataError(found.problem, file=path, fix="chmod +rx it, or leave it out"), path)
            else:
                report.add(found.problem, source=str(path), file=str(path))
            continue
        reader = READERS.get(suffix_of(path)) or (read_text if named else None)
        if reader is None:
            report.unknown_suffixes[suffix_of(path) or "(none)"] += 1
            report.add("unknown file type", source=str(path), file=str(path))
            continue
        try:
            yield from _file(path, reader, source, options, report)
        except TooManyBroken:
            raise
        except DataError as error:
            report.broken_file(error, path)


def _file(path: Path, reader: Reader, source: str, options: ReadOptions, report: Rejections) -> Iterator[Item]:
    """What one file holds. Raises `DataError` where it cannot be read at all, or no further."""
    try:
        if options.kind != "documents" and reader not in TABLES:
            if _is_named(source):
                fix = f"give JSON, JSONL, CSV or Parquet rows; or {Setting('kind', 'documents')} to learn from the text itself"
                raise DataError(f"a text file holds no {options.kind}", file=path, fix=fix)
            report.add("no conversations in such a file", source=str(path), file=str(path))
            return
        packed = reader in (read_pdf, read_parquet) or (reader is read_jsonl and path.suffix.lower() == ".gz")
        if not packed and (what := not_text(path, options.encoding)):
            _refuse(path, what, source, report)
            return
        if path.stat().st_size == 0:
            report.add("empty file", source=str(path), file=str(path))
            return
        if reader is read_jsonl and packed:
            check_gzip(path)  # damaged data may still be rows, of other words
        if "," in options.encoding and reader not in (read_pdf, read_parquet, read_html):
            options = _chosen(path, options, report)
        for item in reader(path, options, report):
            if reader not in TABLES:
                report.seen += 1
            yield _named_in_unicode(item)
    except PermissionError as error:
        raise DataError("no permission to read this file", file=path, fix="chmod +r it, or leave it out") from error
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", file=path, fix="check the disk or network it is on") from error


def _chosen(path: Path, options: ReadOptions, report: Rejections) -> ReadOptions:
    """The options with the one of several encodings that this file fits, counted where it is not the first."""
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rb") as f:
        encoding = choose(f, options.encoding)
    if encoding in options.encoding and not options.encoding.startswith(encoding):
        report.other_encodings[encoding] += 1
        report.first.setdefault(encoding, str(path))
    return replace(options, encoding=encoding)


def _named_in_unicode(item: Item) -> Item:
    """The item with a source that can be written as UTF-8: a file's name may hold any bytes."""
    if item.source.isascii() or (source := NOT_UNICODE.sub(lambda m: printable(m[0]), item.source)) == item.source:
        return item
    return replace(item, source=source)


def _refuse(path: Path, what: str, source: str, report: Rejections) -> None:
    """Counts a file that holds no text; raises `DataError` where it is all that the user named."""
    if Path(source).expanduser().is_file():
        fix = f"unpack or convert it first; if it is text in another encoding, name that ({Setting('encoding', 'utf-16')})"
        raise DataError(f"not text but {what}", file=path, expected=f"text, or a file named {', '.join(READERS)}", fix=fix)
    report.add(f"not text but {what}", source=str(path), file=str(path))


def suffix_of(path: Path) -> str:
    """`.jsonl.gz` for double suffixes that a reader knows, else the last one, in lower case."""
    double = "".join(path.suffixes[-2:]).lower()
    return double if double in READERS else path.suffix.lower()


def _is_named(source: str) -> bool:
    """Whether the user named a file or its ending, so that an unknown ending is read as text."""
    return not Path(source).is_dir() and (not is_glob(source) or not set("*?[") & set(Path(source).suffix or "*"))


def _hub(rest: str, options: ReadOptions, report: Rejections) -> Iterator[Item]:
    """Rows of a Hugging Face data set, streamed. The only reader that uses the network, and only when asked."""
    name, *parts = rest.split(":")
    split = next((p for p in parts if p.split("[")[0] in ("train", "validation", "test", "dev", "valid")), None)
    config = next((p for p in parts if p != split), None)
    split = split or (parts[1] if len(parts) > 1 else "train")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "hf", f"reading hf:{rest}") from error
    source = f"hf:{name}" + (f":{config}" if config else "") + f":{split}"
    try:
        found = datasets.load_dataset(name, config, split=split, streaming=True)
        features = getattr(found, "features", None)
        schema, named = (None, {}) if features is None else (features.arrow_schema, features.to_dict())
        columns = Columns(schema, named, kind=options.kind, file=source, report=report, stored=False)
        for number, raw in enumerate(found, 1):
            report.seen += 1
            fields = columns.read(raw, number)
            if fields is not None:
                yield from _item(fields, f"{source}#{number}", source, number, options, report)
    except DataError:
        raise
    except Exception as error:  # the library raises its own, requests', httpx' and plain errors for one cause
        raise DataError(
            f"cannot read this data set ({type(error).__name__}: {error})", file=source,
            fix="check name, config and split, and that huggingface.co can be reached; or download it and name the files",
        ) from error  # fmt: skip


def source_digest(sources: Iterable[str]) -> str:
    """64 hex digits over what the sources hold: file contents, the standard library's text, or a spec as it is.

    A hub data set has no digest before it is read: only its name counts.
    """
    total = hashlib.sha256()
    for source in sources:
        scheme, _, _ = parse_spec(source)
        total.update(f"source {source if scheme else ''}\n".encode())
        if scheme.startswith("python-"):
            from tutelage.data.demo import python_docs

            total.update(python_docs.digest().encode())
        elif not scheme:
            root = Path(source).expanduser()
            for path in files_of(source):
                name = path.relative_to(root).as_posix() if root.is_dir() else path.name
                total.update(f"{name}\0{_content_digest(path)}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def _content_digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:  # the reader says so, and obeys on_error
        return f"cannot be read: {error.strerror}"
