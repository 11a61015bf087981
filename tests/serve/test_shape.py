"""Structured output and tool calls with the real `openai` client: enforced or refused, never accepted and ignored."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from tests.engine import small
from tests.serve.running import Running
from tutelage.chat.render import Renderer
from tutelage.engine import Engine
from tutelage.serve.app import create_app
from tutelage.tokenizer.train import train

NAME, HI = "tiny", [{"role": "user", "content": "the cat"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "feed", "description": "Feeds it", "parameters": PERSON}},
    {"type": "function", "function": {"name": "call_vet", "parameters": {"type": "object", "properties": {}}}},
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    renderer = small.renderer(tmp_path_factory.mktemp("tokenizer") / "t")
    engine = Engine(small.model(renderer.tokenizer.vocab_size, context=1536), renderer, slots=4)
    running = Running(create_app(engine, renderer, NAME))
    yield running.client()
    running.close()


def chat(client: openai.OpenAI, **asked: Any) -> ChatCompletion:
    found = client.chat.completions.create(model=NAME, messages=HI, max_tokens=400, temperature=1.0, **asked)  # type: ignore[call-overload]
    ChatCompletion.model_validate(found.model_dump(), strict=True)
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_is_enforced(client: openai.OpenAI, seed: int) -> None:
    """A model of random weights writes what the schema says, and its answer ends there."""
    asked = {"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": PERSON}}
    choice = chat(client, response_format=asked, seed=seed).choices[0]
    pet = json.loads(choice.message.content or "")
    assert choice.finish_reason == "stop" and set(pet) == {"name", "legs"}
    assert isinstance(pet["name"], str) and len(pet["name"]) <= 8 and 0 <= pet["legs"] <= 9


def test_the_clients_own_parser_reads_it(client: openai.OpenAI) -> None:
    class Pet(BaseModel):
        kind: Literal["cat", "dog"]
        old: bool

    found = client.chat.completions.parse(model=NAME, messages=HI, response_format=Pet, max_tokens=200, seed=1)  # type: ignore[arg-type]
    assert isinstance(found.choices[0].message.parsed, Pet)


def test_json_objects_end(client: openai.OpenAI) -> None:
    """Endless digits and endless lists (vllm#52011): here also without a schema."""
    for seed in range(3):
        choice = chat(client, response_format={"type": "json_object"}, seed=seed).choices[0]
        assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content or ""), dict)


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [({"choice": ["good cat", "bad cat"]}, "(good|bad) cat"), ({"regex": r"[a-c]{3}-\d{2}"}, r"[a-c]{3}-\d{2}"),
     ({"grammar": 'start: "a" /[0-9]{2}/ "z"'}, r"a\d\dz"), ({"json": {"enum": [1, 2]}}, "[12]")],
)  # fmt: skip
def test_extra_kinds_of_grammar(client: openai.OpenAI, asked: dict[str, Any], pattern: str) -> None:
    choice = chat(client, extra_body={"structured_outputs": asked}, seed=2).choices[0]
    assert re.fullmatch(pattern, choice.message.content or "") and choice.finish_reason == "stop"
    text = client.completions.create(
        model=NAME, prompt="x", max_tokens=50, extra_body={"structured_outputs": asked}
    ).choices[0].text  # fmt: skip
    assert re.fullmatch(pattern, text)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "feed"}}])
def test_a_required_call_is_made(client: openai.OpenAI, choice: Any) -> None:
    found = chat(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, seed=3).choices[0]
    assert found.finish_reason == "tool_calls" and found.message.content is None
    (call,) = found.message.tool_calls or []
    assert call.type == "function" and call.function.name in ("feed", "call_vet")
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"name", "legs"} if call.function.name == "feed" else isinstance(arguments, dict)


def test_strict_tools_leave_the_choice(client: openai.OpenAI) -> None:
    """`strict` under "auto": not refused, as the SDK always sends it for pydantic tools, and no call is forced by it."""
    strict: Any = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}, *TOOLS[1:]]
    found = [chat(client, tools=strict, seed=seed).choices[0].finish_reason for seed in range(3)]
    assert set(found) <= {"stop", "length", "tool_calls"}
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, tools=[{"type": "function", "function": {**TOOLS[0]["function"], "strict": "yes"}}])
    assert error.value.param == "tools"
    unenforceable = {"type": "object", "properties": {"a": {"not": {}}}}
    with pytest.raises(openai.BadRequestError, match="not") as error:
        chat(client, tools=[{"type": "function", "function": {"name": "f", "parameters": unenforceable, "strict": True}}])
    assert error.value.param == "tools"


