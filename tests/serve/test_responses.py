"""`/v1/responses` with the real `openai` client: objects and events in OpenAI's own types, answers those of chat."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.engine import small
from tests.serve.running import Running
from tests.serve.test_operations import scraped
from tests.serve.test_shape import PERSON
from tutelage.engine import Engine
from tutelage.serve.app import create_app

NAME = "tiny"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
CORE = {
    "id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "previous_response_id", "instructions",
    "output", "error", "tools", "tool_choice", "truncation", "parallel_tool_calls", "text", "top_p", "presence_penalty",
    "frequency_penalty", "top_logprobs", "temperature", "reasoning", "user", "usage", "max_output_tokens", "max_tool_calls",
    "store", "background", "service_tier", "metadata", "safety_identifier", "prompt_cache_key",
}  # fmt: skip
"""What Open Responses requires of a response."""
FEED: dict[str, Any] = {"type": "function", "name": "feed", "description": "Feeds it", "parameters": PERSON, "strict": True}
VET: dict[str, Any] = {"type": "function", "name": "call_vet"}
LOGPROBS: Any = ["message.output_text.logprobs"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return small.engine(tmp_path_factory.mktemp("tokenizer") / "t", context=1536, slots=4)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    running = Running(create_app(engine, engine.renderer, NAME))
    yield running
    running.close()


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


def whole(server: Running, **asked: Any) -> dict[str, Any]:
    """The response, checked."""
    reply = httpx.post(f"{server.url}/v1/responses", json={"model": NAME, **asked}, timeout=60)
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    Response.model_validate(body, strict=True)
    assert set(body) >= CORE
    return body


def streamed(server: Running, **asked: Any) -> list[dict[str, Any]]:
    """The events, each checked, and that they add up to the last one's response."""
    reply = httpx.post(f"{server.url}/v1/responses", json={"model": NAME, "stream": True, **asked}, timeout=60)
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream"), reply.text
    blocks = [block.split("\n") for block in reply.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name for name, _ in blocks] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        EVENT.validate_python(event, strict=True)
    assert put_together(events) == events[-1]["response"]["output"]
    return events


