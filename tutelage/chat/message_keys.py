"""What a message may say. A key is read, or refused by name: what a message says is there to be learnt, so none is ignored."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from tutelage.errors import DataError

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of what the assistant thought before it answered, in the order in which `transformers` looks for them. A record has the
first."""
LOSS = ("train", "trainable", "loss", "loss_mask", "weight")
"""Names of whether an assistant turn is learnt."""
SPOKEN = ("role", "content", "name", "tool_calls", "tool_call_id", *REASONING)
"""Keys of a message that a chat template can read."""
KEYS = (*SPOKEN, "function_call", *LOSS)
"""Keys of a message in a row of training data."""
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
TEXT_PARTS = ("text", "input_text", "output_text")


def says_nothing(value: Any) -> bool:
    """Whether a value is absent: Parquet gives a row the keys of all others, as null or an empty list."""
    return value is None or value == [] or value == {}


def refuse_unknown(row: Mapping[str, Any], known: Iterable[str], field: str, what: str = "message") -> None:
    """Raises `DataError` for a key outside `known`, with the nearest one."""
    names = tuple(known)
    for key, value in row.items():
        if key in names or says_nothing(value):
            continue
        if key in MEDIA:
            raise DataError(
                "only text is learnt and read", field=f"{field}.{key}", found=value, expected="content of text",
                fix="remove images and other parts, or the row",
            )  # fmt: skip
        near = difflib.get_close_matches(str(key), names, 1, 0.6)
        hint = f"did you mean `{near[0]}`? If not, take" if near else "take"
        raise DataError(
            f"unknown key of a {what}", field=f"{field}.{key}", found=value, expected=", ".join(names),
            fix=f"{hint} the key out",
        )  # fmt: skip


def text_content(value: Any, field: str) -> str:
    """The text of a message's `content`: a string, null, or OpenAI's list of text parts. Raises `DataError` for anything else."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(p, Mapping) and _is_text(p) for p in value):
        for i, part in enumerate(value):
            refuse_unknown(part, ("type", "text"), f"{field}[{i}]", "part of content")
        return "".join(p["text"] for p in value)
    raise DataError(
        "content is not text",
        field=field,
        found=value,
        expected="a string, or a list of text parts",
        fix="write it as text" if isinstance(value, int | float | Mapping) else "remove images and other parts",
    )


def _is_text(part: Mapping[str, Any]) -> bool:
    return isinstance(part.get("text"), str) and part.get("type") in (None, *TEXT_PARTS)


def reasoning_of(row: Mapping[str, Any], role: str, field: str) -> str | None:
    """What the assistant thought, by any of its names. Raises `DataError` for two that differ, and in another's turn."""
    given = {key: text_content(row[key], f"{field}.{key}") for key in REASONING if not says_nothing(row.get(key))}
    if not given:
        return None
    key = next(iter(given))
    if len(set(given.values())) > 1:
        raise DataError(
            "a turn has one reasoning", field=f"{field}.{key}", found=", ".join(given), expected="one of them",
            fix="leave the others out",
        )  # fmt: skip
    if given[key] and role != "assistant":
        raise DataError(
            "only an assistant turn has reasoning", field=f"{field}.{key}", found=f"role {role}", expected="role assistant",
            fix="move it into the assistant's turn, or into its content",
        )  # fmt: skip
    return given[key] if role == "assistant" else None


def trained(row: Mapping[str, Any], role: str, field: str) -> bool | None:
    """Whether the turn is learnt, by any of the names of `LOSS`; OpenAI has `weight: 0`. None where nothing is said.

    Raises `DataError` for a share, for two that contradict each other, and for the wish to learn what others say.
    """
    given: dict[str, bool] = {}
    for key in LOSS:
        if (value := row.get(key)) is not None:
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise DataError(
                    "a turn is trained on or not", field=f"{field}.{key}", found=value, expected="true, false, 0 or 1",
                    fix="give one of these",
                )  # fmt: skip
            given[key] = bool(value)
    if not given:
        return None
    key, value = next(iter(given.items()))
    if len(set(given.values())) > 1:
        raise DataError(
            "a turn is trained on or not", field=f"{field}.{key}", found=", ".join(f"{k} {v}" for k, v in given.items()),
            expected="keys that agree", fix="leave one of them out",
        )  # fmt: skip
    if role != "assistant" and value:
        raise DataError(
            "only an assistant turn is trained on", field=f"{field}.{key}", found=f"{value} in a turn of the {role}",
            expected="false, or no such key", fix="take the key out",
        )  # fmt: skip
    return value


def optional_text(row: Mapping[str, Any], key: str, field: str) -> str | None:
    """The text at `key`. Raises `DataError` for what is none."""
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"`{key}` is not text", field=f"{field}.{key}", found=value, expected="a string", fix="write it as text")
    return value
