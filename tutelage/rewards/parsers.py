"""Functions that workers run: each reads hostile text by a parser that nobody can bound from within."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from functools import lru_cache
from typing import Any

from tutelage.rewards.numbers import final_part
from tutelage.rewards.schema import wrong

_MIXED = re.compile(r"(?<![\d.,/^])(\d{1,9}) (\d{1,9})/(\d{1,9})(?![\d/.])")
_SCIENTIFIC = re.compile(r"(?<![\w.])\d{1,20}(?:\.\d{1,20})?[eE][-+]?\d{1,2}(?![\w.])")


def maths(question: dict[str, str]) -> dict[str, Any]:
    """Whether a text's final answer is the expected one, by math-verify; an expected answer that can't be read is said."""
    import logging

    from math_verify import parse, verify

    logging.disable()  # it warns that nobody watches the time: our parent does
    wanted = _readable(question["answer"])
    gold = parse(wanted, parsing_timeout=None) or parse(f"${wanted}$", parsing_timeout=None)
    if "\\" in wanted and "$" not in wanted and "boxed" not in wanted:
        gold = parse(f"${wanted}$", parsing_timeout=None) or gold
    if not gold:
        return {"unreadable": wanted}
    try:
        found = parse(_readable(question["text"]), parsing_timeout=None)
        right = bool(found) and verify(gold, found, timeout_seconds=None)
    except MemoryError:
        raise
    except Exception as error:  # recursion, digits beyond the interpreter's limit, …: the text's fault
        return {"value": 0.0, "note": f"cannot be read: {type(error).__name__}"}
    return {"value": float(right), "note": f"read {str(found[-1])[:80]}" if found else "no answer found"}


def _readable(text: str) -> str:
    """The part with the final answer, with mixed and scientific numbers in a form that is not mistaken for several numbers."""
    part = final_part(text) if "####" in text else text
    part = _MIXED.sub(lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}", part)
    return _SCIENTIFIC.sub(lambda m: f"{Decimal(m[0]):f}", part).strip()


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