def put_together(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output as a client builds it from what it hears piece by piece."""
    items: list[dict[str, Any]] = []
    for event in events:
        kind, item = event["type"], items[event["output_index"]] if event.get("output_index", len(items)) < len(items) else None
        if kind == "response.output_item.added":
            assert event["output_index"] == len(items) and event["item"]["status"] == "in_progress"
            items.append(event["item"])
        elif item is not None:
            assert event.get("item_id", item["id"]) == item["id"]
            if kind == "response.content_part.added":
                item["content"].append(event["part"])
            elif kind == "response.output_text.delta":
                item["content"][0]["text"] += event["delta"]
                item["content"][0]["logprobs"] += event["logprobs"]
            elif kind == "response.function_call_arguments.delta":
                item["arguments"] += event["delta"]
            elif kind == "response.output_text.done":
                assert (item["content"][0]["text"], item["content"][0]["logprobs"]) == (event["text"], event["logprobs"])
            elif kind == "response.content_part.done":
                assert item["content"][0] == event["part"]
            elif kind == "response.function_call_arguments.done":
                assert item["arguments"] == event["arguments"]
            elif kind == "response.output_item.done":
                item["status"] = event["item"]["status"]
                assert item == event["item"]
    return items


def text_of(body: dict[str, Any]) -> str:
    return Response.model_validate(body).output_text


@pytest.mark.parametrize(
    "how",
    [{"temperature": 0}, {"temperature": 1.3, "seed": 4, "top_p": 0.95, "top_k": 60, "min_p": 0.01, "repetition_penalty": 1.1},
     {"temperature": 0, "ignore_eos": True, "frequency_penalty": 1.5}, {"seed": 6, "stop": ["e", "t"]}],
)  # fmt: skip
def test_the_text_is_that_of_chat(client: openai.OpenAI, server: Running, how: dict[str, Any]) -> None:
    """Two ways to ask that give two answers."""
    turns = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "the cat"}]
    chat = client.chat.completions.create(model=NAME, messages=turns, max_tokens=40, extra_body=how)  # type: ignore[arg-type]
    want, usage = chat.choices[0], chat.usage
    assert usage is not None
    for asked in ({"input": turns}, {"input": "the cat", "instructions": "Be brief"}):
        body = whole(server, max_output_tokens=40, **asked, **how)
        last = streamed(server, max_output_tokens=40, **asked, **how)[-1]["response"]
        assert text_of(body) == text_of(last) == want.message.content
        assert body["status"] == last["status"] == {"stop": "completed", "length": "incomplete"}[want.finish_reason]
        assert body["usage"]["input_tokens"] == usage.prompt_tokens
        assert body["usage"]["output_tokens"] == last["usage"]["output_tokens"] == usage.completion_tokens


def test_instructions_and_a_system_prompt_are_one(client: openai.OpenAI, server: Running) -> None:
    """Most templates refuse a second system message, so agents that send both got nothing."""
    said: list[Any] = [{"role": "system", "content": "Be brief\n\none two"}, {"role": "user", "content": "the cat"}]
    chat = client.chat.completions.create(model=NAME, messages=said, max_tokens=9, temperature=0)
    items = [{"role": "developer", "content": "one two"}, said[1]]
    body = whole(server, instructions="Be brief", input=items, max_output_tokens=9, temperature=0)
    assert text_of(body) == chat.choices[0].message.content
    assert chat.usage and body["usage"]["input_tokens"] == chat.usage.prompt_tokens


def test_a_conversation_of_items_is_one_of_messages(client: openai.OpenAI, server: Running) -> None:
    """Calls that become turns of their own, results that lose their call, parts that lose their order."""
    calls = [{"id": f"call0000{i}", "type": "function", "function": {"name": n, "arguments": "{}"}} for i, n in enumerate("ab")]
    turns: list[Any] = [
        {"role": "developer", "content": "Feed it"},
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "Well", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call00000", "content": "fed"},
        {"role": "tool", "tool_call_id": "call00001", "content": "three"},
        {"role": "assistant", "content": "the dog"},
        {"role": "user", "content": "go on"},
    ]
    items: list[Any] = [
        {"role": "developer", "content": "Feed it"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": t} for t in ("one", " two")]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None},
        {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "phase": None,
         "content": [{"type": "output_text", "text": "Well", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "call_id": "call00000", "name": "a", "arguments": "{}", "id": "fc_1", "status": "completed"},
        {"type": "function_call", "call_id": "call00001", "name": "b", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call00000", "output": "fed"},
        {"type": "function_call_output", "call_id": "call00001", "output": [{"type": "input_text", "text": "three"}]},
        {"role": "assistant", "content": "the dog"},
        {"role": "user", "content": "go on"},
    ]  # fmt: skip
    chat = client.chat.completions.create(model=NAME, messages=turns, max_tokens=20, temperature=0)
    body = whole(server, input=items, max_output_tokens=20, temperature=0)
    assert text_of(body) == chat.choices[0].message.content
    assert body["usage"]["input_tokens"] == chat.usage.prompt_tokens  # type: ignore[union-attr]
    cached = body["usage"]["input_tokens_details"]["cached_tokens"]
    assert 0 < cached < body["usage"]["input_tokens"]  # the chat request left its prompt in the cache


def test_events_come_in_order(server: Running) -> None:
    events = streamed(server, input="the cat", temperature=0, max_output_tokens=1000, ignore_eos=True)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert len(kinds) > 10 and set(kinds[4:-4]) == {"output_text.delta"}
    first, last = events[0]["response"], events[-1]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    changed = {"status", "output", "usage", "incomplete_details"}
    assert {k: v for k, v in first.items() if k not in changed} == {k: v for k, v in last.items() if k not in changed}


def test_settings_are_echoed_as_they_are(server: Running) -> None:
    """A client that reads back what it did not ask for, or that is told of what was not done."""
    asked: dict[str, Any] = {
        "input": "x", "instructions": "Be", "temperature": 0.5, "top_p": 0.9, "presence_penalty": 0.1, "max_output_tokens": 3,
        "metadata": {"a": "b"}, "user": "me", "safety_identifier": "s", "prompt_cache_key": "k", "parallel_tool_calls": False,
        "max_tool_calls": 2, "truncation": "disabled", "background": False, "include": LOGPROBS, "top_logprobs": 2,
        "reasoning": {"effort": "none"}, "tools": [FEED, VET], "tool_choice": "none", "service_tier": "flex", "stream": False,
    }  # fmt: skip
    body = whole(server, **asked)
    changed = {"input", "include", "stream", "reasoning", "tools", "service_tier"}
    assert {k: body[k] for k in asked if k not in changed} == {k: v for k, v in asked.items() if k not in changed}
    assert [tool["strict"] for tool in body["tools"]] == [True, False] and body["tools"][0]["parameters"] == PERSON
    assert body["service_tier"] == "default" and body["store"] is False
    plain = whole(server, input="x", max_output_tokens=3, tools=[FEED], tool_choice="required")
    assert (plain["temperature"], plain["top_p"], plain["tool_choice"]) == (1.0, 1.0, "required")
    assert plain["tools"][0]["strict"] is True and plain["metadata"] == {}


def test_log_probabilities_are_those_of_chat(client: openai.OpenAI, server: Running) -> None:
    asked: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    chat = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "🙂 the"}],
        max_tokens=20,
        logprobs=True,
        top_logprobs=3,
        extra_body=asked,
    )
    want = json.loads(chat.choices[0].logprobs.model_dump_json())["content"]  # type: ignore[union-attr]
    body = whole(server, input="🙂 the", max_output_tokens=20, include=LOGPROBS, top_logprobs=3, **asked)
    got = body["output"][0]["content"][0]["logprobs"]
    assert len(got) == 20 and [row["bytes"] for row in got] == [row["bytes"] for row in want]
    assert [row["logprob"] for row in got] == pytest.approx([row["logprob"] for row in want], abs=1e-4)
    assert all(len(row["top_logprobs"]) == 3 for row in got)
    last = streamed(server, input="🙂 the", max_output_tokens=20, include=LOGPROBS, top_logprobs=3, **asked)[-1]["response"]
    assert [row["bytes"] for row in last["output"][0]["content"][0]["logprobs"]] == [row["bytes"] for row in want]


def test_items_follow_the_order_of_what_was_written(server: Running) -> None:
    """Log-probabilities of a call that pass for those of the text around it; text behind a call that goes lost."""
    call = '<tool_call>{"name": "call_vet", "arguments": {"why": "é"}}</tool_call>'
    asked: dict[str, Any] = {
        "input": "x", "tools": [VET], "structured_outputs": {"choice": [f"Let me see.{call} naïve"]}, "include": LOGPROBS,
    }  # fmt: skip
    last = streamed(server, **asked)[-1]["response"]
    for output in (whole(server, **asked)["output"], last["output"]):
        before, made, after = output
        assert (made["type"], made["name"], made["arguments"]) == ("function_call", "call_vet", '{"why": "é"}')
        for message, text in ((before, "Let me see."), (after, " naïve")):
            (part,) = message["content"]
            assert part["text"] == text
            assert b"".join(bytes(row["bytes"]) for row in part["logprobs"]).decode() == text


def test_no_more_calls_than_were_asked_for(server: Running, client: openai.OpenAI) -> None:
    """`parallel_tool_calls: false` that only holds where a call is forced."""
    call = '<tool_call>{"name": "call_vet", "arguments": {}}</tool_call>'
    asked: dict[str, Any] = {"structured_outputs": {"choice": [call * 2]}}
    for parallel, count in ((True, 2), (False, 1)):
        assert len(whole(server, input="x", tools=[VET], parallel_tool_calls=parallel, **asked)["output"]) == count
        chat = client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "x"}], extra_body=asked, parallel_tool_calls=parallel,
            tools=[{"type": "function", "function": {"name": "call_vet"}}],
        )  # fmt: skip
        assert len(chat.choices[0].message.tool_calls or []) == count


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "name": "feed"},
     {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "feed"}]}],
)  # fmt: skip
def test_a_required_call_is_made_and_answered(client: openai.OpenAI, server: Running, choice: Any) -> None:
    """The loop of every agent: a call, its result, an answer."""
    how: dict[str, Any] = {"tools": [FEED, VET], "tool_choice": choice, "parallel_tool_calls": False}
    body = whole(server, input="the cat", seed=3, **how)
    last = streamed(server, input="the cat", seed=3, **how)[-1]["response"]
    found = client.responses.create(model=NAME, input="the cat", extra_body={"seed": 3}, **how)
    (call,) = found.output
    assert call.type == "function_call" and found.status == "completed" and found.output_text == ""
    for output in (body["output"], last["output"]):
        assert [(item["name"], item["arguments"]) for item in output] == [(call.name, call.arguments)]
    if choice != "required":
        assert call.name == "feed" and set(json.loads(call.arguments)) == {"name", "legs"}
    answer: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    conversation: list[Any] = [{"role": "user", "content": "the cat"}, *found.output, answer]
    again = client.responses.create(model=NAME, input=conversation, tools=[FEED, VET], max_output_tokens=5)  # type: ignore[list-item]
    assert again.usage and again.usage.input_tokens > body["usage"]["input_tokens"]


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    old: bool


def test_the_clients_own_helpers(client: openai.OpenAI) -> None:
    """`parse` and `stream` of the SDK put the events together more strictly than most clients."""
    parsed = client.responses.parse(model=NAME, input="the cat", text_format=Pet, extra_body={"seed": 1})
    assert isinstance(parsed.output_parsed, Pet)
    with client.responses.stream(model=NAME, input="the cat", text_format=Pet, extra_body={"seed": 1}) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.output_parsed == parsed.output_parsed and "".join(pieces) == final.output_text
    tool: Any = openai.pydantic_function_tool(Pet)["function"] | {"type": "function"}
    with client.responses.stream(
        model=NAME, input="the cat", tools=[tool], tool_choice="required", parallel_tool_calls=False, extra_body={"seed": 2}
    ) as stream:
        (call,) = stream.get_final_response().output
    assert call.type == "function_call" and Pet.model_validate_json(call.arguments)


@pytest.mark.parametrize("seed", range(2))
def test_formats(server: Running, seed: int) -> None:
    form = {"type": "json_schema", "name": "pet", "schema": PERSON}
    body = whole(server, input="x", text={"format": form}, seed=seed)
    assert set(json.loads(text_of(body))) == {"name", "legs"} and body["text"]["format"] == form | {"strict": True}
    body = whole(server, input="x", text={"format": {"type": "json_object"}, "verbosity": "medium"}, seed=seed)
    assert body["status"] == "incomplete" or isinstance(json.loads(text_of(body)), dict)
    assert whole(server, input="x", text={"format": {"type": "text"}}, max_output_tokens=1)["text"]["format"] == {"type": "text"}


def test_an_answer_that_is_cut_says_so(server: Running) -> None:
    for body in (whole(server, input="x", max_output_tokens=2, ignore_eos=True), whole(server, input="x", ignore_eos=True)):
        assert body["status"] == body["output"][0]["status"] == "incomplete"
        assert body["incomplete_details"] == {"reason": "max_output_tokens"} and body["completed_at"] is None
        assert body["usage"]["total_tokens"] in (body["usage"]["input_tokens"] + 2, 1536)
    body = whole(server, input="x", structured_outputs={"choice": ["one"]})
    assert body["status"] == body["output"][0]["status"] == "completed" and body["completed_at"] >= body["created_at"]


def test_a_failure_on_the_way_ends_the_stream_with_it(
    server: Running, engine: Engine, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that just stops: its client takes half an answer for the whole."""
    steps, step = iter(range(100)), engine.step

    def breaking() -> Any:
        if next(steps) == 4:
            raise RuntimeError("out of memory")
        return step()

    monkeypatch.setattr(engine, "step", breaking)
    asked: dict[str, Any] = {"model": NAME, "input": "the cat", "temperature": 0, "extra_body": {"ignore_eos": True}}
    events = list(client.responses.create(**asked, stream=True))
    last = events[-1]
    EVENT.validate_python(json.loads(last.model_dump_json(exclude_unset=True, by_alias=True)))
    assert last.type == "response.failed" and last.response.status == "failed"
    assert last.response.error and last.response.error.code == "server_error" and "memory" not in last.response.error.message
    assert last.response.output_text == "".join(e.delta for e in events if e.type == "response.output_text.delta") != ""
    steps = iter(range(100))
    with pytest.raises(openai.InternalServerError):
        client.responses.create(**asked)
    steps = iter(range(5, 100))
    assert client.responses.create(**asked, max_output_tokens=3).status == "incomplete"


USER: dict[str, Any] = {"role": "user", "content": "x"}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input"),
    ({"input": ""}, "input"),
    ({"input": None}, "input"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
    ({"input": [USER, 7]}, "input[1].type"),
    ({"input": [{"content": "x"}]}, "input[0].type"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
    ({"input": [{"type": "web_search_call", "id": "ws_1", "status": "completed"}]}, "input[0].type"),
    ({"input": [{"type": ["message"], "role": "user", "content": "x"}]}, "input[0].type"),
    ({"input": [USER | {"role": "tool"}]}, "input[0].role"),
    ({"input": [USER | {"name": "me"}]}, "input[0].name"),
    ({"input": [USER | {"content": None}]}, "input[0].content"),
    ({"input": [USER | {"content": 3}]}, "input[0].content"),
    ({"input": [USER | {"content": [{"type": "input_image", "image_url": "data:"}]}]}, "input[0].content[0].type"),
    ({"input": [USER | {"content": [{"type": "input_file", "file_id": "f"}]}]}, "input[0].content[0].type"),
    ({"input": [USER | {"content": [{"type": "input_audio"}]}]}, "input[0].content[0].type"),
    ({"input": [USER | {"content": [{"type": "refusal", "refusal": "no"}]}]}, "input[0].content[0].type"),
    ({"input": [USER | {"content": [{"type": "input_text", "text": 3}]}]}, "input[0].content[0].text"),
    ({"input": [USER, {"type": "function_call", "call_id": "1", "name": "f", "arguments": 3}]}, "input[1].arguments"),
    ({"input": [USER, {"type": "function_call", "call_id": "1", "arguments": "{}"}]}, "input[1].name"),
    ({"input": [USER, {"type": "function_call_output", "output": "x"}]}, "input[1].call_id"),
    ({"input": [USER, {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}]}, "input[1]"),
    ({"input": [USER, {"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}]}, "input[1]"),
    ({"input": [USER, {"role": "system", "content": "late"}]}, "input"),
    ({"input": "cat " * 3000}, "input"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"stop": [str(i) for i in range(65)]}, "stop"),
    ({"n": 2}, "n"),
    ({"max_tokens": 2}, "max_tokens"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 1536}, "input"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"top_logprobs": 21, "include": LOGPROBS}, "top_logprobs"),
    ({"include": ["reasoning.encrypted_content"]}, "include"),
    ({"truncation": "auto"}, "truncation"),
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object", "not": {}}}}}, "text.format"),
    ({"text": {"format": {"type": "json_object"}}, "tools": [VET], "tool_choice": "required"}, "text.format"),
    ({"tools": [VET, {"type": "web_search"}]}, "tools[1].type"),
    ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
    ({"tools": [VET, VET]}, "tools"),
    ({"tools": [VET | {"defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [VET], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    ({"tools": [VET], "tool_choice": {"type": "function", "name": "fly"}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"metadata": {"a": "b" * 513}}, "metadata"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_what_is_not_done_is_refused_by_name(server: Running, change: dict[str, Any], param: str) -> None:
    """What is accepted and not done is worse than an error."""
    reply = httpx.post(
        f"{server.url}/v1/responses", json={"model": NAME, "input": "x", "max_output_tokens": 2, **change}, timeout=60
    )
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert (error["code"] == "context_length_exceeded") == (param == "input" and ("cat " in str(change) or "1536" in str(change)))


def test_without_a_store_nothing_is_kept(server: Running, client: openai.OpenAI) -> None:
    """An id that is given out for a response that nobody can read again, without a word."""
    body = whole(server, input="x", max_output_tokens=2)
    assert body["store"] is False and whole(server, input="x", max_output_tokens=2, store=False)["store"] is False
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="--store"):
            ask(body["id"])
    with pytest.raises(openai.BadRequestError, match="--store"):
        client.responses.create(model=NAME, input="x", store=True)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="other", input="x")


def test_a_client_that_leaves_frees_its_sequence(server: Running, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled, cancel = threading.Event(), engine.cancel

    def seen(sequence: Any) -> None:
        if sequence.finish_reason is None:
            cancelled.set()
        cancel(sequence)

    monkeypatch.setattr(engine, "cancel", seen)
    body = httpx.Request("POST", server.url, json={"model": NAME, "input": "x", "stream": True, "ignore_eos": True}).content
    with socket.create_connection(server.socket.getsockname()) as raw:
        head = f"POST /v1/responses HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        assert raw.recv(100).startswith(b"HTTP/1.1 200")
    assert cancelled.wait(20)


def test_metrics_count_responses(server: Running) -> None:
    before = scraped(server)
    used = whole(server, input="the cat", max_output_tokens=7, ignore_eos=True)["usage"]
    after = scraped(server)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["generation_tokens_total"] == 7 and grown["prompt_tokens_total"] == used["input_tokens"]
    assert grown["request_success_totallength"] == grown["e2e_request_latency_seconds_count"] == 1
