"""Conversation rows as they come -> `Conversation`: OpenAI messages, ShareGPT, Alpaca, prompt/completion, question/answer.

| format | keys | becomes |
| --- | --- | --- |
| `openai` | messages [role, content, tool_calls, ...], tools | chat |
| `sharegpt` | conversations [from, value], system, tools | chat |
| `alpaca` | instruction, input, output, system, history | chat |
| `qa` | question, answer, system | chat |
| `completion` | prompt, completion: two strings | completion: no chat template |
| | prompt, completion: two lists of messages | chat, the completion's assistant turns supervised |

A row that cannot be trusted is a `DataError` with file, line and field; nothing is guessed or repaired silently.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tutelage.data import answers
from tutelage.data.mapping import mapped
from tutelage.data.tool_formats import parsed, read_calls, read_schemas
from tutelage.errors import ConfigError, DataError
from tutelage.records import Conversation, Message

Row = Mapping[str, Any]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool"}
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "function_call": "call", "tool_call": "call",
    "observation": "tool", "tool": "tool", "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
END_MARK = "<|endoftext|>"  # GPT-3 style completions end in it; the renderer puts the tokenizer's own end token there


class Parsed(NamedTuple):
    messages: list[Message]
    tools: list[dict[str, Any]]
    style: str = "chat"


def sniff(row: Row) -> str:
    """The format's name, from the row's keys. Raises `DataError` listing the known ones and the nearest."""
    for name, (keys, _) in FORMATS.items():
        if keys <= row.keys():
            return name
    if {"chosen", "rejected"} & row.keys():
        raise DataError(
            "this is a preference row, not a conversation",
            found=", ".join(row),
            expected=_known(),
            fix="read it with kind=preferences, for `tutelage prefer` and `tutelage reward`",
        )
    scores = {
        n: sum(bool(difflib.get_close_matches(k, row, 1, 0.7)) for k in keys) / len(keys) for n, (keys, _) in FORMATS.items()
    }
    near = max(scores, key=lambda name: scores[name])
    hint = f"nearest is {near} ({', '.join(sorted(FORMATS[near][0]))}); " if scores[near] else ""
    raise DataError(
        "unknown conversation format",
        found=f"keys {', '.join(map(str, row)) or '(none)'}",
        expected=_known(),
        fix=f"{hint}rename the keys, or map them: fields={{prompt: YOUR_KEY, completion: YOUR_KEY}}",
    )


def to_conversation(
    row: Row,
    *,
    file: str | Path | None = None,
    line: int | None = None,
    source: str | None = None,
    fmt: str | None = None,
    fields: Mapping[str, str] | None = None,
) -> Conversation:
    """The conversation of one row.

    `fmt` names the format (None: found from the keys). `fields` maps our names to the row's, as in
    `{"prompt": "question", "completion": "answer"}`. `source` defaults to `file#line`.
    Raises `DataError` (file, line, field, found, expected, fix) and `ConfigError` for an unknown `fmt`.
    """
    try:
        if not isinstance(row, Mapping):
            raise DataError("a row must be a JSON object", found=row, expected="{...}")
        row = _mapped(row, fields)
        name = fmt or sniff(row)
        if name not in FORMATS:
            near = difflib.get_close_matches(name, FORMATS, 1)
            raise ConfigError(
                "unknown conversation format",
                field="format",
                found=name,
                expected=_known(),
                fix=f"did you mean {near[0]}?" if near else None,
            )
        keys, parse = FORMATS[name]
        if absent := sorted(keys - row.keys()):
            raise DataError(
                f"the row is not in the {name} format",
                field=absent[0],
                found=f"keys {', '.join(row)}",
                expected=", ".join(sorted(keys)),
            )
        answer_key = ANSWER_KEYS.get(name)
        row, accepted = answers.answered(row, answer_key) if answer_key else (row, [])
        parsed = parse(row)
        check_order(parsed.messages)
    except DataError as error:
        raise error.but(file=file, line=line) from error
    where = source or (f"{file}#{line}" if file is not None else "memory")
    licence = row.get("licence") or row.get("license")
    meta = row["meta"] if isinstance(row.get("meta"), dict) else {}
    return Conversation.make(
        parsed.messages,
        source=where,
        tools=parsed.tools,
        style=parsed.style,
        meta=answers.with_accepted(meta, accepted),
        licence=licence if isinstance(licence, str) else None,
    )


def to_messages(rows: Any, field: str = "messages") -> list[Message]:
    """Messages of OpenAI's API (also what a server receives). Raises `DataError` naming the message and its key."""
    if not isinstance(rows, list | tuple) or not rows:
        raise DataError("no messages", field=field, found=rows, expected="a list of {role, content}")
    return [_message(row, f"{field}[{i}]") for i, row in enumerate(rows)]


