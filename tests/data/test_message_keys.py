"""No key of a row or a message is ignored: it is read, kept in `meta` and counted, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tutelage.data.clean.collect import collect
from tutelage.data.sources.conversations import to_conversation
from tutelage.data.sources.feedback import read
from tutelage.errors import DataError
from tutelage.records import Conversation, Message, read_records

Q, A, B = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
P = {"role": "system", "content": "P."}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


def record(kind: str, row: dict[str, Any]) -> Any:
    if kind == "conversations":
        return to_conversation(row, file="rows.jsonl", line=7)
    return read(kind, row, file="rows.jsonl", line=7, source="rows.jsonl#7", fields=None)


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": arguments}, **more}],
    }


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept(name: str) -> None:
    """Guards against a reasoning set that is trained without its reasoning."""
    for row in ({"messages": [Q, {**A, name: "r"}]}, {"conversations": [HUMAN, {**GPT, name: "r"}]}):
        made = record("conversations", row)
        assert made.messages[1].reasoning_content == "r"
        assert Message.from_json(made.messages[1].to_json()) == made.messages[1]
        assert made.id != record("conversations", {"messages": [Q, A]}).id
    pair = record("preferences", {"prompt": [Q], "chosen": [{**A, name: "r"}], "rejected": [{**A, name: "s"}]})
    assert (pair.chosen[0].reasoning_content, pair.rejected[0].reasoning_content) == ("r", "s")


SYSTEM: list[tuple[str, dict[str, Any], bool]] = [  # kind, row, whether it stays apart from the prompt
    ("conversations", {"messages": [Q, A]}, True),
    ("conversations", {"messages": [P, Q, A]}, True),
    ("conversations", {"conversations": [HUMAN, GPT]}, True),
    ("conversations", {"instruction": "q", "output": "a"}, True),
    ("conversations", {"question": "q", "answer": "a"}, True),
    ("conversations", {"prompt": [Q], "completion": [A]}, True),
    ("conversations", {"prompt": "q", "completion": "a"}, False),
    ("preferences", {"prompt": [Q], "chosen": [A], "rejected": [B]}, True),
    ("preferences", {"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]}, True),
    ("preferences", {"chosen": [Q, A], "rejected": [P, Q, B]}, True),
    ("preferences", {"chosen": "Human: q\n\nAssistant: a", "rejected": "Human: q\n\nAssistant: b"}, True),
    ("preferences", {"conversations": [HUMAN], "chosen": GPT, "rejected": {**GPT, "value": "b"}}, True),
    ("preferences", {"question": "q", "chosen": "a", "rejected": "b"}, True),
    ("preferences", {"prompt": "q", "chosen": "a", "rejected": "b"}, False),
    ("prompts", {"messages": [Q]}, True),
    ("prompts", {"prompt": [Q]}, True),
    ("prompts", {"question": "q"}, True),
    ("prompts", {"prompt": "q"}, False),
    ("ratings", {"messages": [Q, A], "label": True}, True),
    ("ratings", {"question": "q", "answer": "a", "label": True}, True),
    ("ratings", {"prompt": [Q], "completions": ["a", "b"], "labels": [1, 0]}, True),
    ("ratings", {"prompt": "q", "completions": ["a", "b"], "labels": [1, 0]}, False),
]


@pytest.mark.parametrize(("kind", "row", "apart"), SYSTEM)
def test_a_system_prompt_beside_the_rest(kind: str, row: dict[str, Any], apart: bool) -> None:
    """Guards against `system` that some formats read and others dropped."""
    made = record(kind, {**row, "system": "P."})
    turns = made.messages if kind in ("conversations", "prompts") else made.prompt
    said = [(m.role, m.content) for m in turns if m.role != "assistant"]
    assert said == ([("system", "P."), ("user", "q")] if apart else [("user", "P.\n\nq")])


@pytest.mark.parametrize("flag", [{"loss": False}, {"trainable": False}, {"loss_mask": 0}, {"train": False}, {"weight": 0.0}])
def test_turns_left_out_of_the_loss(flag: dict[str, Any]) -> None:
    """Guards against turns that are trained on although the row says otherwise, in another tool's words."""
    for row in ({"messages": [Q, {**A, **flag}, Q, B]}, {"conversations": [HUMAN, {**GPT, **flag}, HUMAN, GPT]}):
        assert [m.train for m in record("conversations", row).messages] == [None, False, None, None]


