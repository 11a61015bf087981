"""Functions that workers run: each reads hostile text by a parser that nobody can bound from within."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from tutelage.rewards.schema import wrong


def regex(question: dict[str, Any]) -> dict[str, Any]:
    """Whether a text matches a pattern; what is wrong with the pattern, if it is none."""
    try:
        pattern = _compiled(question["pattern"])
    except (re.error, RecursionError, OverflowError) as error:
        return {"unreadable": str(error)}
    found = pattern.fullmatch(question["text"].strip()) if question["full"] else pattern.search(question["text"])
    return {"value": float(found is not None), "note": ""}


_compiled = lru_cache(256)(re.compile)


def json_schema(question: dict[str, Any]) -> dict[str, Any]:
    """Whether a text is JSON that a schema allows, and where it is not."""
    try:
        value = json.loads(question["text"], parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return {"value": 0.0, "note": f"no JSON: {error}"}
    try:
        why = wrong(value, question["schema"])
    except RecursionError:
        why = "nested too deeply"
    return {"value": float(not why), "note": why}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
