"""Messages as a template sees them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tutelage.chat.message_keys import LOSS, REASONING, SPOKEN, reasoning_of, refuse_unknown, text_content
from tutelage.chat.tool_formats import arguments_of
from tutelage.records import Message


def plain_messages(messages: Iterable[Message | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as a template sees them: `content` is text, arguments of tool calls are objects, empty keys are absent. Reasoning
    has all of its names, since templates read one or another; `transformers` fills them in likewise.

    Raises `DataError` for content that is not text (images), and for a key that no template reads.
    """
    out = []
    for i, message in enumerate(messages):
        row = message.to_json() if isinstance(message, Message) else dict(message)
        refuse_unknown(row, (*SPOKEN, *LOSS), f"messages[{i}]")
        plain: dict[str, Any] = {"role": row["role"], "content": text_content(row.get("content"), f"messages[{i}].content")}
        plain.update({key: row[key] for key in ("name", "tool_call_id") if row.get(key) is not None})
        if (thought := reasoning_of(row, row["role"], f"messages[{i}]")) is not None:
            plain.update(dict.fromkeys(REASONING, thought))
        if row.get("tool_calls"):
            plain["tool_calls"] = [_plain_call(call) for call in row["tool_calls"]]
        out.append(plain)
    return out


def _plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's API carries arguments as a JSON string; templates write objects. A string that spells no object, such as that of a
    call which was cut off, stays what it is, as `transformers` leaves it, so that a conversation can go on behind it."""
    function = dict(call["function"])
    return {**call, "function": {**function, "arguments": arguments_of(function.get("arguments"))}}
