"""The server against the real `openai` client, on a free loopback port."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.engine import small
from tests.serve.running import Running
from tutelage.engine import Engine, Sampling
from tutelage.errors import ConfigError
from tutelage.serve.app import create_app
from tutelage.serve.engine_thread import EngineThread
from tutelage.serve.listen import Options, check_binding

NAME, HI = "tiny", [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return small.engine(tmp_path_factory.mktemp("tokenizer") / "t", context=512, slots=8)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    running = Running(create_app(engine, engine.renderer, NAME, max_body=100_000))
    yield running
    running.close()


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


def reference(engine: Engine, prompt: Any, sampling: Sampling) -> Any:
    """The same answer from an engine of its own."""
    return Engine(engine.model, engine.renderer, slots=1).generate([prompt], sampling)


def test_models(client: openai.OpenAI, server: Running) -> None:
    """Clients list models before anything else."""
    assert [m.id for m in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert "version" in httpx.get(f"{server.url}/version").json()
    assert httpx.get(f"{server.url}/nothing").json()["error"]["type"] == "invalid_request_error"


def test_chat_equals_the_engine(client: openai.OpenAI, engine: Engine) -> None:
    """Promise 3 over HTTP: the prompt is the renderer's; parameters reach the sampler; usage counts tokens."""
    got = client.chat.completions.create(
        model=NAME, messages=HI, max_completion_tokens=9, temperature=0.8, top_p=0.9, seed=5, n=2, frequency_penalty=0.5,
        extra_body={"top_k": 50, "ignore_eos": True}, user="me", logprobs=True, top_logprobs=2,
    )  # fmt: skip
    want = reference(
        engine, HI, Sampling(9, temperature=0.8, top_p=0.9, seed=5, n=2, frequency_penalty=0.5, top_k=50, ignore_eos=True)
    )
    assert [c.message.content for c in got.choices] == [w.text for w in want]
    assert {c.finish_reason for c in got.choices} == {"length"}
    assert got.usage and got.usage.completion_tokens == 18 and got.usage.prompt_tokens == len(engine.renderer.prompt(HI))
    content = got.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content and len(content) == 9 and all(len(t.top_logprobs) == 2 for t in content)
    ChatCompletion.model_validate(got.model_dump(), strict=True)


def test_chat_streams_the_same(client: openai.OpenAI) -> None:
    """Pieces that differ from the whole, a role that never comes, usage that nobody asked for."""
    how: dict[str, Any] = {"model": NAME, "messages": HI, "max_tokens": 30, "temperature": 1.5, "seed": 3}
    whole = client.chat.completions.create(**how)
    chunks = list(client.chat.completions.create(**how, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason]
    assert len({c.id for c in chunks}) == 1 and all(c.usage is None for c in chunks)
    chunks = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)


def test_stop_text(client: openai.OpenAI) -> None:
    """A stop text that is shown, or that a stream shows the beginning of."""
    how: dict[str, Any] = {"model": NAME, "prompt": "one two", "max_tokens": 60, "temperature": 1.5, "seed": 1}
    text = client.completions.create(**how).choices[0].text
    stop = text[10:13]
    got = client.completions.create(**how, stop=stop).choices[0]
    assert (got.text, got.finish_reason) == (text[: text.index(stop)], "stop")
    assert "".join(c.choices[0].text for c in client.completions.create(**how, stop=[stop], stream=True)) == got.text