def text_content(value: Any, field: str) -> str:
    """The text of a message's `content`: a string, null, or OpenAI's list of text parts. Raises `DataError` for anything else."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in value):
        return "".join(p["text"] for p in value)
    raise DataError(
        "content is not text",
        field=field,
        found=value,
        expected="a string, or a list of text parts",
        fix="write it as text" if isinstance(value, int | float | Mapping) else "remove images and other parts",
    )


# -- one function a format ------------------------------------------------------------------------------------------------


def _openai(row: Row) -> Parsed:
    return Parsed(to_messages(row["messages"]), read_schemas(row.get("tools") or row.get("functions"), "tools"))


def _sharegpt(row: Row) -> Parsed:
    return Parsed(sharegpt_turns(row), read_tools(row))


def read_tools(row: Row) -> list[dict[str, Any]]:
    return read_schemas(row.get("tools"), "tools")


def sharegpt_turns(row: Row) -> list[Message]:
    """Messages of ShareGPT's `conversations`. Raises `DataError` naming the turn."""
    rows, messages = row["conversations"], system_turn(row)
    if not isinstance(rows, list) or not rows:
        raise DataError("no turns", field="conversations", found=rows, expected="a list of {from, value}")
    for i, turn in enumerate(rows):
        field = f"conversations[{i}]"
        if not isinstance(turn, Mapping):
            raise DataError("a turn must be an object", field=field, found=turn, expected="{from, value}")
        speaker = turn.get("from", turn.get("role"))
        kind = _role(speaker, SHAREGPT_ROLES, f"{field}.from")
        value = text_content(turn.get("value", turn.get("content")), f"{field}.value")
        train = _train(turn, field)
        if kind != "call":
            messages.append(_checked(Message(role=kind, content=value, train=train), f"{field}.value"))
            continue
        calls = read_calls(parsed(value, f"{field}.value"), f"{field}.value")
        if messages and messages[-1].role == "assistant" and not messages[-1].tool_calls:
            messages[-1] = replace(messages[-1], tool_calls=calls)  # what it said, then what it calls: one turn
        else:
            messages.append(Message(role="assistant", content="", tool_calls=calls, train=train))
    return messages


def _alpaca(row: Row) -> Parsed:
    messages = system_turn(row)
    history = row.get("history") or []
    for i, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError("a history entry must be a pair", field=f"history[{i}]", found=pair, expected="[question, answer]")
        messages += [turn(role, pair[j], f"history[{i}][{j}]") for j, role in enumerate(("user", "assistant"))]
    asked = [text_content(row.get(key), key) for key in ("instruction", "input")]
    messages.append(turn("user", "\n\n".join(x for x in asked if x.strip()), "instruction"))
    messages.append(turn("assistant", row["output"], "output"))
    return Parsed(messages, [])


def _qa(row: Row) -> Parsed:
    return Parsed([*system_turn(row), turn("user", row["question"], "question"), turn("assistant", row["answer"], "answer")], [])


def _completion(row: Row) -> Parsed:
    prompt, answer = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(answer, list):
        before = [replace(m, train=False) if m.role == "assistant" else m for m in to_messages(prompt, "prompt")]
        return Parsed([*before, *to_messages(answer, "completion")], read_schemas(row.get("tools"), "tools"))
    for key in ("prompt", "completion"):
        if not isinstance(row[key], str):
            raise DataError(f"the {key} is not text", field=key, found=row[key], expected="two strings, or two lists of messages")
    messages = [turn("user", prompt, "prompt"), turn("assistant", answer.removesuffix(END_MARK), "completion")]
    return Parsed(messages, [], style="completion")


FORMATS: dict[str, tuple[frozenset[str], Callable[[Row], Parsed]]] = {
    "openai": (frozenset({"messages"}), _openai),
    "sharegpt": (frozenset({"conversations"}), _sharegpt),
    "completion": (frozenset({"prompt", "completion"}), _completion),
    "alpaca": (frozenset({"instruction", "output"}), _alpaca),
    "qa": (frozenset({"question", "answer"}), _qa),
}
ANSWER_KEYS = {"alpaca": "output", "qa": "answer"}  # of chat rows with one answer: a number, or a list of right ones, will do


# -- parts of rows --------------------------------------------------------------------------------------------------------


