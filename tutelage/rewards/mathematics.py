"""What a worker of `maths` runs: math-verify, whose parser nobody can bound from within."""

from __future__ import annotations

import logging
import re
from decimal import Decimal
from typing import Any

from math_verify import parse, verify

from tutelage.rewards.numbers import final_part

_MIXED = re.compile(r"(?<![\d.,/^])(\d{1,9}) (\d{1,9})/(\d{1,9})(?![\d/.])")
_FORMULA = re.compile(r"[\\^_=+*<>{}()\[\]]|\d[a-z]\b|[a-z]\s*[-/]|[-/]\s*[a-z]", re.IGNORECASE)
_SCIENTIFIC = re.compile(r"(?<![\w.])\d{1,20}(?:\.\d{1,20})?[eE][-+]?\d{1,2}(?![\w.])")


def maths(question: dict[str, str]) -> dict[str, Any]:
    """Whether a text's final answer is the expected one, by math-verify; an expected answer that can't be read is said."""
    wanted = _readable(question["answer"])
    marked = f"${wanted}$"  # as LaTeX has formulas; without the marks only numbers are read
    forms = (marked, wanted) if _FORMULA.search(wanted) and "$" not in wanted and "boxed" not in wanted else (wanted, marked)
    gold = next(filter(None, (_parse(form) for form in forms)), [])
    if not gold:
        return {"unreadable": wanted}
    try:
        found = _parse(_readable(question["text"]))
        right = bool(found) and verify(gold, found, timeout_seconds=None)
    except MemoryError:
        raise
    except Exception as error:  # recursion, digits beyond the interpreter's limit, …: the text's fault
        return {"value": 0.0, "note": f"cannot be read: {type(error).__name__}"}
    return {"value": float(right), "note": f"read {str(found[-1])[:80]}" if found else "no answer found"}


def any_of(question: dict[str, Any]) -> dict[str, Any]:
    """Whether a text's final answer is one of several, of which those that can't be read do not count while others can."""
    said = [maths({"answer": answer, "text": question["text"]}) for answer in question["answers"]]
    return max((one for one in said if "value" in one), key=lambda one: one["value"], default=said[0])


def _parse(text: str) -> list[Any]:
    found: list[Any] = parse(text, parsing_timeout=None)
    return found


def _readable(text: str) -> str:
    """The part with the final answer, with mixed and scientific numbers in a form that is not mistaken for several numbers."""
    part = final_part(text) if "####" in text else text
    part = _MIXED.sub(lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}", part)
    return _SCIENTIFIC.sub(lambda m: f"{Decimal(m[0]):f}", part).strip()


logging.disable()  # it warns that nobody watches the time: our parent does
verify(
    _parse("$\\frac{1}{2}$"), _parse("0.5"), timeout_seconds=None
)  # its grammars are made by the first use, not on a text's time
