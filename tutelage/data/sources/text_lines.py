"""Lines of data. They end in \\n, \\r\\n or \\r, and nowhere else: `str.splitlines` also cuts at form feeds, U+0085 and U+2028,
which are characters of a text."""

from __future__ import annotations

import re
from collections.abc import Iterator

_END = re.compile(r"\r\n|\n|\r")


def lines(text: str) -> Iterator[str]:
    """Lines with their ends; joined they are `text`."""
    start = 0
    for end in _END.finditer(text):
        yield text[start : end.end()]
        start = end.end()
    if start < len(text):
        yield text[start:]


def without_end(line: str) -> str:
    return line.rstrip("\r\n")
