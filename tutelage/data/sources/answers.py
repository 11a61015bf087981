"""Right answers as rows carry them: one, or a list of which any is right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tutelage.errors import DataError

ACCEPTED = "accepted"  # the key of a record's facts (`meta`) that lists right answers besides the first


def read(value: Any, field: str) -> tuple[str, list[str]]:
    """The first right answer, and the others. Raises `DataError` for a list that holds none, or what is no single answer.

    Example:
        >>> read(["Brussels", "Bruxelles"], "answer")
        ('Brussels', ['Bruxelles'])
    """
    if not isinstance(value, list | tuple):
        return _one(value), []
    if not value or not all(isinstance(v, str | int | float) and str(v).strip() for v in value):
        raise DataError(
            "a list of right answers holds texts or numbers", field=field, found=list(value), expected='such as ["4", "four"]',
            fix="list the answers of which any is right; write one that is itself a list as text",
        )  # fmt: skip
    first, *others = dict.fromkeys(_one(v) for v in value)
    return first, others


def _one(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def with_accepted(meta: dict[str, Any], others: list[str]) -> dict[str, Any]:
    """The facts of a record, with the other right answers."""
    return meta | {ACCEPTED: [*others, *others_of(meta)]} if others else meta


def others_of(meta: Mapping[str, Any]) -> list[str]:
    """Right answers besides the first. Raises `DataError` where `meta.accepted` is no list of texts or numbers."""
    found = meta.get(ACCEPTED)
    if found is None:
        return []
    if isinstance(found, str):
        return [found]
    if not isinstance(found, list) or not all(isinstance(v, str | int | float) for v in found):
        raise DataError("other right answers are a list", field=f"meta.{ACCEPTED}", found=found, expected="a list of texts")
    return [_one(v) for v in found]


def answered(row: Mapping[str, Any], key: str) -> tuple[dict[str, Any], list[str]]:
    """The row of a dialogue with its answer as text, and the other right answers. A number is an answer, and so is a list of
    right answers: the first is what is learnt."""
    if not isinstance(row[key], list | tuple | int | float) or _parts(row[key]):
        return dict(row), []
    first, others = read(row[key], key)
    return {**row, key: first}, others


def _parts(value: Any) -> bool:
    """Whether this is a message's content in parts."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(v, Mapping) for v in value)
