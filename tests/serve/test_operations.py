"""What those who run a server look at, and what clients get when something is not as they think."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine import small
from tests.serve.running import Running
from tutelage import __version__
from tutelage.engine import Engine
from tutelage.serve.app import build_app, create_app
from tutelage.serve.keys import KeyRing
from tutelage.serve.state import ServerState

NAME = "tiny"
LONG: dict[str, Any] = {"model": NAME, "prompt": "x", "max_tokens": 400, "ignore_eos": True, "n": 2}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return small.engine(tmp_path_factory.mktemp("tokenizer") / "t", context=512, slots=4)


@pytest.fixture
def state(engine: Engine) -> ServerState:
    state = ServerState(KeyRing(), max_waiting=1)
    state.models.add(NAME, engine, engine.renderer)
    return state


@pytest.fixture
def server(state: ServerState) -> Iterator[Running]:
    running = Running(build_app(state))
    yield running
    running.close()


def test_ready_says_whether_to_send_requests(server: Running, state: ServerState) -> None:
    """A balancer that sends requests to a server that loads, shuts down, or has no model."""

    def ready() -> tuple[int, str]:
        reply = httpx.get(f"{server.url}/ready")
        return reply.status_code, reply.json()["status"]

    assert ready() == (200, "ready")
    state.starting = True
    assert ready() == (503, "loading")
    state.draining = True
    assert ready() == (503, "draining")
    assert httpx.get(f"{server.url}/health").status_code == 200
    with pytest.raises(openai.InternalServerError) as caught:
        server.client().completions.create(model=NAME, prompt="x")
    assert caught.value.status_code == 503 and caught.value.code == "shutting_down"
    assert caught.value.response.headers["retry-after"] == "1"
    assert server.client().models.list().data
    state.starting = state.draining = False
    asyncio.run_coroutine_threadsafe(state.models.unload(NAME), server.loop).result(10)
    assert ready() == (503, "no model")


def test_probes_may_ask_for_heads(server: Running) -> None:
    """Health checks that use HEAD and take 405 for death."""
    for path in ("/health", "/ready", "/version"):
        head = httpx.head(server.url + path)
        assert head.status_code == 200 and head.content == b""
    assert httpx.head(f"{server.url}/nothing").status_code == 404
    assert httpx.get(f"{server.url}/version").json() == {"version": __version__}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("POST", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("DELETE", "/health", 405),
     ("GET", "/v1/models/other", 404), ("POST", "/tokenize", 415)],
)  # fmt: skip
def test_every_error_has_openais_shape(server: Running, method: str, path: str, status: int) -> None:
    """Clients that fail while they read the error."""
    reply = httpx.request(method, server.url + path)
    error = reply.json()["error"]
    assert reply.status_code == status and set(error) == {"message", "type", "param", "code"} and error["message"]
    assert (status == 405) == ("allow" in reply.headers)


def test_request_ids(server: Running, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply without the id that the log has, above all a failed one; and an id that forges a line of the log."""
    sane = "trace-1:2.3_4"
    for path in ("/health", "/nothing", "/v1/models"):
        assert httpx.get(server.url + path, headers={"x-request-id": sane}).headers["x-request-id"] == sane
        for bad in ("", "a b", "x" * 129, "a\tb"):
            made = httpx.get(server.url + path, headers={"x-request-id": bad}).headers["x-request-id"]
            assert made != bad and len(made) == 32

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(engine.renderer, "prompt", broken)
    with pytest.raises(openai.InternalServerError) as caught:
        server.client().chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x"}])
    assert caught.value.request_id and caught.value.type == "server_error" and "secret" not in caught.value.message


def test_odd_values_are_the_clients_fault(server: Running) -> None:
    """Half a surrogate pair, numbers without end, nesting without end: nothing of it may be a 500, or stop the others."""
    deep = "[" * 100_000
    for text in ('{"prompt": "\\ud800"}', '{"seed": 1e400}', '{"prompt": [NaN]}', '{"prompt": ' + deep, '{"top_k": -1}', "nul",
                 '{"model": "\\udfff"}', '{"n": 1000000000000}'):  # fmt: skip
        body = text.replace("{", '{"model": "tiny", "max_tokens": 1, ', 1)
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"):
            reply = httpx.post(server.url + path, content=body, headers={"content-type": "application/json"})
            assert reply.status_code in (400, 404), (path, text[:40], reply.text)
    assert httpx.post(f"{server.url}/v1/completions", json={"model": NAME, "prompt": "x", "seed": 10**30}).status_code == 200


