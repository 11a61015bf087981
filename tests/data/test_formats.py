"""Rows of every conversation format, and what is said about rows that cannot be trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tutelage.data.sources.conversations import sniff, to_conversation, to_messages
from tutelage.errors import ConfigError, DataError
from tutelage.records import Conversation

U, A = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": null}'}}
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


def shape(conversation: Conversation) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in conversation.messages]


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        (
            {"messages": [{"role": "developer", "content": "S"}, U, A]},
            "messages",
            [("system", "S"), ("user", "2+2?"), ("assistant", "4")],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}, A]},
            "messages",
            [("user", "2+2?"), ("assistant", "4")],
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "S"},
            "sharegpt",
            [("system", "S"), ("user", "a"), ("assistant", "b")],
        ),
        ({"instruction": "Add.", "input": "2 2", "output": "4"}, "alpaca", [("user", "Add.\n\n2 2"), ("assistant", "4")]),
        (
            {"instruction": "Add.", "input": "", "output": "4", "system": "S", "history": [["q", "a"]]},
            "alpaca",
            [("system", "S"), ("user", "q"), ("assistant", "a"), ("user", "Add."), ("assistant", "4")],
        ),
        ({"prompt": "2+2=", "completion": " 4"}, "prompt_completion", [("user", "2+2="), ("assistant", " 4")]),
        ({"prompt": [U], "completion": [A]}, "prompt_completion", [("user", "2+2?"), ("assistant", "4")]),
        ({"question": "q", "answer": "a"}, "qa", [("user", "q"), ("assistant", "a")]),
    ],
)
def test_formats(row: dict[str, Any], name: str, expected: list[tuple[str, str]]) -> None:
    """Guards the meaning of each format's keys."""
    assert sniff(row) == name
    conversation = to_conversation(row, file="x.jsonl", line=3)
    assert shape(conversation) == expected and conversation.source == "x.jsonl#3"
    assert conversation.id == to_conversation(row).id


def test_styles_of_completions() -> None:
    """Guards against a chat template being put around plain completions, and against training on the turns of a prompt."""
    assert to_conversation({"prompt": "a", "completion": "b<|endoftext|>"}).style == "completion"
    assert to_conversation({"prompt": "a", "completion": "b<|endoftext|>"}).messages[1].content == "b"
    chat = to_conversation({"prompt": [U, A, U], "completion": [A]})
    assert chat.style == "chat" and [m.train for m in chat.messages] == [None, False, None, None]


def test_fields_map_keys() -> None:
    """Guards the mapping option: GSM8K as plain prompt and completion."""
    row = {"question": "q", "answer": "a"}
    conversation = to_conversation(row, fields={"prompt": "question", "completion": "answer"})
    assert conversation.style == "completion" and shape(conversation) == [("user", "q"), ("assistant", "a")]
    with pytest.raises(DataError) as caught:
        to_conversation(row, fields={"prompt": "questions", "completion": "answer"})
    assert caught.value.field == "fields.prompt" and "question?" in str(caught.value)
    swapped = to_conversation({"prompt": "p", "completion": "c"}, fields={"prompt": "completion", "completion": "prompt"})
    assert shape(swapped) == [("user", "c"), ("assistant", "p")]


def test_tools_are_kept_word_for_word() -> None:
    """Guards against schemas padded with nulls (what Arrow does) and against arguments that templates would quote twice."""
    rows = [
        U,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": ""},
        A,
    ]
    conversation = to_conversation({"messages": rows, "tools": [TOOL]})
    assert conversation.tools == (TOOL,)
    assert conversation.messages[1].tool_calls == (
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": None}}},
    )
    assert conversation.messages[2].tool_call_id == "c1"
    legacy = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    assert to_messages([U, legacy])[1].tool_calls[0]["function"]["arguments"] == {"a": 2, "b": None}


