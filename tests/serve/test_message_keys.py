"""No key of a message, a part, a call, a tool or a format of a request is ignored, with the real `openai` client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from tests.engine import small
from tests.serve.running import Running
from tutelage.chat.render import Renderer
from tutelage.engine import Engine
from tutelage.serve.app import create_app

NAME, HI = "tiny", {"role": "user", "content": "the cat"}
SAID = {"role": "assistant", "content": "sat"}
FEED = {"type": "function", "function": {"name": "feed"}}


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return small.renderer(tmp_path_factory.mktemp("tokenizer") / "t")


@pytest.fixture(scope="module")
def server(renderer: Renderer) -> Iterator[Running]:
    engine = Engine(small.model(renderer.tokenizer.vocab_size, context=1536), renderer, slots=4)
    running = Running(create_app(engine, renderer, NAME))
    yield running
    running.close()


def read(server: Running, messages: list[Any]) -> str:
    """The text that the model reads."""
    ids = httpx.post(f"{server.url}/tokenize", json={"messages": messages}, timeout=30).json()["tokens"]
    found: str = httpx.post(f"{server.url}/detokenize", json={"tokens": ids}, timeout=30).json()["prompt"]
    return found


def called(arguments: Any, **more: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": arguments}, **more}],
    }


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_of_a_history_is_read(server: Running, renderer: Renderer, key: str) -> None:
    """Guards against thoughts that are dropped from a history, which `transformers` writes with the same folder."""
    messages: Any = [HI, {**SAID, key: "by the door"}, {"role": "user", "content": "and?"}]
    theirs = AutoTokenizer.from_pretrained(Path(renderer.tokenizer.folder))
    want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "<think>\nby the door\n</think>" in want and read(server, messages) == want
    got = server.client().chat.completions.create(model=NAME, messages=messages, max_tokens=2)
    assert got.usage is not None and got.usage.prompt_tokens == len(renderer.prompt(messages))


def test_a_reply_can_be_sent_back(server: Running) -> None:
    """Guards against a history that is refused for the nulls and empty lists of a client's own objects."""
    client = server.client()
    said = client.chat.completions.create(model=NAME, messages=[HI], max_tokens=3, temperature=0).choices[0].message  # type: ignore[list-item]
    dumped = {**said.model_dump(), "content": said.content or "x", "annotations": []}
    messages: Any = [HI, dumped, HI]
    assert client.chat.completions.create(model=NAME, messages=messages, max_tokens=2).choices
    assert read(server, messages) == read(server, [HI, {"role": "assistant", "content": dumped["content"]}, HI])


@pytest.mark.parametrize(
    ("arguments", "written"),
    [("", "{}"), (" ", "{}"), ("null", "{}"), (None, "{}"), ("{}", "{}"), ({"a": 1}, '{"a": 1}'), ('{"a": ', '"{\\"a\\": "'),
     ("[1]", '"[1]"'), ("feed", '"feed"')],
)  # fmt: skip
def test_odd_arguments_do_not_end_a_conversation(server: Running, arguments: Any, written: str) -> None:
    """Guards against one call of another model, or one that was cut off, after which every request is a 400."""
    messages: Any = [HI, called(arguments), {"role": "tool", "content": "done", "tool_call_id": "c"}]
    assert server.client().chat.completions.create(model=NAME, messages=messages, max_tokens=2).choices
    assert f'"arguments": {written}' in read(server, messages)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": [HI, {**SAID, key: value}, HI]}, f"messages[1].{key}")
    for key, value in (("unknown_key", "z"), ("prefix", True), ("weight", 0), ("train", False), ("images", ["x"]),
                       ("refusal", "no"),
                       ("function_call", {"name": "f", "arguments": "{}"}), ("reasoning", 3), ("name", 3),
                       ("tool_call_id", "c"),
                       ("cache_control", {"type": "ephemeral"}), ("tool_calls", {"function": {}}))
] + [
    ({"messages": [{**HI, "reasoning": "r"}]}, "messages[0].reasoning"),
    ({"messages": [HI, {**SAID, "reasoning": "r", "thinking": "s"}, HI]}, "messages[1].thinking"),
    ({"messages": [{**HI, "tool_calls": called("{}")["tool_calls"]}]}, "messages[0].tool_calls"),
    ({"messages": [{**HI, "content": [{"type": "text", "text": "x", "cache": {}}]}]}, "messages[0].content[0].cache"),
    ({"messages": [HI, called("{}", extra=1)]}, "messages[1].tool_calls[0].extra"),
    ({"messages": [HI, called("{}", type="custom")]}, "messages[1].tool_calls[0].type"),
    ({"messages": [HI, called([1])]}, "messages[1].tool_calls[0].function.arguments"),
    ({"messages": [HI], "tools": [{**FEED, "cache_control": 1}]}, "tools[0].cache_control"),
    ({"messages": [HI], "tools": [{"type": "function", "function": {"name": "f", "returns": {}}}]}, "tools[0].function.returns"),
    ({"messages": [HI], "tools": [FEED], "tool_choice": {"type": "function", "function": {"name": "feed", "x": 1}}},
     "tool_choice.function.x"),
    ({"messages": [HI], "response_format": {"type": "text", "schema": {}}}, "response_format.schema"),
    ({"messages": [HI], "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "srict": True}}},
     "response_format.json_schema.srict"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "param"), BAD, ids=[param for _, param in BAD])
def test_what_is_not_read_is_refused_by_name(server: Running, asked: dict[str, Any], param: str) -> None:
    """Guards against a key that is taken and not done."""
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(model=NAME, max_tokens=2, **asked)
    assert caught.value.param == param and param in str(caught.value)
