"""Any request to a running server: no 500, no hang, errors and answers in OpenAI's shapes, and nothing left behind.

TUTELAGE_FUZZ_EXAMPLES=20000 makes a long run of other requests each time; what it finds is printed as code to repeat it.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.engine import small
from tests.serve.requests_at_random import KINDS, NAME, corrupted, odd_texts, spelled
from tests.serve.running import Running
from tutelage.serve.app import build_app
from tutelage.serve.keys import KeyRing, add_key
from tutelage.serve.state import ServerState

LONG = int(os.environ.get("TUTELAGE_FUZZ_EXAMPLES", "0"))
SECONDS = 120
"""What one request may take. All of them are small: what takes longer hangs."""
FIXED = {"model": NAME, "prompt": "the cat sat", "max_tokens": 24, "temperature": 0, "ignore_eos": True, "logprobs": 1}
JSON = {"content-type": "application/json"}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=LONG or examples, derandomize=not LONG, deadline=None, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


class Kept(logging.Handler):
    """Keeps what the server logs as an error: tracebacks that no client sees."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(self.format(record))


class Target:
    """A server, and what it answered before anything happened to it."""

    def __init__(self, folder: Any) -> None:
        engine = small.engine(folder, context=96, slots=4)
        file = folder.parent / "keys.json"
        self.key = f"Bearer {add_key(file, 'me', scopes=('inference', 'metrics', 'admin'))}"
        self.state = ServerState(KeyRing(file=file))
        self.state.models.add(NAME, engine, engine.renderer)
        self.errors = Kept()
        logging.getLogger("uvicorn.error").addHandler(self.errors)
        self.running = Running(build_app(self.state, max_body=300_000))
        self.client = httpx.Client(base_url=self.running.url, timeout=SECONDS, headers={"authorization": self.key})
        self.before = self.fixed()

    def fixed(self) -> Any:
        return self.client.post("/v1/completions", json=FIXED).json()["choices"]

    def is_as_before(self) -> None:
        """Nothing runs, waits or holds a slot, and a greedy answer is the one it always was."""
        served = self.state.models.get(NAME)
        # The client has the last reply a moment before the server is through with its request.
        asyncio.run_coroutine_threadsafe(self.state.models.idle(), self.running.loop).result(SECONDS)
        served.thread.call(lambda engine: None).result(SECONDS)
        engine = served.engine
        assert engine.idle and engine.scheduler.slots.used == 0 and served.thread.waiting == 0
        assert not served.thread._answers and not served.thread._queued and not served._busy
        assert self.fixed() == self.before
        assert not self.errors.records, self.errors.records[0]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    made = Target(tmp_path_factory.mktemp("fuzz") / "t")
    yield made
    made.running.close()


def check_error(reply: httpx.Response) -> dict[str, Any]:
    """An error that OpenAI's clients can read, and that is not the server's."""
    assert 400 <= reply.status_code < 500, (reply.status_code, reply.text[:300])
    body = reply.json()
    error = body["error"]
    assert set(body) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)
    assert all(isinstance(error[name], str | None) for name in ("param", "code"))
    return error  # type: ignore[no-any-return]


def check_stream(path: str, text: str) -> None:
    """Every piece has the right shape, every answer one end, and the stream its own."""
    pieces = [line.partition("data: ")[2] for line in text.split("\n\n") if line]
    if path == "/v1/responses":
        kinds = [EVENT.validate_python(json.loads(piece), strict=True).type for piece in pieces]
        assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete"), kinds
        return
    assert pieces.pop() == "[DONE]", text[-300:]
    kind = ChatCompletionChunk if path == "/v1/chat/completions" else Completion
    ends: dict[int, int] = {}
    for piece in map(json.loads, pieces):
        kind.model_validate({**piece, "choices": []} if kind is Completion else piece, strict=True)
        for choice in piece["choices"]:
            ends[choice["index"]] = ends.get(choice["index"], 0) + (choice["finish_reason"] is not None)
    assert ends and set(ends.values()) == {1}


def check_answer(path: str, body: Any, reply: httpx.Response) -> None:
    """A 200 is what its endpoint promises."""
    if reply.headers["content-type"].startswith("text/event-stream"):
        check_stream(path, reply.text)
    elif path == "/v1/chat/completions":
        answer = ChatCompletion.model_validate(reply.json(), strict=True)
        assert len(answer.choices) == (body.get("n") or 1) and all(choice.finish_reason for choice in answer.choices)
    elif path == "/v1/completions":
        got = reply.json()
        for about in [choice["logprobs"] for choice in got["choices"] if body.get("echo") and choice["logprobs"]]:
            # As OpenAI had it, and as evaluation harnesses need it: nothing predicts the first token of a prompt.
            assert about["token_logprobs"].pop(0) is None and about["top_logprobs"].pop(0) is None
        assert Completion.model_validate(got, strict=True).choices
    elif path == "/v1/responses":
        assert Response.model_validate(reply.json(), strict=True).status in ("completed", "incomplete")
    elif path == "/v1/embeddings":
        vectors = reply.json()
        for row in vectors["data"]:
            if isinstance(row["embedding"], str):
                row["embedding"] = list(base64.b64decode(row["embedding"]))
        assert CreateEmbeddingResponse.model_validate(vectors, strict=True).data
    elif path == "/tokenize":
        assert reply.json()["count"] == len(reply.json()["tokens"])
    else:
        assert path == "/detokenize" and isinstance(reply.json()["prompt"], str)