def test_sharegpt_tools() -> None:
    """Guards function_call / observation turns, tools as a JSON string, and what is said before a call."""
    turns = [
        {"from": "human", "value": "add"},
        {"from": "gpt", "value": "I will."},
        {"from": "function_call", "value": '{"name": "add", "arguments": {}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "4"},
    ]
    conversation = to_conversation({"conversations": turns, "tools": json.dumps([TOOL["function"]])})
    assert shape(conversation) == [("user", "add"), ("assistant", "I will."), ("tool", "4"), ("assistant", "4")]
    assert conversation.messages[1].tool_calls[0]["function"] == {"name": "add", "arguments": {}} and conversation.tools == (
        TOOL,
    )


def test_turns_left_out_of_training() -> None:
    """Guards `weight: 0` of OpenAI's files: a turn marked so must not be supervised."""
    conversation = to_conversation({"messages": [U, {**A, "weight": 0}, U, {**A, "train": True}]})
    assert [m.train for m in conversation.messages] == [None, False, None, True]


BAD: list[tuple[Any, str | None, str]] = [
    ({"messages": []}, "messages", "no messages"),
    ({"messages": [{"role": "usr", "content": "a"}]}, "messages[0].role", "did you mean user"),
    ({"messages": [{"content": "a"}]}, "messages[0].role", "no role"),
    ({"messages": [U, {"role": "assistant"}]}, "messages[1].content", "no content"),
    ({"messages": [U, {"role": "assistant", "content": " "}]}, "messages[1].content", "empty answer"),
    ({"messages": [U, {"role": "assistant", "content": [{"type": "image_url"}]}]}, "messages[1].content", "not text"),
    ({"messages": [U, U, A]}, "messages[1].role", "out of order"),
    ({"messages": [A, U]}, "messages[0].role", "out of order"),
    ({"messages": [U, A, {"role": "system", "content": "s"}]}, "messages[2].role", "out of order"),
    ({"messages": [U, A, {"role": "tool", "content": "s"}]}, "messages[2].role", "tool_calls"),
    ({"messages": [U]}, "messages", "no assistant"),
    ({"messages": [U, {**A, "train": False}]}, "messages", "no assistant"),
    ({"messages": [U, {**A, "weight": 0.5}]}, "messages[1].weight", "0 or 1"),
    ({"messages": ["a"]}, "messages[0]", "object"),
    (
        {"messages": [U, {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]},
        "messages[1].tool_calls[0]",
        "no name",
    ),
    ({"messages": [U, A], "tools": [{"x": 1}]}, "tools", "not a list of functions"),
    ({"messages": [U, A], "tools": "{"}, "tools", "not valid JSON"),
    ({"conversations": [{"from": "humn", "value": "a"}]}, "conversations[0].from", "did you mean human"),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "add()"}]},
        "conversations[1].value",
        "not valid JSON",
    ),
    ({"conversations": "a"}, "conversations", "no turns"),
    ({"instruction": "", "output": "x"}, "instruction", "empty question"),
    ({"instruction": "a", "output": "x", "history": ["q"]}, "history[0]", "pair"),
    ({"prompt": "a", "completion": ""}, "completion", "empty answer"),
    ({"prompt": "a", "completion": "<|endoftext|>"}, "completion", "empty answer"),
    ({"prompt": "a", "completion": 4}, "completion", "not text"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, None, "preference"),
    ({"mesages": []}, None, "nearest is messages"),
    ({"text": "a"}, None, "alpaca (instruction, output)"),
    (["a"], None, "JSON object"),
]


@pytest.mark.parametrize(("row", "field", "words"), BAD)
def test_bad_rows_are_named(row: Any, field: str | None, words: str) -> None:
    """Guards promise 9: file, line and field of a row that cannot be used, and never an unreadable traceback."""
    with pytest.raises(DataError) as caught:
        to_conversation(row, file="rows.jsonl", line=7)
    assert caught.value.field == field and words in str(caught.value)
    assert str(caught.value).startswith("rows.jsonl:7: ")


def test_unknown_format_name() -> None:
    """Guards the `format` setting."""
    with pytest.raises(ConfigError, match="sharegpt"):
        to_conversation({"messages": [U, A]}, fmt="share_gpt")
    with pytest.raises(DataError, match="not in the alpaca format"):
        to_conversation({"messages": [U, A]}, fmt="alpaca")


@pytest.mark.parametrize(("name", "rows"), [("alpaca_en_demo.json", 999), ("glaive_toolcall_en_demo.json", 300)])
def test_real_rows(shared_data: Path, name: str, rows: int) -> None:
    """Guards against rules so strict that real data sets are refused."""
    read = json.loads((shared_data / "instructions" / name).read_text(encoding="utf-8"))
    conversations = [to_conversation(row, file=name, line=i) for i, row in enumerate(read, 1)]
    assert len(conversations) == rows
    if "glaive" in name:
        assert any(m.tool_calls for c in conversations for m in c.messages) and any(c.tools for c in conversations)
