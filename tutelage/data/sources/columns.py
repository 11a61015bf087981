"""Values of columnar sources (Parquet, data sets of the hub) -> values as JSON has them.

| column | becomes |
| --- | --- |
| timestamp, date, time | text as ISO 8601 writes it |
| decimal | a whole number, or a number that is equal to it, or else its text |
| binary | its text where it is UTF-8; otherwise left out |
| Arrow's JSON | what the JSON says |
| map | an object |
| ClassLabel of `datasets` | the name of the class (of ratings, the number: their labels are verdicts) |
| structs of tools and of the arguments of their calls | without null fields, which are other rows' keys |

What is left out is counted in the report.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from tutelage.data.sources.readers_base import Rejections
from tutelage.data.sources.strict_json import loads
from tutelage.errors import DataError

UNREADABLE = (ValueError, OverflowError, TypeError)  # what pyarrow raises for a value that Python has no type for
PADDED = "null fields of tool arguments and schemas left out, which a columnar file adds for the keys of other rows"


def features_of(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Features that `datasets` wrote into a file's metadata; none where it did not."""
    try:
        found = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


class Columns:
    """What the columns of one source hold. Raises `DataError` for two of one name."""

    def __init__(
        self, schema: Any, features: dict[str, Any], *, kind: str, file: str | Path, report: Rejections, stored: bool
    ) -> None:  # fmt: skip
        """`stored`: values come as the file holds them, JSON as its text; `datasets` has decoded those that it hands on."""
        names = [] if schema is None else list(schema.names)
        twice = [name for name, n in Counter(names).items() if n > 1]
        if twice:
            raise DataError(
                "two columns have one name", file=file, field=twice[0], found=", ".join(names), expected="a name for each column",
                fix="rename or remove one of them",
            )  # fmt: skip
        self.types = {} if schema is None else {field.name: field.type for field in schema}
        self.features = features if kind != "ratings" else {}
        self.file, self.report, self.stored = file, report, stored

    def rows(self, batch: Any, first: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, row) of an Arrow batch, whose rows count from `first`. A row that cannot be read goes to the report."""
        columns = {name: _values(batch.column(i)) for i, name in enumerate(batch.schema.names)}
        for i in range(batch.num_rows):
            self.report.seen += 1
            row = self.read({name: values[i] for name, values in columns.items()}, first + i)
            if row is not None:
                yield first + i, row

    def read(self, raw: Mapping[str, Any], number: int) -> dict[str, Any] | None:
        """The row, or None after it was counted as broken."""
        row: dict[str, Any] = {}
        for name, value in raw.items():
            try:
                if isinstance(value, Exception):
                    raise value
                value = self._unpadded(name, value)
                if self.stored:
                    value = _decoded(value, self.types.get(name))
                row[name] = self._plain(_named(value, self.features.get(name)))
            except UNREADABLE as error:
                wrong = DataError(
                    f"a value that cannot be read ({error})", file=self.file, line=number, field=name,
                    expected="a value that JSON has, in valid UTF-8; years 1 to 9999", fix="fix the column, or leave it out",
                )  # fmt: skip
                self.report.broken(wrong, source=f"{self.file}#{number}", excerpt=f"{name}: {error}")
                return None
        return row

    def _unpadded(self, name: str, value: Any) -> Any:
        def keep(struct: dict[str, Any]) -> dict[str, Any]:
            full = {k: v for k, v in struct.items() if v is not None}
            self.report.note(PADDED, len(struct) - len(full))
            return full

        typed = self.types.get(name)
        if name in ("tools", "functions"):
            return _structs(value, typed, keep)
        return _arguments(value, typed, keep)

    def _plain(self, value: Any) -> Any:
        """The value as JSON has it."""
        if value is None or isinstance(value, str | int | float):
            return value
        if isinstance(value, Mapping):
            return {str(k): self._plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._plain(v) for v in value]
        if isinstance(value, bytes):
            return self._text(value)
        if isinstance(value, Decimal):
            return _number(value)
        if isinstance(value, datetime.date | datetime.time):
            return value.isoformat()
        if isinstance(value, datetime.timedelta | UUID):
            return str(value)
        self.report.note(f"values of the type {type(value).__name__}, which JSON has not, left out")
        return None

    def _text(self, value: bytes) -> str | None:
        try:
            text = value.decode()
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            self.report.note("binary values that are not text left out")
            return None
        return text


def _values(column: Any) -> list[Any]:
    """The cells; in place of one that Python cannot hold, the error that says why."""
    try:
        return list(column.to_pylist())
    except UNREADABLE:
        return [_cell(scalar) for scalar in column]


def _cell(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UNREADABLE as error:
        return error


def _number(value: Decimal) -> int | float | str:
    if not value.is_finite():
        return str(value)
    if value == value.to_integral_value():
        return int(value)
    return float(value) if Decimal(repr(float(value))) == value else str(value)


def _children(typed: Any) -> tuple[Any, dict[str, Any]]:
    """Arrow's types of what a list holds, and of the fields of a struct."""
    from pyarrow import types

    if typed is None:
        return None, {}
    if types.is_struct(typed):
        return None, {field.name: field.type for field in typed}
    if types.is_list(typed) or types.is_large_list(typed) or types.is_fixed_size_list(typed):
        return typed.value_type, {}
    return None, {}


