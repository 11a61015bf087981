"""Tools and their calls as rows carry them -> OpenAI's shape, as templates write it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tutelage.errors import DataError


def read_calls(value: Any, field: str) -> tuple[dict[str, Any], ...]:
    rows = value if isinstance(value, list | tuple) else [value]
    return tuple(_call(row, f"{field}[{i}]" if isinstance(value, list | tuple) else field) for i, row in enumerate(rows))


def _call(row: Any, field: str) -> dict[str, Any]:
    """A tool call in OpenAI's shape; arguments as an object where they are one."""
    function = row.get("function", row) if isinstance(row, Mapping) else row
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(
            "a tool call has no name", field=field, found=row, expected='{"function": {"name": ..., "arguments": ...}}'
        )
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = parsed(arguments or "{}", f"{field}.arguments")
    out: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": row["id"], **out} if isinstance(row.get("id"), str) else out


def read_schemas(value: Any, field: str) -> list[dict[str, Any]]:
    """Tool schemas word for word; a bare function gets the envelope that templates expect."""
    if isinstance(value, str):
        value = parsed(value, field) if value.strip() else []
    tools = value or []
    if not isinstance(tools, list) or not all(
        isinstance(t, dict) and isinstance(t.get("function", t).get("name"), str) for t in tools
    ):
        raise DataError(
            "tools are not a list of functions",
            field=field,
            found=value,
            expected='[{"type": "function", "function": {"name": ...}}]',
        )
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def parsed(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"not valid JSON ({error})", field=field, found=text, expected="a JSON object") from error
