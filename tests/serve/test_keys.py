"""Keys, their scopes and their limits."""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.engine import small
from tests.pipeline import tutelage
from tests.serve.running import Running
from tutelage.engine import Engine
from tutelage.errors import ArtifactError, ConfigError, DataError
from tutelage.serve.app import build_app
from tutelage.serve.keys import KeyRing, add_key, read_keys, remove_key
from tutelage.serve.limits import Allowance, Bucket, duration
from tutelage.serve.schema import ApiError
from tutelage.serve.state import ServerState

ASK: dict[str, Any] = {"model": "tiny", "prompt": [1, 2, 3, 4, 5, 6], "max_tokens": 4, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return small.engine(tmp_path_factory.mktemp("tokenizer") / "t", context=512, slots=4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def server(engine: Engine, file: Path) -> Iterator[Running]:
    """With the keys that `file` has by now, and whatever comes to it later."""
    if not file.exists():
        add_key(file, "first")
    state = ServerState(KeyRing(["from-the-command-line"], file))
    state.models.add("tiny", engine, engine.renderer)
    running = Running(build_app(state))
    yield running
    running.close()


def test_the_command_line_makes_lists_and_removes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key that the file gives away, that is printed twice, or that stays when it was removed."""
    made = tutelage(capsys, "keys", "add", str(file), "ann", "--scope", "admin", "--scope", "metrics", "--tokens-per-minute", "9")
    secret = made.out.strip()
    assert made.code == 0 and secret.startswith("tut-") and len(secret) > 40
    assert tutelage(capsys, "keys", "add", str(file), "bob").out != made.out
    assert secret not in file.read_text() and secret[4:] not in file.read_text()
    listed = tutelage(capsys, "keys", "list", str(file)).out.splitlines()
    assert listed[0].startswith("ann  admin,metrics  9 tokens/min") and listed[1].startswith("bob  inference  no limit")
    assert KeyRing(file=file).find(f"Bearer {secret}".encode()) is not None
    assert tutelage(capsys, "keys", "remove", str(file), "ann").code == 0
    assert KeyRing(file=file).find(f"Bearer {secret}".encode()) is None
    assert "bob" in tutelage(capsys, "keys", "remove", str(file), "ann").err


def test_mistakes_name_the_field(file: Path) -> None:
    """A key file that is half understood opens or closes a server for the wrong people."""
    for wrong in ({"scopes": ["root"]}, {"tokens_per_minute": 0}, {"scopes": []}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            add_key(file, "a", **wrong)
    add_key(file, "a")
    with pytest.raises(ConfigError, match="of this name"):
        add_key(file, "a")
    with pytest.raises(ConfigError, match="no key"):
        remove_key(file, "b")
    rows = json.loads(file.read_text())
    file.write_text(json.dumps({**rows, "keys": [{**rows["keys"][0], "scope": "admin"}]}))
    with pytest.raises(DataError, match=r"keys\.0\.scope"):
        read_keys(file)
    file.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_keys(file)
    with pytest.raises(ArtifactError, match="keys add"):
        KeyRing(file=file.with_name("none.json"))


def test_a_pipe_is_never_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a server that waits for ever for a key file that is a pipe."""
    os.mkfifo(file)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("the pipe was opened"))
    with pytest.raises(ArtifactError, match="not a regular file"):
        read_keys(file)


def test_deeply_nested_json_is_an_error(file: Path) -> None:
    """Guards against a RecursionError instead of an error that names the file."""
    file.write_text("[" * 20_000 + "]" * 20_000)
    with pytest.raises(DataError) as caught:
        read_keys(file)
    assert caught.value.file == file


def test_every_key_is_compared_in_constant_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison that ends at the first difference, or at the right key, tells how near a guess is."""
    secrets = [add_key(file, name) for name in "abc"]
    ring = KeyRing(["given-here"], file)
    seen: list[int] = []
    compare = hmac.compare_digest

    def counted(a: Any, b: Any) -> bool:
        seen.append(len(a))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    assert ring.find(f"Bearer {secrets[0]}".encode()) and ring.find(b"Bearer wrong") is None
    assert seen == [64] * 8
    assert ring.find(f"Basic {secrets[0]}".encode()) is None and ring.find(b"") is None


def test_scopes(server: Running, file: Path) -> None:
    """A key for dashboards that can ask the model, or one for the model that reads everybody's numbers."""
    keys = {scope: add_key(file, scope, scopes=[scope]) for scope in ("inference", "metrics", "admin")}
    keys |= {"given": "from-the-command-line"}
    opens = {"/v1/models": {"inference", "given"}, "/metrics": {"metrics"}, "/admin/nothing": {"admin"},
             "/nothing": {"inference", "given"}, "/health": {*keys}}  # fmt: skip
    for path, allowed in opens.items():
        for scope, key in keys.items():
            reply = httpx.get(server.url + path, headers={"authorization": f"Bearer {key}"})
            assert (reply.status_code == 403) == (scope not in allowed), (path, scope)
            assert reply.status_code != 403 or reply.json()["error"]["code"] == "insufficient_scope"
    wrong = httpx.get(f"{server.url}/v1/models", headers={"authorization": "Bearer wrong"})
    assert wrong.status_code == 401 and wrong.json()["error"]["code"] == "invalid_api_key" and wrong.headers["www-authenticate"]
    assert [httpx.get(server.url + path).status_code for path in ("/metrics", "/nothing", "/health")] == [401, 401, 200]


def test_a_changed_file_is_obeyed_at_once(server: Running, file: Path) -> None:
    """A leaked key that works until somebody restarts the server; a broken file that locks everybody out."""
    key = add_key(file, "leaked")
    assert server.client(key).models.list().data
    whole = file.read_text()
    file.write_text(whole[:50])
    assert server.client(key).models.list().data
    file.write_text(whole)
    remove_key(file, "leaked")
    with pytest.raises(openai.AuthenticationError):
        server.client(key).models.list()


def test_requests_per_minute(server: Running, file: Path) -> None:
    """A limit that nobody is told about, or that the next key pays for."""
    client = server.client(add_key(file, "slow", requests_per_minute=2))
    replies = [client.completions.with_raw_response.create(**ASK) for _ in range(2)]
    assert [r.headers["x-ratelimit-remaining-requests"] for r in replies] == ["1", "0"]
    assert replies[0].headers["x-ratelimit-limit-requests"] == "2"
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(**ASK)
    assert caught.value.code == "rate_limit_exceeded" and caught.value.type == "requests"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30
    assert client.models.list().data  # looking is free
    unlimited = server.client("from-the-command-line").completions.with_raw_response.create(**ASK)
    assert not [name for name in unlimited.headers if name.startswith("x-ratelimit")]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_per_minute(server: Running, file: Path, stream: bool) -> None:
    """Prompts are paid when they are let in, answers as they come; what was refused costs nothing."""
    client = server.client(add_key(file, "some", tokens_per_minute=16))
    for change, status in (({"prompt": [1] * 17}, 429), ({"max_tokens": 5000}, 400)):
        with pytest.raises(openai.APIStatusError) as refused:
            client.completions.create(**{**ASK, **change})
        assert refused.value.status_code == status
        assert refused.value.response.headers["x-ratelimit-remaining-tokens"] == "16"
        assert status == 400 or refused.value.response.headers["x-should-retry"] == "false"
    reply = client.completions.with_raw_response.create(**ASK, stream=stream)
    assert reply.headers["x-ratelimit-remaining-tokens"] == ("10" if stream else "6")
    if stream:
        list(reply.parse())
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(**{**ASK, "prompt": [1] * 8})
    assert caught.value.type == "tokens" and 1 <= int(caught.value.response.headers["retry-after"]) <= 8
    assert caught.value.response.headers["x-ratelimit-limit-tokens"] == "16"


def test_simultaneous_answers_fit_the_limit_together() -> None:
    """Guards a key's limit against requests side by side, each admitted before the tokens of the others are made."""
    allowance = Allowance(None, 100, clock=lambda: 0.0)
    with allowance.admitting(10, 500):  # alone: an answer may be larger than the limit
        pass
    with pytest.raises(ApiError) as caught, allowance.admitting(10, 5):
        pass
    assert caught.value.status == 429 and 1 <= int(caught.value.headers["retry-after"]) <= 60
    allowance.release(480)
    with allowance.admitting(10, 60):
        pass
    with pytest.raises(ApiError), allowance.admitting(1, 0):
        pass
    allowance.release(80)
    with allowance.admitting(80, 1000):
        pass


def test_buckets_refill_evenly() -> None:
    """A window that opens all at once, or a debt that is forgotten."""
    now = [0.0]
    bucket = Bucket(60, clock=lambda: now[0])
    assert bucket.take(60) and not bucket.take(1) and bucket.seconds_until(60) == 60
    now[0] = 1.0
    assert bucket.take(1) and not bucket.take(1)
    bucket.spend(30)
    assert bucket.level == -30 and bucket.seconds_until(1) == 31
    now[0] = 1000.0
    assert bucket.level == 60
    allowance = Allowance(None, 10, clock=lambda: now[0])
    with pytest.raises(ValueError), allowance.admitting(10):
        raise ValueError
    with allowance.admitting(10), pytest.raises(ApiError), allowance.admitting(1):
        pass
    assert [duration(s) for s in (0, 0.017, 8.64, 59.99, 60, 360)] == ["0ms", "17ms", "8.64s", "60s", "1m0s", "6m0s"]


def test_the_prefix_cache_is_shared_within_one_key_only(server: Running, file: Path) -> None:
    """Guards against a key that learns from `cached_tokens`, or from the time, what another key has asked."""
    ask = {"model": "tiny", "prompt": [5 + i % 90 for i in range(300)], "max_tokens": 2}

    def cached(client: openai.OpenAI) -> int:
        usage = client.completions.create(**ask).usage  # type: ignore[call-overload]
        return (usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0) or 0

    mine, other = (server.client(add_key(file, name)) for name in ("mine", "other"))
    assert cached(mine) == 0 and cached(mine) > 0
    assert cached(other) == 0 and cached(other) > 0