def test_completions_take_every_shape_of_prompt(client: openai.OpenAI, engine: Engine) -> None:
    """Evaluation harnesses send token ids, in lists of lists."""
    ids = engine.encode("the cat")
    for prompt, count in (("the cat", 1), (["the cat", "the cat"], 2), (ids, 1), ([ids, ids, ids], 3)):
        got = client.completions.create(
            model=NAME, prompt=prompt, max_tokens=5, temperature=0, n=2, extra_body={"ignore_eos": True}
        )
        assert [c.index for c in got.choices] == list(range(2 * count))
        assert len({c.text for c in got.choices}) == 1
        Completion.model_validate(got.model_dump(), strict=True)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(client: openai.OpenAI, engine: Engine, stream: bool) -> None:
    """Without log-probabilities of the prompt, evaluations over HTTP silently sit at chance."""
    ids = engine.encode("the cat sat on 🙂")
    how: dict[str, Any] = {"model": NAME, "prompt": [ids], "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 2}
    if stream:
        parts = [c.choices[0] for c in client.completions.create(**how, stream=True)]
        text = "".join(p.text for p in parts)
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        logprobs = {n: [x for p in parts if p.logprobs for x in getattr(p.logprobs, n)] for n in names}
    else:
        choice = client.completions.create(**how).choices[0]
        text, logprobs = choice.text, choice.logprobs.model_dump()  # type: ignore[union-attr]
    assert text.startswith("the cat sat on 🙂")
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    want = Engine(engine.model).score([(ids, 1)])[0]
    assert logprobs["token_logprobs"][1 : len(ids)] == pytest.approx(want.tolist(), abs=1e-4)
    assert len(logprobs["tokens"]) in (len(ids), len(ids) + 1)
    for logprob, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert 2 <= len(top) <= 3 and logprob in top.values()
    assert logprobs["text_offset"][:2] == [0, len(engine.renderer.tokenizer.decode(ids[:1], skip_special=True))]


BAD: list[tuple[dict[str, Any], str, str | None]] = [
    ({"max_tokens": 0}, "max_tokens", None),
    ({"temperature": -1}, "temperature", None),
    ({"temperature": "hot"}, "temperature", None),
    ({"temperature": True}, "temperature", None),
    ({"top_p": "1"}, "top_p", None),
    ({"logprobs": 1}, "logprobs", None),
    ({"logit_bias": {"5": "1"}}, "logit_bias", None),
    ({"extra_body": {"stream": "yes"}}, "stream", None),
    ({"extra_body": {"ignore_eos": 0}}, "ignore_eos", None),
    ({"extra_body": {"stream": True, "stream_options": {"include_usage": "true"}}}, "stream_options", None),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", None),
    ({"temperature": 1e-300}, "temperature", None),
    ({"extra_body": {"repetition_penalty": 1e-300}}, "repetition_penalty", None),
    ({"n": 0}, "n", None),
    ({"stop": [""]}, "stop", None),
    ({"stop": [str(i) for i in range(65)]}, "stop", None),
    ({"logit_bias": {"99999": 1}}, "logit_bias", None),
    ({"top_logprobs": 3}, "top_logprobs", None),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
    ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
    ({"extra_body": {"web_search_options": {}}}, "web_search_options", "unsupported_parameter"),
    ({"extra_body": {"guided_json": {}}}, "guided_json", "unsupported_parameter"),
    ({"messages": []}, "messages", None),
    ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role", None),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", None),
    ({"max_tokens": 510}, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": "cat " * 2000}]}, "messages", "context_length_exceeded"),
]


@pytest.mark.parametrize(("change", "param", "code"), BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_bad_requests_name_the_parameter(client: openai.OpenAI, change: dict[str, Any], param: str, code: str | None) -> None:
    """What is accepted and not done is worse than an error; so is a prompt that is cut."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": NAME, "messages": HI, **change})
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.request_id


def test_numbers_may_be_whole(client: openai.OpenAI) -> None:
    """JSON has one kind of number: 1 is right where 1.0 is."""
    client.chat.completions.create(
        model=NAME, messages=HI, temperature=1, top_p=1, presence_penalty=0, logit_bias={"5": 1}, max_tokens=1,
        max_completion_tokens=1,
    )  # fmt: skip


def test_types_are_not_guessed(server: Running) -> None:
    """A value of another type that passes for the right one means what nobody wrote."""
    bad: list[tuple[str, dict[str, Any], str]] = [
        ("v1/completions", {"model": NAME, "prompt": "x", "echo": "no"}, "echo"),
        ("v1/embeddings", {"model": NAME, "input": "x", "dimensions": "64"}, "dimensions"),
        ("v1/responses", {"model": NAME, "input": "x", "stream": 0}, "stream"),
        ("v1/responses", {"model": NAME, "input": "x", "background": 0}, "background"),
        ("v1/responses", {"model": NAME, "input": "x", "temperature": "1"}, "temperature"),
        ("tokenize", {"prompt": "x", "add_special_tokens": 1}, "add_special_tokens"),
        ("detokenize", {"tokens": ["5"]}, "tokens"),
    ]
    for path, body, param in bad:
        reply = httpx.post(f"{server.url}/{path}", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text


def test_a_key_that_comes_twice_is_refused(server: Running) -> None:
    """Readers differ in which of two they take."""
    body = '{"model": "tiny", "prompt": "x", "logit_bias": {"5": 1, "5": 2}}'
    reply = httpx.post(f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400 and "'5' comes twice" in reply.json()["error"]["message"]


def test_bad_completions(client: openai.OpenAI, server: Running) -> None:
    """`suffix` and `best_of` are refused; also an empty prompt, an unknown id, other content types, bad JSON, a huge body."""
    for change in ({"suffix": "x"}, {"best_of": 3}, {"prompt": ""}, {"prompt": [10**9]}, {"prompt": [[]]}, {"prompt": [1.5]}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{"model": NAME, "prompt": "x", **change})  # type: ignore[call-overload]
        assert caught.value.param == next(iter(change))
    with pytest.raises(openai.BadRequestError) as caught:  # their number is the queue's, and each holds its prompt
        client.completions.create(model=NAME, prompt=["x"] * 600, n=2)
    assert caught.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    url = f"{server.url}/v1/completions"
    assert httpx.post(url, content="{", headers={"content-type": "application/json"}).status_code == 400
    assert httpx.post(url, content="{}", headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.post(url, content=b" " * 200_000, headers={"content-type": "application/json"}).status_code == 413
    parts = (b" " * 50_000 for _ in range(4))
    assert httpx.post(url, content=parts, headers={"content-type": "application/json"}).status_code == 413


def test_parallel_requests_share_batches(client: openai.OpenAI, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that wait for each other, or that mix their tokens."""
    sizes: list[int] = []
    step = engine.step

    def counted() -> Any:
        events = step()
        sizes.append(len(events))
        return events

    monkeypatch.setattr(engine, "step", counted)

    def ask(seed: int) -> str:
        got = client.completions.create(
            model=NAME, prompt="one two", max_tokens=200, temperature=1, seed=seed, extra_body={"ignore_eos": True}
        )
        return got.choices[0].text

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(8)))
    assert max(sizes) >= 2 and len(sizes) < 8 * 200
    assert texts == [reference(engine, "one two", Sampling(200, seed=i, ignore_eos=True))[0].text for i in range(8)]
    assert engine.idle and engine.scheduler.slots.used == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_sequence(
    server: Running, engine: Engine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Abandoned requests that run on take the machine from everyone else."""
    cancelled, running = threading.Event(), threading.Event()
    cancel, submit = engine.cancel, engine.submit

    def seen_cancel(sequence: Any) -> None:
        still = sequence.finish_reason is None
        cancel(sequence)
        if still:
            cancelled.set()

    def seen_submit(*rest: Any) -> Any:
        running.set()
        return submit(*rest)

    monkeypatch.setattr(engine, "cancel", seen_cancel)
    monkeypatch.setattr(engine, "submit", seen_submit)
    body = {"model": NAME, "prompt": "x", "max_tokens": 500, "stream": stream, "n": 8, "ignore_eos": True}
    with socket.create_connection(server.socket.getsockname()) as raw:
        text = httpx.Request("POST", server.url, json=body).content
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
        )
        raw.sendall(head.encode() + text)
        assert running.wait(10)
        if stream:
            assert raw.recv(100).startswith(b"HTTP/1.1 200")
    assert cancelled.wait(10)


def test_api_keys(engine: Engine) -> None:
    """A key that is not asked for, or that opens more than its own server."""
    thread = Engine(engine.model, engine.renderer, slots=1)
    server = Running(create_app(thread, engine.renderer, NAME, api_keys=["right-key", "also-right"]))
    try:
        for key in ("right-key", "also-right"):
            assert server.client(key).models.list().data
        for key in ("wrong-key", "right-ke"):
            with pytest.raises(openai.AuthenticationError):
                server.client(key).models.list()
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
    finally:
        server.close()


def test_binding_beyond_this_machine_needs_a_key() -> None:
    """A model that the whole network can use by accident."""
    for host in ("127.0.0.1", "::1", "localhost"):
        check_binding(Options(host=host))
    for how in ({"api_keys": ("key",)}, {"keys": Path("keys.json")}, {"insecure": True}):
        check_binding(Options(host="0.0.0.0", **how))  # type: ignore[arg-type]
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(ConfigError, match="--api-key"):
            check_binding(Options(host=host))


def test_a_failed_step_ends_its_requests_and_the_next_one_works(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine thread that dies leaves every client waiting for ever."""
    thread = EngineThread(Engine(engine.model, engine.renderer, slots=2))
    choose = thread.engine.runner.logits
    thread.start()

    async def ask() -> int:
        response = await thread.submit([(engine.encode("x"), Sampling(3, temperature=0, ignore_eos=True), 0)])
        return sum([len(event.ids) async for _, event in response.events()])

    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(thread.engine.runner, "logits", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(ask())
    monkeypatch.setattr(thread.engine.runner, "logits", choose)
    assert asyncio.run(ask()) == 3
    thread.stop()
    thread.join()
