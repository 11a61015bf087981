"""Conversation rows as they come -> `Conversation`: OpenAI messages, ShareGPT, Alpaca, prompt/completion, question/answer.

| format | keys | becomes |
| --- | --- | --- |
| `messages` | messages [role, content, tool_calls, reasoning_content, ...] | chat |
| `sharegpt` | conversations [from, value] | chat |
| `prompt_completion` | prompt, completion: two strings | completion: no chat template |
| | prompt, completion: two lists of messages | chat, the completion's assistant turns supervised |
| `alpaca` | instruction, input, output, history | chat |
| `qa` | question, answer | chat |

All have `system` (of two strings it becomes the first paragraph), and those that become chat have `tools`. Other keys of a row go
into `meta`, those of a message are refused: see `row_keys.py` and `message_keys.py`.

A row that cannot be trusted is a `DataError` with file, line and field; nothing is guessed or repaired silently.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tutelage.chat.message_keys import (
    KEYS,
    LOSS,
    REASONING,
    optional_text,
    reasoning_of,
    refuse_unknown,
    says_nothing,
    text_content,
    trained,
)
from tutelage.chat.tool_formats import parsed, read_calls, read_schemas
from tutelage.data.sources import answers
from tutelage.data.sources.mapping import mapped
from tutelage.data.sources.row_keys import behind_system, licence_of, meta_of, with_beside, with_system
from tutelage.errors import ConfigError, DataError, Setting
from tutelage.records import Conversation, Message

Row = Mapping[str, Any]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool"}
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "function_call": "call", "tool_call": "call",
    "observation": "tool", "tool": "tool", "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
SHAREGPT_KEYS = ("from", "value", "role", "content")
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
            fix=f"read it with {Setting('kind', 'preferences')}, for `tutelage preference` and `tutelage reward`",
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
        fix=f"{hint}rename the keys, or map them: {Setting('fields', '{prompt: YOUR_KEY, completion: YOUR_KEY}')}",
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
        row, beside = _mapped(row, fields)
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
        check_order(parsed.messages, places_of(row, name, len(parsed.messages)))
        read = {*keys, *OPTIONAL.get(name, ())}
        named = fmt is not None or bool(fields and _KEYS & fields.keys())
        meta = with_beside(meta_of(row, read, parsed.messages, named=named), beside)
    except DataError as error:
        raise error.but(file=file, line=line) from error
    where = source or (f"{file}#{line}" if file is not None else "memory")
    return Conversation.make(
        parsed.messages,
        source=where,
        tools=parsed.tools,
        style=parsed.style,
        licence=licence_of(row),
        meta=answers.with_accepted(meta, accepted),
    )


def places_of(row: Row, name: str, count: int) -> list[str] | None:
    """Where the messages stand, in a row that has its system prompt apart from them."""
    if name != "messages" or len(row["messages"]) == count:
        return None
    return ["system", *(f"messages[{i}].role" for i in range(count - 1))]


def to_messages(rows: Any, field: str = "messages") -> list[Message]:
    """Messages of OpenAI's API (also what a server receives). Raises `DataError` naming the message and its key."""
    if not isinstance(rows, list | tuple) or not rows:
        raise DataError("no messages", field=field, found=rows, expected="a list of {role, content}")
    return [_message(row, f"{field}[{i}]") for i, row in enumerate(rows)]


# -- one function a format ------------------------------------------------------------------------------------------------


def _messages(row: Row) -> Parsed:
    return Parsed(with_system(row, to_messages(row["messages"])), read_tools(row))


def _sharegpt(row: Row) -> Parsed:
    return Parsed(with_system(row, sharegpt_turns(row)), read_tools(row))


def read_tools(row: Row) -> list[dict[str, Any]]:
    """The functions that the row offers. Raises `DataError` for two lists of them."""
    if row.get("tools") and row.get("functions"):
        raise DataError(
            "the row has its tools twice", field="functions", found=row["functions"], expected="tools alone", fix="leave one out"
        )
    key = "functions" if row.get("functions") else "tools"
    return read_schemas(row.get(key), key)