@pytest.mark.parametrize("path", sorted(KINDS))
def test_requests_with_something_wrong(target: Target, path: str) -> None:
    """A crash, a hang or a slot lost to a request that nobody thought of; a refusal that does not say what was wrong."""

    @fuzz(300 if path.startswith(("/v1/chat", "/v1/comp", "/v1/resp")) else 100)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        body = data.draw(corrupted(path))
        content = data.draw(spelled(body))
        reply = target.client.post(path, content=content, headers=JSON)
        event(str(reply.status_code))  # --hypothesis-show-statistics shows how many were right
        if reply.status_code == 200:
            check_answer(path, body, reply)
            return
        error = check_error(reply)
        if content == json.dumps(body).encode() and body and "valid JSON" not in error["message"]:
            assert error["param"] is not None or reply.status_code != 400, error

    run()
    target.is_as_before()


paths = st.one_of(
    st.sampled_from(
        [*KINDS, "/v1/models", f"/v1/models/{NAME}", "/v1/models/", "/health", "/ready", "/version", "/metrics", "/"]
    ),
    st.text("abc/.%{}?#é\x7f ", max_size=12).map("/".__add__),
    st.builds("/v1/models/{}".format, odd_texts),
)
headers = st.dictionaries(
    st.sampled_from(
        [
            "authorization",
            "content-type",
            "x-request-id",
            "accept",
            "expect",
            "origin",
            "content-encoding",
            "range",
            "te",
            "cookie",
        ]
    ),
    st.one_of(
        st.sampled_from(
            ["application/json", "Bearer x", "gzip", "100-continue", "", "application/json; charset=utf-16", "text/plain"]
        ),
        st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=20),
    ),
    max_size=4,
)


def test_odd_paths_methods_and_headers(target: Target) -> None:
    """An error page of the framework's own, or a header that a log or a parser falls over."""

    @fuzz(400)
    @given(
        st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "QUERY", "get", "X-Y"]),
        paths,
        headers,
        st.binary(max_size=30),
    )
    def run(method: str, path: str, sent: dict[str, str], content: bytes) -> None:
        told = "".join(f"{name}: {value.strip()}\r\n" for name, value in ({"authorization": target.key} | sent).items())
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n{told}\r\n"
        with socket.create_connection(target.running.socket.getsockname(), timeout=SECONDS) as raw:
            raw.sendall(head.encode("utf-8", "replace") + content)
            got = http.client.HTTPResponse(raw, method=method)
            got.begin()
            reply = httpx.Response(got.status, headers=list(got.headers.items()), content=got.read())
        if reply.text == "Invalid HTTP request received.":
            assert reply.status_code == 400  # it never reached the application
        elif reply.status_code >= 400 and method != "HEAD":
            check_error(reply)
        elif path.startswith("/v1/models/") and method == "GET":
            Model.model_validate(reply.json(), strict=True)

    run()
    target.is_as_before()


lines = st.sampled_from(
    [
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n",
        b"GET /health HTTP/1.1\r\n",
        b"content-type: application/json\r\n",
        b"content-length: 40\r\n",
        b"content-length: -1\r\n",
        b"content-length: 99999999999999999999999\r\n",
        b"transfer-encoding: chunked\r\n",
        b"\r\n",
        b"ffffffffffffffff\r\n",
        b'5\r\n{"a"}\r\n',
        b"0\r\n\r\n",
        b"connection: upgrade\r\nupgrade: websocket\r\n",
        b"x" * 70_000,
        b"\x16\x03\x01\x02\x00\x01",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
)


def test_bytes_that_are_hardly_http(target: Target) -> None:
    """Whoever connects and leaves in the middle: what was begun for them must end."""

    @fuzz(150)
    @given(st.lists(st.one_of(lines, st.binary(max_size=20)), max_size=6))
    @example(
        [
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n",
            b"content-type: application/json\r\n",
            b"content-length: 40\r\n",
            b"\r\n",
            b"{",
        ]
    )
    def run(parts: list[bytes]) -> None:
        with socket.create_connection(target.running.socket.getsockname(), timeout=SECONDS) as raw:
            try:
                raw.sendall(b"".join(parts).replace(b"host: x", f"host: x\r\nauthorization: {target.key}".encode()))
                raw.shutdown(socket.SHUT_WR)
                got = b""
                while part := raw.recv(65536):
                    got += part
            except TimeoutError:
                raise
            except OSError:  # the server has closed the connection already
                return
            assert b" 500 " not in got.split(b"\r\n")[0], got[:200]

    run()
    target.is_as_before()