def test_a_full_queue_refuses(server: Running, state: ServerState, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue without an end: everybody waits, and nobody is told."""
    go, stepping = threading.Event(), threading.Event()
    step = engine.step

    def held() -> Any:
        stepping.set()
        assert go.wait(20)
        return step()

    monkeypatch.setattr(engine, "step", held)
    ask = {"model": NAME, "prompt": "x", "max_tokens": 2}
    url = f"{server.url}/v1/completions"
    thread = state.models.get(NAME).thread
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(httpx.post, url, json=ask, timeout=30)
        assert stepping.wait(10)
        waiting = None
        while not thread.waiting:
            waiting = waiting or pool.submit(httpx.post, url, json=ask, timeout=30)
        refused = httpx.post(url, json=ask)
        go.set()
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) > 0
        assert running.result().status_code == 200
        assert waiting is None or waiting.result().status_code == 200
    assert httpx.post(url, json=ask).status_code == 200


def scraped(server: Running) -> dict[str, float]:
    reply = httpx.get(f"{server.url}/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    out = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            if sample.labels.get("model_name") == NAME and sample.labels.get("le", "+Inf") == "+Inf":
                out[sample.name.removeprefix("vllm:") + sample.labels.get("finished_reason", "")] = sample.value
    return out


def test_metrics_count_what_happened(server: Running) -> None:
    """Dashboards made for vLLM that stay empty, or that count tokens which nobody was billed for."""
    zero = scraped(server)
    assert zero["request_success_totalstop"] == zero["kv_cache_usage_perc"] == zero["num_requests_running"] == 0
    got = server.client().completions.create(
        model=NAME, prompt=[[1, 2, 3], [4, 5]], max_tokens=6, extra_body={"ignore_eos": True}, temperature=0
    )
    vectors = server.client().embeddings.create(model=NAME, input=[[1, 2, 3, 4]])
    after = scraped(server)
    assert got.usage and after["generation_tokens_total"] == got.usage.completion_tokens == 12
    assert after["prompt_tokens_total"] == got.usage.prompt_tokens + vectors.usage.prompt_tokens
    assert after["request_success_totallength"] == 2 and after["request_success_totalstop"] == 1  # the vector, as in vLLM
    for name, count in (
        ("time_to_first_token", 3),
        ("inter_token_latency", 10),
        ("e2e_request_latency", 3),
        ("request_queue_time", 3),
    ):
        assert after[f"{name}_seconds_count"] == count, name
    assert 0 < after["time_to_first_token_seconds_sum"] < after["e2e_request_latency_seconds_sum"] < 60
    assert {"prefix_cache_queries_total", "prefix_cache_hits_total", "num_requests_waiting"} <= set(after)


def test_metrics_show_what_runs(server: Running, state: ServerState, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gauges that stand still, and an aborted request that looks like one that never was."""
    steps, held, go = iter(range(1000)), threading.Event(), threading.Event()
    step = engine.step

    def pausing() -> Any:
        events = step()
        if next(steps) == 3:
            held.set()
            assert go.wait(20)
        return events

    monkeypatch.setattr(engine, "step", pausing)
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}, timeout=30):
        assert held.wait(10)
        during = scraped(server)
        assert (during["num_requests_running"], during["num_requests_waiting"]) == (2, 0)
        assert 0 < during["kv_cache_usage_perc"] < 1
    go.set()
    asyncio.run_coroutine_threadsafe(state.models.idle(), server.loop).result(10)
    state.models.get(NAME).thread.call(lambda engine: None).result(10)
    after = scraped(server)
    assert after["num_requests_running"] == after["kv_cache_usage_perc"] == 0
    assert after["request_success_totalabort"] == 2


def test_two_applications_count_apart(engine: Engine) -> None:
    """Metrics in the library's global registry: the second application of a process cannot start."""
    for _ in range(2):
        create_app(engine, engine.renderer, NAME)


def test_a_client_that_leaves_before_the_first_byte_frees_its_sequence(engine: Engine, state: ServerState) -> None:
    """A stream whose generator never began has no end to clean up in: its sequences would run on for nobody."""
    app = build_app(state)
    body = json.dumps({**LONG, "stream": True}).encode()
    mail: Iterator[dict[str, Any]] = iter([{"type": "http.request", "body": body}, {"type": "http.disconnect"}])
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "asgi": {"spec_version": "2.3"}, "http_version": "1.1",
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return next(mail)

    async def never(_: Any) -> None:
        await asyncio.Event().wait()

    async def ask() -> None:
        async with app.router.lifespan_context(app):
            await asyncio.wait_for(app(scope, receive, never), 20)
            await asyncio.wrap_future(state.models.get(NAME).thread.call(lambda engine: None))
            assert engine.idle and engine.scheduler.slots.used == 0
            await asyncio.wait_for(state.models.idle(), 5)

    asyncio.run(ask())