def sharegpt_turns(row: Row) -> list[Message]:
    """Messages of ShareGPT's `conversations`. Raises `DataError` naming the turn."""
    rows: Any = row["conversations"]
    messages: list[Message] = []
    if not isinstance(rows, list) or not rows:
        raise DataError("no turns", field="conversations", found=rows, expected="a list of {from, value}")
    for i, said in enumerate(rows):
        field = f"conversations[{i}]"
        if not isinstance(said, Mapping):
            raise DataError("a turn must be an object", field=field, found=said, expected="{from, value}")
        refuse_unknown(said, (*SHAREGPT_KEYS, *REASONING, *LOSS), field, "turn")
        speaker, text = (_either(said, *names, field) for names in (("from", "role"), ("value", "content")))
        kind = _role(speaker, SHAREGPT_ROLES, f"{field}.from")
        value = text_content(text, f"{field}.value")
        role = "assistant" if kind == "call" else kind
        train, thought = trained(said, role, field), reasoning_of(said, role, field)
        if kind != "call":
            message = Message(role=kind, content=value, reasoning_content=thought, train=train)
            messages.append(_checked(message, f"{field}.value"))
            continue
        calls = read_calls(parsed(value, f"{field}.value"), f"{field}.value")
        if messages and messages[-1].role == "assistant" and not messages[-1].tool_calls:
            # What it said, then what it calls: one turn.
            messages[-1] = replace(_goes_on(messages[-1], thought, train, field), tool_calls=calls)
        else:
            messages.append(Message(role="assistant", content="", reasoning_content=thought, tool_calls=calls, train=train))
    return messages


def _either(said: Mapping[str, Any], key: str, other: str, field: str) -> Any:
    """A turn's value under one of two names. Raises `DataError` for two that differ."""
    if None not in (said.get(key), said.get(other)) and said[key] != said[other]:
        raise DataError(
            f"a turn has `{key}` and `{other}`", field=f"{field}.{other}", found=said[other], expected=str(said[key]),
            fix="leave one of them out",
        )  # fmt: skip
    return said.get(other) if said.get(key) is None else said[key]


def _goes_on(before: Message, thought: str | None, train: bool | None, field: str) -> Message:
    """The turn that a call goes on with. Raises `DataError` where the two cannot be one."""
    if thought:
        raise DataError(
            "a call behind an answer is part of that turn, which thinks before it answers", field=f"{field}.reasoning_content",
            found=thought, expected="reasoning in the turn before", fix="move it there",
        )  # fmt: skip
    if train is not None and train != (before.train is not False):
        raise DataError(
            "an answer and the call behind it are one turn, which is learnt or not", field=field, found=f"train {train}",
            expected=f"train {before.train is not False}", fix="give both the same",
        )  # fmt: skip
    return before


def _alpaca(row: Row) -> Parsed:
    messages: list[Message] = []
    history = row.get("history") or []
    for i, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError("a history entry must be a pair", field=f"history[{i}]", found=pair, expected="[question, answer]")
        messages += [turn(role, pair[j], f"history[{i}][{j}]") for j, role in enumerate(("user", "assistant"))]
    asked = [text_content(row.get(key), key) for key in ("instruction", "input")]
    messages.append(turn("user", "\n\n".join(x for x in asked if x.strip()), "instruction"))
    messages.append(turn("assistant", row["output"], "output"))
    return Parsed(with_system(row, messages), read_tools(row))


def _qa(row: Row) -> Parsed:
    turns = [turn("user", row["question"], "question"), turn("assistant", row["answer"], "answer")]
    return Parsed(with_system(row, turns), read_tools(row))


def _completion(row: Row) -> Parsed:
    prompt, answer = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(answer, list):
        before = [replace(m, train=False) if m.role == "assistant" else m for m in to_messages(prompt, "prompt")]
        return Parsed([*with_system(row, before), *to_messages(answer, "completion")], read_tools(row))
    for key in ("prompt", "completion"):
        if not isinstance(row[key], str):
            raise DataError(f"the {key} is not text", field=key, found=row[key], expected="two strings, or two lists of messages")
    turn("user", prompt, "prompt")  # empty ones are refused without the system prompt too
    refuse_tools(row)
    asked = turn("user", behind_system(row, prompt), "prompt")
    return Parsed([asked, turn("assistant", answer.removesuffix(END_MARK), "completion")], [], style="completion")


def refuse_tools(row: Row) -> None:
    """Raises `DataError` for tools of a row that no chat template is put around, so that nothing would show them."""
    if read_tools(row):
        raise DataError(
            "tools are shown by a chat template, and two strings have none", field="tools", found=row.get("tools"),
            expected="messages", fix="give the row as messages, or take the tools out",
        )  # fmt: skip


