"""Items: what goes into a response and what comes out of it; how a conversation of them reads as messages."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tutelage.serve.schema import ApiError

Item = dict[str, Any]
"""An item as clients read it, with its id and status; made by `read_input` and by `Draft`."""

Model = TypeVar("Model", bound=BaseModel)
Status = Literal["in_progress", "completed", "incomplete"]
PREFIX = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Message(_Strict):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Any
    id: str | None = None
    status: Status = "completed"


class _Part(_Strict):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] = []  # notes on a text that was given out before; the model reads the text
    logprobs: list[Any] = []


class _Call(_Strict):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status = "completed"


class _Output(_Strict):
    type: Literal["function_call_output"]
    call_id: str
    output: Any
    id: str | None = None
    status: Status = "completed"


class _Reasoning(_Strict):
    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] = []
    content: list[Any] = []
    encrypted_content: str = ""
    status: Status | None = None


KINDS: dict[str, type[_Message | _Call | _Output | _Reasoning]] = {
    "message": _Message, "function_call": _Call, "function_call_output": _Output, "reasoning": _Reasoning,
}  # fmt: skip


def read(kind: type[Model], value: Any, where: str) -> Model:
    """The object at `where` in the request; keys that are null are absent. Raises `ApiError` naming the exact place."""
    if not isinstance(value, dict):
        raise ApiError(400, f"{where} must be an object", param=where)
    try:
        return kind.model_validate({key: given for key, given in value.items() if given is not None})
    except ValidationError as error:
        first = error.errors()[0]
        param = where + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"{param} is not supported by this server", param=param, code="unsupported_parameter") from error
        raise ApiError(400, f"{param}: {first['msg']}", param=param) from error


def new_id(kind: str) -> str:
    return f"{PREFIX[kind]}_{uuid.uuid4().hex}"


def read_input(given: str | list[Any]) -> list[Item]:
    """The items of a request's `input`, complete. Raises `ApiError` naming the item and what is wrong with it."""
    rows = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return [_item(row, f"input[{i}]") for i, row in enumerate(rows)]


def messages(items: Iterable[Item]) -> list[dict[str, Any]]:
    """The conversation as chat messages. What the assistant says and calls between two others' turns is one turn of its own."""
    out: list[dict[str, Any]] = []
    for item in items:
        if item["type"] == "message":
            text = "".join(part["text"] for part in item["content"])
            if item["role"] == "assistant" and out and out[-1].get("tool_calls"):
                out[-1]["content"] += text
            else:
                out.append({"role": item["role"], "content": text})
        elif item["type"] == "function_call":
            if not out or out[-1]["role"] != "assistant":
                out.append({"role": "assistant", "content": ""})
            function = {"name": item["name"], "arguments": item["arguments"]}
            out[-1].setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
        elif item["type"] == "function_call_output":
            given = item["output"]
            text = given if isinstance(given, str) else "".join(part["text"] for part in given)
            out.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})
    return out


def _item(row: Any, where: str) -> Item:
    kind = row.get("type") or ("message" if "role" in row else None) if isinstance(row, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        said = f"items of type {kind!r} are not supported" if kind else "an item has a type"
        raise ApiError(400, f"{where}: {said}; this server takes {', '.join(KINDS)}", param=f"{where}.type")
    found = read(KINDS[kind], row, where)
    item: Item = {"id": found.id or new_id(kind), "type": kind, "status": found.status}
    if isinstance(found, _Message):
        parts = _parts(found.content, f"{where}.content", said=found.role == "assistant")
        return item | {"role": found.role, "content": parts}
    if isinstance(found, _Call):
        return item | {"call_id": found.call_id, "name": found.name, "arguments": found.arguments}
    if isinstance(found, _Output):
        output = found.output if isinstance(found.output, str) else _parts(found.output, f"{where}.output", said=False)
        return item | {"call_id": found.call_id, "output": output}
    # An item that says nothing can be left out of what the model reads. One with thoughts in it cannot: this server makes none,
    # a summary is not what was thought, and nobody can read encrypted ones.
    if found.summary or found.content or found.encrypted_content:
        raise ApiError(400, f"{where}: reasoning items are only taken when they are empty", param=where)
    return item | {"summary": []}


def _parts(content: Any, where: str, said: bool) -> list[dict[str, Any]]:
    """Parts of text, as what the assistant said or as what it was told."""
    if isinstance(content, str):
        texts = [content]
    elif isinstance(content, list):
        texts = [_text(part, f"{where}[{i}]") for i, part in enumerate(content)]
    else:
        raise ApiError(400, f"{where} is a text or a list of parts", param=where)
    return [output_text(text) if said else {"type": "input_text", "text": text} for text in texts]


def _text(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("input_text", "output_text"):
        raise ApiError(400, f"{where}: parts of type {kind!r} are not supported by this server, only text", param=f"{where}.type")
    return read(_Part, part, where).text


def output_text(text: str, logprobs: Iterable[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
