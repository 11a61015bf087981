"""JSON in which no object names a key twice: parsers differ in which of the two they take."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any


def loads(text: str) -> Any:
    """The value. Raises `ValueError` for what is no JSON or names a key twice, `RecursionError` for what is nested too deeply."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name!r} comes twice in one object")
    return found