FORMATS: dict[str, tuple[frozenset[str], Callable[[Row], Parsed]]] = {
    "messages": (frozenset({"messages"}), _messages),
    "sharegpt": (frozenset({"conversations"}), _sharegpt),
    "prompt_completion": (frozenset({"prompt", "completion"}), _completion),
    "alpaca": (frozenset({"instruction", "output"}), _alpaca),
    "qa": (frozenset({"question", "answer"}), _qa),
}
OPTIONAL = {"alpaca": ("input", "history")}
"""Keys that a format reads where a row has them."""
ANSWER_KEYS = {"alpaca": "output", "qa": "answer"}  # of chat rows with one answer: a number, or a list of right ones, will do


# -- parts of rows --------------------------------------------------------------------------------------------------------


def _known() -> str:
    return "; ".join(f"{name} ({', '.join(sorted(keys))})" for name, (keys, _) in FORMATS.items())


def _mapped(row: Row, fields: Mapping[str, str] | None) -> tuple[Row, Row]:
    """The row under our names, and what it has under them that is not meant: a mapping of a format's keys alone says what the row
    is."""
    if not fields:
        return row, {}
    named, given = mapped(row, fields), set(fields.values())
    meant = _KEYS if _KEYS & fields.keys() else frozenset()
    beside = {key: row[key] for key in meant if key in row and key not in given}
    return {**{key: value for key, value in row.items() if key not in meant | given}, **named}, beside


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


def _message(row: Any, field: str) -> Message:
    if not isinstance(row, Mapping):
        raise DataError("a message must be an object", field=field, found=row, expected="{role, content}")
    if "role" not in row:
        raise DataError(
            "a message has no role", field=f"{field}.role", found=f"keys {', '.join(map(str, row))}", expected=", ".join(ROLES)
        )
    role = _role(row["role"], ROLES, f"{field}.role")
    refuse_unknown(row, KEYS, field)
    calls = _calls_of(row, role, field)
    content, thought = row.get("content"), reasoning_of(row, role, field)
    if content is None and not calls:
        raise DataError(
            "a message has no content", field=f"{field}.content", found=f"keys {', '.join(map(str, row))}", expected="text"
        )
    answers = optional_text(row, "tool_call_id", field)
    if answers and role != "tool":
        raise DataError(
            "only a tool turn answers a call", field=f"{field}.tool_call_id", found=f"role {row['role']}", expected="role tool",
            fix="take the key out, or correct the role",
        )  # fmt: skip
    message = Message(
        role=role, content=text_content(content, f"{field}.content"), reasoning_content=thought, tool_calls=calls,
        name=optional_text(row, "name", field), tool_call_id=answers, train=trained(row, role, field),
    )  # fmt: skip
    return _checked(message, f"{field}.content")


def _calls_of(row: Row, role: str, field: str) -> tuple[dict[str, Any], ...]:
    said = [(key, row[key]) for key in ("tool_calls", "function_call") if not says_nothing(row.get(key))]
    if not said:
        return ()
    key, value = said[0]
    if len(said) > 1:
        raise DataError(
            "a turn has its calls twice", field=f"{field}.function_call", found=said[1][1], expected="tool_calls alone",
            fix="leave one of them out",
        )  # fmt: skip
    if role != "assistant":
        raise DataError(
            "only an assistant turn calls tools", field=f"{field}.{key}", found=f"role {row['role']}", expected="role assistant"
        )
    return read_calls([value] if key == "function_call" else value, f"{field}.{key}")


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
    calls: tuple[dict[str, Any], ...] = ()  # that tool turns may answer
    for i, message in enumerate(messages):
        allowed: Iterable[str | None] = _BEFORE[message.role]
        if previous not in allowed or (message.role == "tool" and not calls):
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
        if message.role == "tool":
            _check_answer(message, calls, places[i] if places else f"messages[{i}].tool_call_id")
        else:
            calls = message.tool_calls
        previous = message.role
    if not any(m.role == "assistant" and m.train is not False for m in messages):
        raise DataError(
            "no assistant turn to learn from",
            field=places[-1] if places else "messages",
            found=" ".join(m.role for m in messages),
            expected="an assistant turn",
        )


def _check_answer(message: Message, calls: Sequence[Mapping[str, Any]], field: str) -> None:
    """Raises `DataError` for a tool turn that answers none of the calls before it, where these have ids."""
    ids = [call["id"] for call in calls if "id" in call]
    if ids and message.tool_call_id is not None and message.tool_call_id not in ids:
        raise DataError(
            "a tool turn answers a call that is not there", field=field, found=message.tool_call_id, expected=" or ".join(ids),
            fix="give the id of the call, or remove the row",
        )  # fmt: skip
