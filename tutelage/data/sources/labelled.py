"""Rows with labels as they come -> `Example`.

| keys | becomes |
| --- | --- |
| text (or sentence, comment, full_text), label | one class |
| text, labels: a list | several classes, or none |
| text, spans: [{start, end, label}], or [{start_position, end_position, entity_type}], or [characters] | tagged parts |
| tokens: a list, tags (or ner_tags): a list of O, B-x, I-x | tagged parts of the tokens joined by spaces |
| prompt, completion: two strings | the prompt, with the completion as its class |

Labels are texts. Numbers and truth values are named as JSON writes them, whatever the format: 1, 1.0 and "1.0" are `1`; true,
"True" and "TRUE" are `true`. A second text is `pair` (or sentence1 and sentence2; premise and hypothesis). Every other name is
mapped: `fields={text: comment, label: toxic}`. A row that cannot be trusted is a `DataError` with file, line and field.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.data.sources.conversations import END_MARK, Row
from tutelage.data.sources.mapping import mapped
from tutelage.errors import DataError, Setting
from tutelage.records import Example, Span

TEXTS = ("text", "sentence", "comment", "full_text")
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"))
TAGS = ("tags", "ner_tags")
WHOLE = re.compile(r"^(-?(?:0|[1-9]\d*))\.0$")  # a whole number as tables write it where a column has gaps
CHARACTERS = "span"  # what is said of characters that are listed without a name


def read(row: Row, *, file: str | Path | None, line: int | None, source: str, fields: Mapping[str, str] | None) -> Example:
    """The example of one row. Raises `DataError` (file, line, field, found, expected, fix)."""
    try:
        return _example(_renamed(row, fields or {}), source)
    except DataError as error:
        raise error.but(file=file, line=line) from error


def texts_of(row: Row, fields: Mapping[str, str]) -> tuple[str, str | None]:
    """The text of a row that may have no label, and the text beside it. Raises `DataError`."""
    row = _renamed(row, fields)
    if isinstance(row.get("tokens"), list) and not any(key in row for key in TEXTS):
        return _text(" ".join(_text(token, f"tokens[{i}]") for i, token in enumerate(row["tokens"])), "tokens"), None
    return _texts(row)


def _renamed(row: Row, fields: Mapping[str, str]) -> Row:
    """The row with the names that we know, `fields` being those that it has."""
    named = mapped(row, fields)
    used = set(fields.values())
    return {k: v for k, v in row.items() if k not in used} | named


def _example(row: Row, source: str) -> Example:
    licence = row.get("licence") or row.get("license")
    rest: dict[str, Any] = {"source": source, "licence": licence if isinstance(licence, str) else None,
                            "meta": dict(row["meta"]) if isinstance(row.get("meta"), Mapping) else {}}  # fmt: skip
    if isinstance(row.get("tokens"), list):
        return _of_tokens(row, rest)
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str) and "label" not in row:
        text = _text(row["prompt"].strip(), "prompt")
        return Example.make(text, label=_label(row["completion"], "completion"), **rest)
    text, pair = _texts(row)
    if row.get("spans") is not None:
        return Example.make(text, pair=pair, spans=_spans(row["spans"], text), **rest)
    if row.get("labels") is not None:
        given = _listed(row["labels"], "labels")
        names = tuple(sorted({_label(name, f"labels[{i}]") for i, name in enumerate(given)}))
        return Example.make(text, pair=pair, labels=names, **rest)
    if "label" in row:
        return Example.make(text, pair=pair, label=_label(row["label"], "label"), **rest)
    raise DataError(
        "this row has no label", found=f"keys {', '.join(map(str, row))}", expected="label, labels, spans, or tokens with tags",
        fix=f"map the name of your field: {Setting('fields', '{text: YOUR_KEY, label: YOUR_KEY}')}",
    )  # fmt: skip


def _texts(row: Row) -> tuple[str, str | None]:
    for first, second in PAIRS:
        if first in row and second in row:
            return _text(row[first], first), _text(row[second], second)
    key = next((k for k in TEXTS if k in row), None)
    if key is None:
        raise DataError(
            "this row has no text", found=f"keys {', '.join(map(str, row))}", expected=", ".join(TEXTS),
            fix=f"map the name of your field: {Setting('fields', '{text: YOUR_KEY}')}",
        )  # fmt: skip
    return _text(row[key], key), _text(row["pair"], "pair") if row.get("pair") is not None else None


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError("an empty text can't be classified" if isinstance(value, str) else "the text is not text",
                        field=field, found=value, expected="text", fix="fill it in, or remove the row")  # fmt: skip
    return value


def _label(value: Any, field: str) -> str:
    """The name of a class: a text, or a number or truth value as JSON writes it, so that tables and JSON of one data set meet.
    A whole number has no fraction (1.0 and "1.0" are 1); "True" and "FALSE" of a table are true and false."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    text = value.strip().removesuffix(END_MARK).strip() if isinstance(value, str) else ""
    if text.lower() in ("true", "false"):
        return text.lower()
    if text:
        return WHOLE.sub(r"\1", text)
    raise DataError("this is no label", field=field, found=value, expected="a text, a number, or true or false",
                    fix="fill it in, or remove the row")  # fmt: skip