def _known() -> str:
    return "; ".join(f"{name} ({', '.join(sorted(keys))})" for name, (keys, _) in FORMATS.items())


def _mapped(row: Row, fields: Mapping[str, str] | None) -> Row:
    if not fields:
        return row
    named = mapped(row, fields)
    used = _KEYS | set(fields.values())  # the mapping alone says what the row is
    return {
        **{key: value for key, value in row.items() if key not in used},
        **named,
    }


_KEYS = frozenset().union(*(keys for keys, _ in FORMATS.values()))


def _role(value: Any, table: Mapping[str, str], field: str) -> str:
    if not isinstance(value, str) or value not in table:
        near = difflib.get_close_matches(str(value), table, 1, 0.5)
        raise DataError(
            "unknown role",
            field=field,
            found=value,
            expected=", ".join(table),
            fix=f"did you mean {near[0]}?" if near else "correct the role",
        )
    return table[value]


def turn(role: str, value: Any, field: str) -> Message:
    return _checked(Message(role=role, content=text_content(value, field)), field)


def _checked(message: Message, field: str) -> Message:
    """Empty is allowed for system and tool turns, and for an assistant that calls tools."""
    if message.role in ("user", "assistant") and not message.content.strip() and not message.tool_calls:
        what = "answer" if message.role == "assistant" else "question"
        raise DataError(f"empty {what}", field=field, found=message.content, expected="text", fix="fill it in, or remove the row")
    return message


def system_turn(row: Row) -> list[Message]:
    text = row.get("system") or ""
    return [turn("system", text, "system")] if text else []


def _message(row: Any, field: str) -> Message:
    if not isinstance(row, Mapping):
        raise DataError("a message must be an object", field=field, found=row, expected="{role, content}")
    if "role" not in row:
        raise DataError(
            "a message has no role", field=f"{field}.role", found=f"keys {', '.join(map(str, row))}", expected=", ".join(ROLES)
        )
    role = _role(row["role"], ROLES, f"{field}.role")
    said = row.get("tool_calls") or ([row["function_call"]] if row.get("function_call") else [])
    calls = read_calls(said, f"{field}.tool_calls")
    if calls and role != "assistant":
        raise DataError(
            "only an assistant turn calls tools",
            field=f"{field}.tool_calls",
            found=f"role {row['role']}",
            expected="role assistant",
        )
    if row.get("content") is None and not calls:
        raise DataError(
            "a message has no content", field=f"{field}.content", found=f"keys {', '.join(map(str, row))}", expected="text"
        )
    content = text_content(row.get("content"), f"{field}.content")
    name, answers = (row.get(key) if isinstance(row.get(key), str) else None for key in ("name", "tool_call_id"))
    message = Message(role=role, content=content, name=name, tool_calls=calls, tool_call_id=answers, train=_train(row, field))
    return _checked(message, f"{field}.content")


def _train(row: Row, field: str) -> bool | None:
    """`train: false`, or OpenAI's `weight: 0`, leaves an assistant turn out of the loss."""
    for key in ("train", "weight"):
        if (value := row.get(key)) is not None:
            if value not in (0, 1):
                raise DataError(
                    "a turn is trained on or not", field=f"{field}.{key}", found=value, expected="true, false, 0 or 1"
                )
            return bool(value)
    return None


_BEFORE: dict[str, tuple[str | None, ...]] = {  # role -> the roles it may follow; None is the beginning
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def check_order(messages: Sequence[Message], places: Sequence[str] | None = None) -> None:
    """Raises `DataError` for roles in an order that no dialogue has, and where there is nothing to learn from. `places`: where
    in its row each message stands, if not in `messages`."""
    previous: str | None = None
    called = False
    for i, message in enumerate(messages):
        allowed: Iterable[str | None] = _BEFORE[message.role]
        if previous not in allowed or (message.role == "tool" and not called):
            expected = (
                "a tool turn after an assistant turn with tool_calls"
                if message.role == "tool"
                else " or ".join(a or "the beginning" for a in allowed) + " before it"
            )
            raise DataError(
                "roles are out of order",
                field=places[i] if places else f"messages[{i}].role",
                found=f"{message.role} after {previous or 'the beginning'}",
                expected=expected,
                fix="join turns of one speaker, or remove the row",
            )
        called = bool(message.tool_calls) if message.role != "tool" else called
        previous = message.role
    if not any(m.role == "assistant" and m.train is not False for m in messages):
        raise DataError(
            "no assistant turn to learn from",
            field=places[-1] if places else "messages",
            found=" ".join(m.role for m in messages),
            expected="an assistant turn",
        )