def is_json(typed: Any) -> bool:
    return getattr(typed, "extension_name", "") == "arrow.json"


def _decoded(value: Any, typed: Any) -> Any:
    """Text of Arrow's JSON type -> what it says; maps -> objects."""
    if value is None or typed is None:
        return value
    if is_json(typed):
        return loads(value) if isinstance(value, str) else value
    item, fields = _children(typed)
    if isinstance(value, Mapping):
        return {k: _decoded(v, fields.get(k)) for k, v in value.items()}
    if isinstance(value, list) and str(typed).startswith("map<"):
        pairs = {str(k): _decoded(v, typed.item_type) for k, v in value}
        if len(pairs) < len(value):
            raise ValueError("a map with a key twice")
        return pairs
    return [_decoded(v, item) for v in value] if isinstance(value, list) else value


def _named(value: Any, feature: Any) -> Any:
    """Numbers of a ClassLabel -> names; -1, which `datasets` writes where nobody has labelled, -> null."""
    if isinstance(feature, list) and len(feature) == 1:  # as older files write a list
        feature = {"_type": "List", "feature": feature[0]}
    if value is None or not isinstance(feature, Mapping):
        return value
    if feature.get("_type") == "ClassLabel" and isinstance(value, int):
        names = feature.get("names") or []
        if value == -1:
            return None
        if not 0 <= value < len(names):
            raise ValueError(f"class {value}, where {len(names)} have names")
        return names[value]
    if isinstance(value, list):
        inner = feature.get("feature")
        return [_named(v, inner) for v in value] if inner is not None else value
    return {k: _named(v, feature.get(k)) for k, v in value.items()} if isinstance(value, dict) else value


Keep = Callable[[dict[str, Any]], dict[str, Any]]


def _structs(value: Any, typed: Any, keep: Keep) -> Any:
    """`value` with `keep` applied to its structs, but not inside JSON, whose nulls are its own."""
    if is_json(typed):
        return value
    item, fields = _children(typed)
    if isinstance(value, dict):
        return {k: _structs(v, fields.get(k), keep) for k, v in keep(value).items()}
    return [_structs(v, item, keep) for v in value] if isinstance(value, list) else value


def _arguments(value: Any, typed: Any, keep: Keep, called: bool = False) -> Any:
    """`value` with `keep` applied to the arguments of the tool calls in it. `called`: it stands in a tool call."""
    if is_json(typed):
        return value
    item, fields = _children(typed)
    if isinstance(value, list):
        return [_arguments(v, item, keep, called) for v in value]
    if not isinstance(value, dict):
        return value
    out = {}
    for key, inner in value.items():
        if (called and key in ("arguments", "parameters")) or (key in ("tools", "functions") and not called):
            out[key] = _structs(inner, fields.get(key), keep)
        else:
            calls = called or key in ("tool_calls", "function_call")
            out[key] = _arguments(inner, fields.get(key), keep, calls)
    return out
