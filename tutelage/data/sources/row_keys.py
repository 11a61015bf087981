"""Keys of a row next to its dialogue: kept in `meta`, or refused if they would change what is learned."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

from tutelage.chat.message_keys import LOSS, MEDIA, REASONING, says_nothing, text_content
from tutelage.errors import DataError, Setting
from tutelage.records import Message

DIALOGUE = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history", "question")
"""Keys that hold a part of a dialogue in one format or another."""
ASKED = ("messages", "conversations", "prompt", "question")
LICENCE = ("licence", "license")
SHARED = ("system", "tools", "functions", "meta", *LICENCE)
"""Keys that every format reads."""
OF_MESSAGES = frozenset({*REASONING, *LOSS, "tool_calls", "function_call", "tool_call_id"})
SYSTEM = frozenset({"systemprompt", "systemmessage", "systeminstruction", "systeminstructions", "sysprompt"})
OURS = frozenset({"split", "split_kind", "family", "answer", "accepted"})
"""Names that mean something in `meta`; a row's own of that name is kept in `meta["row"]`."""


def system_of(row: Mapping[str, Any]) -> str:
    """The row's system prompt, "" where it has none. Raises `DataError`."""
    return text_content(row.get("system"), "system")


def with_system(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """The turns behind the row's system prompt. Raises `DataError` where they begin with another one."""
    text = system_of(row)
    if not text.strip():
        return turns
    return [Message(role="system", content=text), *without_system(row, turns)]


def without_system(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """The turns without the system prompt that the row gives apart."""
    text = system_of(row)
    if not text.strip() or not turns or turns[0].role != "system":
        return turns
    if turns[0].content.strip() != text.strip():
        raise DataError(
            "the row has two system prompts", field="system", found=text, expected=turns[0].content, fix="leave one of them out"
        )
    return turns[1:]


def behind_system(row: Mapping[str, Any], text: str) -> str:
    """A prompt that no chat template is put around, behind the row's system prompt."""
    said = system_of(row)
    return f"{said}\n\n{text}" if said.strip() else text


def licence_of(row: Mapping[str, Any]) -> str | None:
    return next((row[key] for key in LICENCE if isinstance(row.get(key), str) and row[key]), None)


def meta_of(
    row: Mapping[str, Any], read: Iterable[str], turns: Iterable[Message], *, named: bool = False,
    reserved: frozenset[str] | None = OURS,
) -> dict[str, Any]:  # fmt: skip
    """The row's `meta`, with every key that its format does not `read`.

    A key that holds another part of a dialogue is refused, unless it repeats what the `turns` say, or the row's format was
    `named`. Refused too are keys that belong in a message, and misspelt ones. `reserved` names are kept in `meta["row"]`;
    None is for rows whose keys are there for verifiers, of which few are refused. Raises `DataError` naming the key.
    """
    given = _meta(row.get("meta"))
    known = {*read, *SHARED}
    said = {m.content.strip() for m in turns}
    rest: dict[str, Any] = {}
    for key, value in row.items():
        unread = key in LICENCE and value != licence_of(row)
        if (key in known and not unread) or says_nothing(value) or value == "":
            continue
        if key in (DIALOGUE if reserved is not None else ASKED) and not named:
            if set(_texts(value)) <= said:
                continue
            raise DataError(
                f"the row has `{key}` too, and only one of both can be the dialogue", field=key, found=value,
                expected=f"{', '.join(sorted(k for k in known if k in row))} alone",
                fix=f"take `{key}` out, or rename it to keep it in meta",
            )  # fmt: skip
        name = str(key)
        _refuse(name, value, known, row, strict=reserved is not None)
        target = rest.setdefault("row", {}) if name in (reserved or ()) else rest
        target[name] = _plain(value)
    twice = [key for key in rest if key in given and given[key] != rest[key]]
    if twice:
        raise DataError(
            f"`{twice[0]}` differs between row and `meta`", field=twice[0], found=rest[twice[0]], expected=given[twice[0]],
            fix="leave one of them out",
        )  # fmt: skip
    return {**rest, **given}


def with_beside(meta: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """`meta` with what the row has under names that its mapping gives to others."""
    left = {str(key): _plain(value) for key, value in beside.items() if not says_nothing(value) and value != ""}
    return {**meta, "row": {**meta.get("row", {}), **left}} if left else dict(meta)


def kept_keys(row: Mapping[str, Any], meta: Mapping[str, Any]) -> set[str]:
    """The row's keys that went into its record's `meta`."""
    own, apart = _meta(row.get("meta")), meta.get("row")
    inner = set(apart) if isinstance(apart, Mapping) and "row" not in own else set()
    return {str(key) for key in row if key not in own and (key in meta or key in inner)}


def _meta(value: Any) -> dict[str, Any]:
    """An object, or the JSON of one, as CSV has it."""
    found = value
    if isinstance(value, str) and value.strip():
        try:
            found = json.loads(value)
        except ValueError:
            found = value
    if isinstance(found, Mapping):
        return dict(found)
    if not says_nothing(found) and found != "":
        raise DataError("`meta` is an object", field="meta", found=value, expected="{…}", fix="rename it, or write an object")
    return {}


def _refuse(key: str, value: Any, known: set[str], row: Mapping[str, Any], *, strict: bool) -> None:
    """Raises `DataError` for a key that must not end in `meta`, where nothing is learnt from it."""
    if key in OF_MESSAGES and strict:
        raise DataError(
            f"`{key}` belongs in a message", field=key, found=value, expected="messages that have it",
            fix=f'write the row as {{"messages": [{{"role": "assistant", "content": …, "{key}": …}}]}}, or rename the key',
        )  # fmt: skip
    if key in MEDIA:
        raise DataError(
            "only text can be trained on",
            field=key,
            found=value,
            expected="rows of text",
            fix="remove images and other media, or the row",
        )
    meant = "system" if "".join(c for c in key.lower() if c.isalpha()) in SYSTEM else None
    near = [meant] if meant else difflib.get_close_matches(key, sorted(known), 1, 0.8 if strict else 0.9)
    if near and near[0] not in row:
        raise DataError(
            "unknown key of a row", field=key, found=value, expected=", ".join(sorted(known)),
            fix=f"did you mean `{near[0]}`? Rename it, or map it: {Setting('fields', f'{{{near[0]}: {key}}}')}",
        )  # fmt: skip


def _texts(value: Any) -> list[str]:
    """All texts of a part of a dialogue: of messages, of turns, of pairs."""
    if isinstance(value, Mapping):
        return [text for key in ("content", "value", "text") for text in _texts(value.get(key))]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return [] if value is None else [str(value).strip()]


def _plain(value: Any) -> Any:
    """A value that JSON can hold: dates and decimals of Parquet become texts."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