def test_other_keys_of_a_row_are_kept_and_counted(tmp_path: Path) -> None:
    """Guards against columns that vanish, and against a row's own `split` that would move it to another part."""
    rows = [{"messages": [Q, {**A, "content": f"a{i}"}], "category": "x", "split": "test", "images": [], "note": None}
            for i in range(3)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = collect([str(tmp_path / "rows.jsonl")], tmp_path, kind="conversations", validation_share=0)
    assert card["kept_in_meta"] == {"category": 3, "split": 3}
    metas = [r.meta for r in read_records(tmp_path / "train.jsonl", Conversation)]
    assert metas == [{"category": "x", "row": {"split": "test"}}] * 3
    mapped = to_conversation(
        {"question": "q", "answer": "a", "prompt": "old"}, fields={"prompt": "question", "completion": "answer"}
    )
    assert mapped.meta == {"row": {"prompt": "old"}}
    named = to_conversation({"system_prompt": "P.", "question": "q", "answer": "a"}, fields={"system": "system_prompt"})
    assert [m.role for m in named.messages] == ["system", "user", "assistant"]


def test_a_part_of_a_dialogue_may_be_there_twice() -> None:
    """Guards against data sets that are refused because they repeat their prompt beside the messages."""
    row = {"prompt": "q", "prompt_id": "1", "messages": [Q, A]}
    assert record("conversations", row).meta == {"prompt_id": "1"}
    pair = {**row, "chosen": [Q, A], "rejected": [Q, B], "score_chosen": 2, "score_rejected": 1}
    assert record("preferences", pair).meta == {"prompt_id": "1"}


def test_arguments_of_calls() -> None:
    """Guards against `null` in the place of the arguments of a call without any."""
    for given in ("", " ", "null", None, "{}", {}):
        made = record("conversations", {"messages": [Q, call(given), {"role": "tool", "content": "1", "tool_call_id": "c"}, A]})
        assert made.messages[1].tool_calls[0]["function"]["arguments"] == {}


BAD: list[tuple[str, dict[str, Any], str, str]] = [  # kind, row, field, words
    ("conversations", {"messages": [Q, {**A, "unknown": "z"}]}, "messages[1].unknown", "unknown key of a message"),
    ("conversations", {"messages": [Q, {**A, "reasonin": "z"}]}, "messages[1].reasonin", "mean `reasoning`"),
    ("conversations", {"messages": [Q, {**A, "reasoning": "r", "thinking": "s"}]}, "messages[1].thinking", "one reasoning"),
    ("conversations", {"messages": [{**Q, "reasoning": "r"}, A]}, "messages[0].reasoning", "only an assistant turn"),
    ("conversations", {"messages": [{**Q, "images": ["x"]}, A]}, "messages[0].images", "only text"),
    ("conversations", {"messages": [{**Q, "content": [{"text": "q", "cache": 1}]}, A]}, "messages[0].content[0].cache", "part"),
    ("conversations", {"messages": [{**Q, "content": [{"type": "image", "text": "q"}]}, A]}, "messages[0].content", "not text"),
    ("conversations", {"messages": [{**Q, "train": True}, A]}, "messages[0].train", "only an assistant turn"),
    ("conversations", {"messages": [Q, {**A, "train": True, "loss": False}]}, "messages[1].train", "agree"),
    ("conversations", {"messages": [Q, {**A, "loss": 0.3}]}, "messages[1].loss", "0 or 1"),
    ("conversations", {"messages": [Q, {**A, "tool_call_id": "c"}]}, "messages[1].tool_call_id", "only a tool turn"),
    ("conversations", {"messages": [{**Q, "name": 4}, A]}, "messages[0].name", "not text"),
    ("conversations", {"conversations": [HUMAN, {**GPT, "mask": 1}]}, "conversations[1].mask", "unknown key of a turn"),
    ("conversations", {"conversations": [HUMAN, {**GPT, "content": "b"}]}, "conversations[1].content", "`value` and `content`"),
    ("conversations", {"messages": [P, Q, A], "system": "Other."}, "system", "two system prompts"),
    ("conversations", {"system_prompt": "P.", "question": "q", "answer": "a"}, "system_prompt", "mean `system`"),
    ("conversations", {"instruction": "q", "inptu": "i", "output": "a"}, "inptu", "mean `input`"),
    ("conversations", {"messages": [Q, A], "prompt": "z"}, "prompt", "only one of both"),
    ("conversations", {"messages": [Q, A], "prompt": "q", "completion": "z"}, "completion", "only one of both"),
    ("conversations", {"question": "q", "answer": "a", "history": [["x", "y"]]}, "history", "only one of both"),
    ("conversations", {"question": "q", "answer": "a", "thinking": "r"}, "thinking", "belongs in a message"),
    ("conversations", {"messages": [Q, A], "images": ["x.png"]}, "images", "only text"),
    ("conversations", {"messages": [Q, A], "meta": "m"}, "meta", "is an object"),
    ("conversations", {"messages": [Q, A], "task": "t", "meta": {"task": "u"}}, "task", "differs between row and `meta`"),
    ("conversations", {"prompt": "q", "completion": "a", "tools": [{"name": "f"}]}, "tools", "two strings have none"),
    ("preferences", {"prompt": "z", "chosen": [Q, A], "rejected": [Q, B], "question": "q"}, "prompt", "only one of both"),
    ("prompts", {"messages": [Q], "prompt": "z"}, "prompt", "only one of both"),
    ("ratings", {"messages": [Q, {**A, "x": 1}], "label": True}, "messages[1].x", "unknown key"),
    *(("conversations", {"messages": [Q, call(bad)]}, "messages[1].tool_calls[0].arguments", "not a JSON object")
      for bad in ('{"a": ', "[1]", [1], 3, '"x"')),
    ("conversations", {"messages": [Q, call("{}", x=1)]}, "messages[1].tool_calls[0].x", "unknown key of a tool call"),
    ("conversations", {"messages": [Q, call("{}", type="custom")]}, "messages[1].tool_calls[0].type", "another type"),
    ("conversations", {"messages": [Q, call("{}"), {"role": "tool", "content": "1", "tool_call_id": "d"}, A]},
     "messages[2].tool_call_id", "not there"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "field", "words"), BAD)
def test_what_is_not_read_is_refused_by_name(kind: str, row: dict[str, Any], field: str, words: str) -> None:
    """Guards against a key that is dropped without a word."""
    with pytest.raises(DataError) as caught:
        record(kind, row)
    assert caught.value.field == field and words in str(caught.value) and caught.value.fix
    assert str(caught.value).startswith("rows.jsonl:7: ")
