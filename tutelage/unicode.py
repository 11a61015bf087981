"""Text that no file and no tokenizer takes, and text that a terminal would obey."""

from __future__ import annotations

import re
from typing import Any

HALF = "half a character (a lone surrogate)"  # half of a surrogate pair, which JSON can write and UTF-8 cannot
CONTROL = "\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"
UNPRINTABLE_IN_LINES = re.compile(f"[{CONTROL}]")
UNPRINTABLE = re.compile(f"[{CONTROL}\\t\\n\\u2028\\u2029\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069]")


def half_character(value: Any) -> str | None:
    """Where in a JSON value half a character is, such as `messages[1].content`; None for text that is whole.

    Example:
        >>> half_character({"messages": [{"content": "a"}, {"content": "\\ud83d"}]})
        'messages[1].content'
    """
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        at, part = waiting.pop()
        if isinstance(part, str):
            if not is_whole(part):
                return at
        elif isinstance(part, dict):
            waiting += [(f"{at}.{key}" if at else f"{key}", inner) for key, inner in part.items()]
            if any(isinstance(key, str) and not is_whole(key) for key in part):
                return f"{at} (a key)".lstrip()
        elif isinstance(part, list | tuple):
            waiting += [(f"{at}[{i}]", inner) for i, inner in enumerate(part)]
    return None


def is_whole(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str, *, lines: bool = False) -> str:
    """`text` with what a terminal would obey, or no file could hold, in escapes: control characters, marks that turn the
    direction of writing, bytes of a name that are not UTF-8. `lines=True` leaves line ends, tabs and the marks as they are.

    Example:
        >>> print(printable("a\\x1b[31m.txt"))
        a\\x1b[31m.txt
    """
    if text.isprintable():
        return text
    return (UNPRINTABLE_IN_LINES if lines else UNPRINTABLE).sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # how Python has a byte that is not UTF-8
        code -= 0xDC00
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(found[0]) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