def _listed(value: Any, field: str) -> list[Any]:
    """A list, or the JSON of one, as CSV has it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"not a list ({error})", field=field, found=value, expected="[…]") from error
    if not isinstance(value, list):
        raise DataError("not a list", field=field, found=value, expected="[…]")
    return value


def _spans(value: Any, text: str) -> tuple[Span, ...]:
    rows = _listed(value, "spans")
    if rows and all(isinstance(row, int) and not isinstance(row, bool) for row in rows):
        found = _runs(sorted(set(rows)))
    else:
        found = [_span(row, f"spans[{i}]") for i, row in enumerate(rows)]
    found.sort(key=lambda s: s.start)
    for before, span in zip([None, *found], found, strict=False):
        if not 0 <= span.start < span.end <= len(text):
            raise DataError("a span outside of its text", field="spans", found=f"{span.start} to {span.end}",
                            expected=f"0 to {len(text)}, the characters of the text")  # fmt: skip
        if before is not None and span.start < before.end:
            raise DataError("two spans overlap", field="spans", found=f"{before.start}-{before.end} and {span.start}-{span.end}",
                            expected="spans apart from one another")  # fmt: skip
    return tuple(found)


def _runs(characters: list[int]) -> list[Span]:
    """Spans of characters that follow one another."""
    found: list[Span] = []
    for at in characters:
        if found and found[-1].end == at:
            found[-1] = Span(start=found[-1].start, end=at + 1, label=CHARACTERS)
        else:
            found.append(Span(start=at, end=at + 1, label=CHARACTERS))
    return found


def _span(row: Any, field: str) -> Span:
    if isinstance(row, list | tuple) and len(row) == 3:
        start, end, label = row
    elif isinstance(row, Mapping):
        start, end = (row.get(k, row.get(f"{k}_position")) for k in ("start", "end"))
        label = row.get("label", row.get("entity_type"))
    else:
        raise DataError("this is no span", field=field, found=row, expected='{"start": 0, "end": 3, "label": "PERSON"}')
    if not (isinstance(start, int) and isinstance(end, int)):
        raise DataError("a span has no place", field=field, found=row, expected='{"start": 0, "end": 3, "label": "PERSON"}')
    return Span(start=start, end=end, label=_label(label, f"{field}.label"))


def _of_tokens(row: Row, rest: dict[str, Any]) -> Example:
    key = next((k for k in TAGS if k in row), "tags")
    tokens, tags = row["tokens"], row.get(key)
    if not isinstance(tags, list) or len(tags) != len(tokens):
        raise DataError("each token needs a tag", field=key, found=tags, expected=f"a list of {len(tokens)}")
    spans: list[Span] = []
    at, before = 0, "O"
    for i, (token, tag) in enumerate(zip(tokens, tags, strict=True)):
        token, tag = _text(token, f"tokens[{i}]"), _label(tag, f"{key}[{i}]")
        part, dash, label = tag.partition("-")
        if tag != "O" and (not dash or part not in ("B", "I")):
            raise DataError("not a tag", field=f"{key}[{i}]", found=tag, expected="O, B-PERSON, I-PERSON, …",
                            fix="write the names of the tags, not their numbers")  # fmt: skip
        if part == "I" and before.partition("-")[2] == label:
            spans[-1] = Span(start=spans[-1].start, end=at + len(token), label=label)
        elif label:
            spans.append(Span(start=at, end=at + len(token), label=label))
        at, before = at + len(token) + 1, tag
    return Example.make(_text(" ".join(tokens), "tokens"), spans=tuple(spans), **rest)
