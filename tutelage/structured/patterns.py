"""How large a regular expression is once its repeats are written out: nested repeats take a lexer minutes."""

from __future__ import annotations

import re

from tutelage.errors import ConfigError

MAX_PLACES = 10_000

_PART = re.compile(r"(?P<repeat>\{(?P<least>\d+)(?:,(?P<most>\d*))?\})|(?P<class>\[\^?\]?(?:\\.|[^\]\\])*\])|\\.|.", re.DOTALL)


def places(pattern: str) -> int:
    """Characters of a pattern once every {m,n} is written out.

    Example:
        >>> places("(ab{3}){10}")
        40
    """
    groups = [[0, 0]]  # of each open group: places so far, and those of its last part
    for part in _PART.finditer(pattern):
        text = part[0]
        if part["repeat"]:
            factor = max(int(part["most"] or part["least"]), 1)
            groups[-1][0] += groups[-1][1] * (factor - 1)
            groups[-1][1] *= factor
        elif text == "(":
            groups.append([0, 0])
        elif text not in ("*", "+", "?", "|"):
            size = max(groups.pop()[0], 1) if text == ")" and len(groups) > 1 else 1
            groups[-1][0] += size
            groups[-1][1] = size
    return sum(total for total, _ in groups)


def check_pattern(pattern: str, field: str) -> None:
    """Raises `ConfigError` for a pattern whose repeats are too large to compile in bounded time."""
    if (found := places(pattern)) > MAX_PLACES:
        raise ConfigError(
            "the pattern's repeats are too large", field=field, found=f"{found:,} places with its repeats written out",
            expected=f"at most {MAX_PLACES:,}", fix="nest fewer {m,n}, or use + and *",
        )  # fmt: skip
