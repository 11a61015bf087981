"""Tools and their calls as rows carry them -> OpenAI's shape, as templates write it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tutelage.chat.message_keys import optional_text, refuse_unknown
from tutelage.errors import DataError

FUNCTION = ("name", "arguments", "parameters")
"""Keys of a call's function. Some write its arguments as `parameters`, as Llama 3 does."""


def read_calls(value: Any, field: str) -> tuple[dict[str, Any], ...]:
    rows = value if isinstance(value, list | tuple) else [value]
    return tuple(_call(row, f"{field}[{i}]" if isinstance(value, list | tuple) else field, i) for i, row in enumerate(rows))


def _call(row: Any, field: str, number: int) -> dict[str, Any]:
    """A tool call in OpenAI's shape; arguments as an object."""
    function = row.get("function", row) if isinstance(row, Mapping) else row
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(
            "a tool call has no name", field=field, found=row, expected='{"function": {"name": ..., "arguments": ...}}'
        )
    around = ("id", "type", "index")
    if function is row:
        refuse_unknown(row, (*around, *FUNCTION), field, "tool call")
    else:
        refuse_unknown(row, (*around, "function"), field, "tool call")
        refuse_unknown(function, FUNCTION, f"{field}.function", "tool call's function")
    check_kind(row, number, field)
    if function.get("arguments") is not None and function.get("parameters") is not None:
        raise DataError(
            "a call has its arguments twice", field=f"{field}.parameters", found=function["parameters"],
            expected="arguments alone", fix="leave one of them out",
        )  # fmt: skip
    key = "parameters" if function.get("arguments") is None and function.get("parameters") is not None else "arguments"
    arguments = read_arguments(function.get(key), f"{field}.{key}")
    out: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    name = optional_text(row, "id", field)
    return out if name is None else {"id": name, **out}


def check_kind(call: Mapping[str, Any], number: int, field: str) -> None:
    """Raises `DataError` for another kind of call than of a function, and for one in another's place. A stream's pieces have an
    `index`, which says nothing else."""
    for key, expected in (("type", "function"), ("index", number)):
        if call.get(key) not in (None, expected):
            raise DataError(
                f"a call with another {key}", field=f"{field}.{key}", found=call[key], expected=str(expected), fix="correct it"
            )


def read_arguments(value: Any, field: str) -> dict[str, Any]:
    """The arguments of a call, given as an object or as the JSON of one. A call without arguments is often written with "", with
    "null" or with none at all. Raises `DataError` for what is no object."""
    found = arguments_of(value)
    if not isinstance(found, dict):
        raise DataError(
            "the arguments of a call are not a JSON object", field=field, found=value,
            expected='an object, such as {"city": "Graz"}', fix="correct the call, or remove the row",
        )  # fmt: skip
    return found


def arguments_of(value: Any) -> Any:
    """An object where `value` is one, spells one, or says nothing; anything else as it is."""
    if isinstance(value, str):
        if not value.strip():
            return {}
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
    else:
        found = value
    return {} if found is None else found if isinstance(found, dict) else value


def read_schemas(value: Any, field: str) -> list[dict[str, Any]]:
    """Tool schemas word for word; a bare function gets the envelope that templates expect."""
    if isinstance(value, str):
        value = parsed(value, field) if value.strip() else []
    tools = value or []
    if not isinstance(tools, list) or not all(
        isinstance(t, dict) and isinstance(t.get("function", t), dict) and isinstance(t.get("function", t).get("name"), str)
        for t in tools
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
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error})", field=field, found=text, expected="a JSON object") from error
