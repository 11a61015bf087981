"""What a worker of `maths` runs: math-verify, whose parser nobody can bound from within."""

from __future__ import annotations

import logging
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

from math_verify import parse, verify

from tutelage.rewards.answers import bare, measure, same_number, stated
from tutelage.rewards.forms import folded, joined_thousands
from tutelage.rewards.numbers import final_number, final_part

_MIXED = re.compile(r"(?<![\d.,/^])(\d{1,9}) (\d{1,9})/(\d{1,9})(?![\d/.])")
_FORMULA = re.compile(r"[\\^_=+*<>{}()\[\]]|\d[a-z]\b|[a-z]\s*[-/]|[-/]\s*[a-z]", re.IGNORECASE)
_ROOT = re.compile(r"(?:(?<![\\a-zA-Z])sqrt|√)\((\w+)\)|√(\w+)")
_PROSE = re.compile(
    r"(?<![\\a-zA-Z])(?!sqrt|sin|cos|tan|log|exp|left|right|frac|text)[a-zA-Z]{2,}|,|\bor\b|[?<>≤≥≠±]"
)  # no formula, or several
_SCIENTIFIC = re.compile(r"(?<![\w.])\d{1,20}(?:\.\d{1,20})?[eE][-+]?\d{1,2}(?![\w.])")


def maths(question: dict[str, Any]) -> dict[str, Any]:
    """Whether a text's final answer is one of the expected ones, by math-verify; numbers are read as `numeric` reads them.
    Expected answers that can't be read do not count while others can; where none can, the first is returned as `unreadable`."""
    out: dict[str, Any] = {}
    for answer in question["answers"]:
        found = _one(answer, question["text"])
        if found.get("value"):
            return found
        if not out or ("unreadable" in out and "value" in found):
            out = found
    return out


def _one(answer: str, text: str) -> dict[str, Any]:
    wanted = _readable(answer)
    number = final_number(answer) if measure(bare(stated(answer))) else None
    if number is not None:
        found = final_number(text)
        if found is not None:
            return {"value": float(same_number(number, found, near=_near)), "note": f"read {float(found.value):g}"}
        text = bare(stated(text))
        if not text or _PROSE.search(text):
            return {"value": 0.0, "note": "no answer found"}
    marked = f"${wanted}$"  # as LaTeX has formulas; without the marks only numbers are read
    forms = (marked, wanted) if _FORMULA.search(wanted) and "$" not in wanted and "boxed" not in wanted else (wanted, marked)
    gold = next(filter(None, (_parse(form) for form in forms)), [])
    if not gold:
        return {"unreadable": wanted}
    try:
        read = _readable(text)
        said = _readable(bare(stated(text)))
        parsed = [] if number is not None else _parse(read)  # of a formula that would read one of its numbers
        parsed = parsed or ([] if _PROSE.search(said) else _parse(f"${said}$"))
        right = bool(parsed) and verify(gold, parsed, timeout_seconds=None)
    except MemoryError:
        raise
    except Exception as error:  # recursion, digits beyond the interpreter's limit, …: the text's fault
        return {"value": 0.0, "note": f"cannot be read: {type(error).__name__}"}
    return {"value": float(right), "note": f"read {str(parsed[-1])[:80]}" if parsed else "no answer found"}


def _near(a: Fraction, b: Fraction) -> bool:
    """To six decimals, as fractions are given; of numbers below 1 to six digits."""
    return abs(a - b) <= min(Fraction(1), max(abs(a), abs(b))) * Fraction(1, 500_000)


def _parse(text: str) -> list[Any]:
    found: list[Any] = parse(text, parsing_timeout=None)
    return found


def _readable(text: str) -> str:
    """The part with the final answer, with mixed and scientific numbers in a form that is not mistaken for several numbers."""
    part = joined_thousands(folded(final_part(text) if "####" in text else text))
    part = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", part.replace("π", r"\pi "))
    part = _MIXED.sub(lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}", part)
    return _SCIENTIFIC.sub(lambda m: f"{Decimal(m[0]):f}", part).strip()


logging.disable()  # it warns that nobody watches the time: our parent does
verify(
    _parse("$\\frac{1}{2}$"), _parse("0.5"), timeout_seconds=None
)  # its grammars are made by the first use, not on a text's time
