"""Values of a row by the names that `fields` gives them: a key, or a path into what is nested."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from tutelage.errors import DataError


def mapped(row: Mapping[str, Any], fields: Mapping[str, str] | None) -> dict[str, Any]:
    """What each of our names stands for in this row. Raises `DataError` naming the field and the part that is missing."""
    return {ours: value_at(row, theirs, f"fields.{ours}") for ours, theirs in (fields or {}).items()}


def value_at(row: Mapping[str, Any], path: str, field: str) -> Any:
    """The value of the key `path`, or else of the path: names and positions with dots between them.

    Example:
        >>> value_at({"instances": [{"output": "Yes."}]}, "instances.0.output", "fields.answer")
        'Yes.'
    """
    if path in row:
        return row[path]
    value: Any = row
    gone = ""
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise _missing(value, path, part, gone, field)
        gone += f"{part}."
    return value


def _missing(value: Any, path: str, part: str, gone: str, field: str) -> DataError:
    inside = f" below {gone[:-1]!r}" if gone else " in this row"
    if isinstance(value, list):
        return DataError(
            f"no item {part!r}{inside}", field=field, found=f"a list of {len(value)}", expected=path,
            fix="items are counted from 0, as in instances.0.output",
        )  # fmt: skip
    if not isinstance(value, Mapping):
        return DataError(f"nothing is nested{inside}", field=field, found=value, expected=path, fix="correct the path")
    near = difflib.get_close_matches(part, [str(k) for k in value], 1)
    return DataError(
        f"no key {part!r}{inside}", field=field, found=f"keys {', '.join(map(str, value))}", expected=path,
        fix=f"did you mean {gone}{near[0]}?" if near else "correct the `fields` mapping; a path such as instances.0.output leads"
        " into nested rows",
    )  # fmt: skip
