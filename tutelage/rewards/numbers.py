"""The final number of a text, read in time that grows with its length alone."""

from __future__ import annotations

import re
from collections import deque
from fractions import Fraction

MAX_DIGITS = 60  # of one number; longer ones are no answers
MAX_EXPONENT = 60

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[-−]\s?)?[$€£]?\s?(?:\\[dt]?frac\{{(?P<top>-?\d+)\}}\{{(?P<bottom>\d+)\}}"
    rf"|(?P<whole>\d+)[ -](?P<over>\d+)/(?P<under>\d+)(?![\d/])"
    rf"|(?P<plain>{_PLAIN})(?:[eE](?P<exponent>[-+]?\d+)|\s?/\s?(?P<divisor>\d+(?:\.\d+)?)(?![\d/]))?)"
)
_SAID = re.compile(r"answer\s*(?:is|:|=)\s*", re.IGNORECASE)


def final_part(text: str) -> str:
    """Where the final answer stands: what follows the last `####` on its line, or the last box, or else the whole text."""
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().split("\n", 1)[0]
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    return _braced(text, text.index("{", start)) if start >= 0 else text


def last_number(text: str) -> Fraction | None:
    """The number that a text ends with, exactly: 1,234.50; 3/4; 1 1/2; \\frac{3}{4}; 1e3. Units and percent signs do not count.

    Example:
        >>> last_number("First 3, so the answer is $1,234.50 in all, after 2 days")
        Fraction(2469, 2)
    """
    part = final_part(text)
    if part is text and (said := list(_SAID.finditer(text))):
        found = _NUMBER.search(text, said[-1].end())
        return _value(found) if found else None
    last = deque(_NUMBER.finditer(part), maxlen=1)
    return _value(last[0]) if last else None


def _value(found: re.Match[str]) -> Fraction | None:
    part = {name: text.replace(",", "") for name, text in found.groupdict().items() if text is not None}
    if any(len(text) > MAX_DIGITS for text in part.values()) or abs(int(part.get("exponent", 0))) > MAX_EXPONENT:
        return None
    try:
        if "top" in part:
            value = Fraction(int(part["top"]), int(part["bottom"]))
        elif "whole" in part:
            value = int(part["whole"]) + Fraction(int(part["over"]), int(part["under"]))
        else:
            value = Fraction(part["plain"]) * Fraction(10) ** int(part.get("exponent", 0)) / Fraction(part.get("divisor", "1"))
    except ZeroDivisionError:
        return None
    return -value if _minus(found) else value


def _minus(found: re.Match[str]) -> bool:
    """Whether the sign belongs to the number: in `5-3` and `a-3` it does not."""
    before = found.string[found.start() - 1 : found.start()]
    return found["sign"] is not None and not (before.isalnum() or before == ")")


def _braced(text: str, start: int) -> str:
    """What is inside the brace at `start`; to the end where it is never closed."""
    level = 0
    for i in range(start, len(text)):
        level += (text[i] == "{") - (text[i] == "}")
        if level == 0:
            return text[start + 1 : i]
    return text[start + 1 :]
