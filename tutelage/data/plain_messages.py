"""Messages as a template sees them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tutelage.data.formats import text_content
from tutelage.records import Message


def plain_messages(messages: Iterable[Message | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as a template sees them: `content` is text, arguments of tool calls are objects, empty keys are absent.

    Raises `DataError` for content that is not text (images).
    """
    out = []
    for i, message in enumerate(messages):
        row = message.to_json() if isinstance(message, Message) else dict(message)
        plain: dict[str, Any] = {"role": row["role"], "content": text_content(row.get("content"), f"messages[{i}].content")}
        plain.update({key: row[key] for key in ("name", "tool_call_id") if row.get(key) is not None})
        if row.get("tool_calls"):
            plain["tool_calls"] = [_plain_call(call) for call in row["tool_calls"]]
        out.append(plain)
    return out


def _plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's API carries arguments as a JSON string; templates write objects."""
    function = dict(call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments or "{}")
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            function["arguments"] = parsed
    return {**call, "function": function}