JSON: Any = {"type": "json_object"}
PET: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": PERSON}}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("asked", [{"response_format": PET}, {"extra_body": {"structured_outputs": {"json": PERSON}}}])
def test_tools_beside_a_format(client: openai.OpenAI, asked: Any, strict: bool) -> None:
    """A format that makes calls impossible, while the tools are accepted: of both, the model chooses."""
    tools = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": strict}}]
    seen = set()
    for first, seed in itertools.product("<{", range(4)):
        ids = httpx.post(str(client.base_url.join("/tokenize")), json={"prompt": first, "add_special_tokens": False}).json()
        unliked = {str(i): -100 for i in ids["tokens"]}
        choice = chat(client, tools=tools, seed=seed, logit_bias=unliked, parallel_tool_calls=False, **asked).choices[0]
        seen.add(choice.finish_reason)
        if choice.finish_reason == "stop":
            assert set(json.loads(choice.message.content or "")) == {"name", "legs"} and not choice.message.tool_calls
        if choice.finish_reason == "tool_calls":
            assert choice.message.content is None
            for call in choice.message.tool_calls or []:
                assert not strict or set(json.loads(call.function.arguments)) == {"name", "legs"}  # type: ignore[union-attr]
        assert (choice.finish_reason == "stop") == (first == "<")
    assert {"stop", "tool_calls"} <= seen


def test_calls_that_json_would_hide_are_refused(tmp_path: Path) -> None:
    """Llama 3 writes a call as bare JSON: an answer in JSON may look the same."""
    train(small.TEXTS, vocab_size=320, template="llama3", out=tmp_path / "t")
    renderer = Renderer(tmp_path / "t")
    engine = Engine(small.model(renderer.tokenizer.vocab_size, context=1536), renderer, slots=1)
    running = Running(create_app(engine, renderer, NAME))
    try:
        with pytest.raises(openai.BadRequestError, match="nothing tells from an answer in JSON") as caught:
            chat(running.client(), tools=TOOLS, response_format=JSON)
        assert caught.value.param == "tools"
        assert chat(running.client(), tools=TOOLS, tool_choice="none", response_format=PET, seed=1).choices[0].message.content
    finally:
        running.close()


def test_a_forced_call_that_is_cut_is_no_content(client: openai.OpenAI) -> None:
    """Half of a call, markup and all, given out as what the model says."""
    how: dict[str, Any] = {"model": NAME, "messages": HI, "tools": TOOLS, "tool_choice": "required", "max_tokens": 12, "seed": 3}
    choice = client.chat.completions.create(**how).choices[0]
    assert choice.finish_reason == "length" and not choice.message.content and not choice.message.tool_calls
    chunks = list(client.chat.completions.create(**how, stream=True))
    assert not any(chunk.choices[0].delta.content or chunk.choices[0].delta.tool_calls for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"
    tools = [{"type": "function", **TOOLS[0]["function"]}]
    response = client.responses.create(model=NAME, input="x", tools=tools, tool_choice="required", max_output_tokens=12)  # type: ignore[call-overload]
    assert response.status == "incomplete" and not response.output_text


def test_a_streamed_call_is_the_whole_one(client: openai.OpenAI) -> None:
    """Deltas that do not add up; a finish reason that differs by mode (vllm#53255)."""
    how: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": 5}
    whole = chat(client, **how).choices[0]
    chunks = list(client.chat.completions.create(model=NAME, messages=HI, max_tokens=400, temperature=1.0, stream=True, **how))  # type: ignore[call-overload]
    calls: dict[int, dict[str, str]] = {}
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
        for delta in chunk.choices[0].delta.tool_calls or []:
            call = calls.setdefault(delta.index, {"name": "", "arguments": ""})
            call["name"] += delta.function.name or ""
            call["arguments"] += delta.function.arguments or ""
    assert list(calls.values()) == [
        {"name": c.function.name, "arguments": c.function.arguments} for c in whole.message.tool_calls
    ]
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "tool_calls"


def test_the_conversation_goes_on_after_a_call(client: openai.OpenAI) -> None:
    call = {"id": "abc123def", "type": "function", "function": {"name": "feed", "arguments": '{"name": "Tom", "legs": 4}'}}
    messages: Any = [
        *HI, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abc123def", "content": "fed"},
    ]  # fmt: skip
    found = client.chat.completions.create(model=NAME, messages=messages, tools=TOOLS, max_tokens=5)
    assert found.choices[0].finish_reason in ("stop", "length", "tool_calls")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "not": {}}}}},
         "response_format"),
        ({"response_format": {"type": "json_object"}, "tools": TOOLS, "tool_choice": "required"}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}, "tools": TOOLS},
         "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": PERSON}}}, "response_format.json_schema.name"),
        ({"tools": TOOLS, "tool_choice": "required", "stop": "x"}, "stop"),
        ({"tools": TOOLS, "tool_choice": "required", "extra_body": {"stop_token_ids": [5]}}, "stop_token_ids"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}}, "structured_outputs"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(client: openai.OpenAI, asked: dict[str, Any], param: str) -> None:
    """A schema that is accepted and ignored (llama.cpp#24097)."""
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **asked)
    assert caught.value.param == param


def test_broken_tool_calls_in_messages_are_a_400(client: openai.OpenAI) -> None:
    """The template would fail on them: a 500."""
    for call in ({}, {"function": {"name": "f", "arguments": 3}}, {"function": {"name": "f", "arguments": [1]}}, 7):
        messages: Any = [*HI, {"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "go on"}]
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model=NAME, messages=messages, max_tokens=2)
