"""What a server does not let in: hosts of others, connections without a request, texts that cannot fit, short keys."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tutelage.cli.chat import visible
from tutelage.engine import Engine
from tutelage.engine.text_limit import TextLimit
from tutelage.errors import ConfigError, DataError
from tutelage.serve.connections import Bounds, protocol
from tutelage.serve.engines import check_engine
from tutelage.serve.keys import KeyRing, make_key
from tutelage.serve.middleware import _check_local
from tutelage.serve.options import Options
from tutelage.serve.schema import ApiError


@pytest.mark.parametrize("key", ["", " ", "short", "with a space", "sch\u00fcssel1"])
def test_unusable_keys_are_refused(key: str) -> None:
    """`--api-key "$UNSET"` opened the server to everybody."""
    with pytest.raises(ConfigError, match="not a usable API key"):
        KeyRing([key])
    with pytest.raises(ConfigError):
        make_key("a", key)


@pytest.mark.parametrize("headers", [{b"host": b"evil.example"}, {b"host": b"localhost.evil.example:80"}, {b"origin": b"null"},
    {b"host": b"127.0.0.1:8000", b"origin": b"http://evil.example"}])  # fmt: skip
def test_other_hosts_are_refused(headers: dict[bytes, bytes]) -> None:
    """A name of somebody else's that leads to this machine (DNS rebinding)."""
    with pytest.raises(ApiError):
        _check_local(headers)


def test_this_machine_is_let_in() -> None:
    """By each of its names, with and without a port."""
    for host in (b"localhost", b"localhost:8000", b"127.0.0.1:80", b"[::1]:8000"):
        _check_local({b"host": host, b"origin": b"http://" + host})
    _check_local({})


def test_only_texts_that_cannot_fit_are_refused_before_they_are_tokenized(engine: Engine) -> None:
    """A prompt of 4 MB took seconds and gigabytes for a 400; the longest text that fits must still pass."""
    vocabulary = engine.vocabulary
    assert vocabulary is not None
    limit = TextLimit(engine.renderer.tokenizer, vocabulary, 256)
    longest = max((vocabulary.of(i) for i in range(len(vocabulary))), key=len).decode("utf-8", "ignore")
    assert limit.most is not None
    limit.check(longest * 256)
    with pytest.raises(DataError, match="longer than the context"):
        limit.check("a " * 1_000_000)


@pytest.mark.parametrize(("how", "field"), [({"device": "banana"}, "device"), ({"cache_gib": float("inf")}, "cache_gib")])
def test_settings_that_no_machine_has(how: dict[str, Any], field: str) -> None:
    """Both were tracebacks."""
    with pytest.raises(ConfigError) as caught:
        check_engine(Options(**how))
    assert caught.value.field == field


def test_a_models_control_characters_are_shown() -> None:
    """They could rewrite what stands in the terminal."""
    assert visible("a\x1b[31m\tb\r\n\u202e") == "a\\x1b[31m\tb\\r\n\\u202e"


def test_a_request_that_does_not_come_is_ended() -> None:
    """Half a request head kept its connection for ever."""
    import asyncio

    import uvicorn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    async def tried() -> tuple[bytes, int, bytes]:
        config = uvicorn.Config(app, port=0, log_level="error", http=protocol(Bounds(2, 0.3)), lifespan="off")
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: lo")
        late = await asyncio.wait_for(reader.read(), 5)
        async with httpx.AsyncClient() as client:
            status = (await client.get(f"http://127.0.0.1:{port}/")).status_code
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        refused = await asyncio.wait_for(held[-1][0].read(), 5)
        for _, each in held:
            each.close()
        server.should_exit = True
        await task
        return late, status, refused

    late, status, refused = asyncio.run(tried())
    assert late.startswith(b"HTTP/1.1 408") and status == 200 and refused.startswith(b"HTTP/1.1 503")
