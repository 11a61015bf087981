"""Text that no file and no tokenizer takes: half a surrogate pair, which JSON can write and UTF-8 cannot."""

from __future__ import annotations

from typing import Any

HALF = "half a character (a lone surrogate)"


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
