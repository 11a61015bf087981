"""Responses that are kept: read again, continued, deleted, by nobody but their owner, also after the server was killed."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import ResponseItemList

from tests.engine import small
from tests.pipeline import tutelage
from tests.serve.running import Process, Running
from tutelage.engine import Engine
from tutelage.errors import StorageError
from tutelage.serve.app import build_app, create_app
from tutelage.serve.keys import KeyRing, add_key
from tutelage.serve.responses.items import read_input
from tutelage.serve.responses.store import ResponseStore, Stored
from tutelage.serve.state import ServerState

NAME = "tiny"
SHORT: dict[str, Any] = {"model": NAME, "max_output_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return small.engine(tmp_path_factory.mktemp("tokenizer") / "t", context=512, slots=4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "responses.db"


@pytest.fixture
def server(engine: Engine, path: Path) -> Iterator[Running]:
    running = Running(create_app(again(engine), engine.renderer, NAME, store=ResponseStore(path)))
    yield running
    running.close()


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return server.client()


def again(engine: Engine) -> Engine:
    """Another engine of the same model: a server keeps its own."""
    return Engine(engine.model, engine.renderer, slots=4)


def test_a_conversation_continues(client: openai.OpenAI) -> None:
    """A turn that the model does not see, instructions that stay, a response that differs from the one that was given out."""
    first = client.responses.create(**SHORT, input="the cat", instructions="Be brief")
    with client.responses.stream(**SHORT, input="one two", previous_response_id=first.id) as stream:
        *_, last = stream
    second = last.response  # type: ignore[union-attr]
    third = client.responses.create(**SHORT, input="go on", previous_response_id=second.id, store=False)
    turns: list[Any] = [
        {"role": "user", "content": "the cat"}, {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "one two"}, {"role": "assistant", "content": second.output_text},
        {"role": "user", "content": "go on"},
    ]  # fmt: skip
    for got, messages in ((second, turns[:3]), (third, turns)):
        want = client.chat.completions.create(model=NAME, messages=messages, max_tokens=6, temperature=0)
        assert got.output_text == want.choices[0].message.content
        assert got.usage and want.usage and got.usage.input_tokens == want.usage.prompt_tokens
    assert first.to_dict()["store"] is second.to_dict()["store"] is True and third.to_dict()["store"] is False
    for kept in (first, second):
        assert client.responses.retrieve(kept.id).to_dict() == kept.to_dict()
    assert (second.previous_response_id, second.instructions) == (first.id, None)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(third.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**SHORT, input="x", previous_response_id=third.id)
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")


def test_calls_are_continued(client: openai.OpenAI) -> None:
    """The call is in the store, only its result comes with the next request."""
    tool: Any = {"type": "function", "name": "call_vet", "parameters": None, "strict": False}
    first = client.responses.create(model=NAME, input="x", tools=[tool], tool_choice="required", parallel_tool_calls=False)
    (call,) = first.output
    assert call.type == "function_call"
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "well"}
    second = client.responses.create(**SHORT, input=[result], previous_response_id=first.id, tools=[tool])
    spelt = client.responses.create(**SHORT, input=[{"role": "user", "content": "x"}, call.to_dict(), result], tools=[tool])  # type: ignore[list-item]
    assert second.output_text == spelt.output_text and second.usage and spelt.usage
    assert second.usage.input_tokens == spelt.usage.input_tokens


def test_deleting_takes_the_end_of_a_conversation_with_it(client: openai.OpenAI) -> None:
    """A deleted turn that is still told to the model, or a conversation that is silently told from its middle."""
    ids: list[str] = []
    for text in ("one", "two", "three"):
        ids.append(client.responses.create(**SHORT, input=text, previous_response_id=ids[-1] if ids else None).id)
    client.responses.delete(ids[0])
    for gone in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            gone(ids[0])
    assert client.responses.retrieve(ids[2]).previous_response_id == ids[1]
    for last in ids:
        with pytest.raises(openai.BadRequestError, match=ids[0]) as caught:
            client.responses.create(**SHORT, input="x", previous_response_id=last)
        assert caught.value.code == "previous_response_not_found"


def test_input_items(client: openai.OpenAI, server: Running) -> None:
    rows: list[Any] = [{"role": "user", "content": str(i)} for i in range(5)]
    rows[1] = {"role": "assistant", "content": "one"}
    rows += [
        {"type": "function_call", "call_id": "call00000", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call00000", "output": "2"},
    ]
    made = client.responses.create(**SHORT, input=rows)
    url = f"{server.url}/v1/responses/{made.id}/input_items"
    page = httpx.get(url, params={"order": "asc"}).json()
    ResponseItemList.model_validate(page, strict=True)
    assert [item["type"] for item in page["data"]] == ["message"] * 5 + ["function_call", "function_call_output"]
    assert [item["content"][0]["text"] for item in page["data"][:3]] == ["0", "one", "2"] and page["has_more"] is False
    ids = [item["id"] for item in page["data"]]
    assert len(set(ids)) == 7 and (page["first_id"], page["last_id"]) == (ids[0], ids[-1])
    assert [item.id for item in client.responses.input_items.list(made.id, limit=2)] == ids[::-1]  # the client turns the pages
    page = httpx.get(url, params={"after": ids[3], "limit": 2}).json()
    assert [item["id"] for item in page["data"]] == [ids[2], ids[1]] and page["has_more"] is True
    assert httpx.get(url, params={"after": ids[0]}).json()["data"] == []
    for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "msg_0"}, {"include": "x"}):
        reply = httpx.get(url, params=wrong)  # type: ignore[arg-type]
        assert reply.status_code == 400 and reply.json()["error"]["param"] == next(iter(wrong))


def test_what_a_kept_response_does_not_do(client: openai.OpenAI) -> None:
    made = client.responses.create(**SHORT, input="x")
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(made.id)
    with pytest.raises(openai.BadRequestError) as caught:
        list(client.responses.retrieve(made.id, stream=True))
    assert caught.value.param == "stream"
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.retrieve(made.id, include=["message.output_text.logprobs"])
    assert caught.value.param == "include"


def test_a_failed_response_is_not_kept(
    server: Running, client: openai.OpenAI, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A response that says it is stored when the disk refused it; an answer that is lost though nobody asked to keep it."""
    with sqlite3.connect(path) as other:
        other.execute("DROP TABLE responses")
    *_, last = client.responses.create(**SHORT, input="x", stream=True, store=True)
    assert last.type == "response.failed" and last.response.to_dict()["store"] is False
    with pytest.raises(openai.InternalServerError):
        client.responses.create(**SHORT, input="x", store=True)
    reply = client.responses.with_raw_response.create(**SHORT, input="x")
    assert "not kept" in reply.headers["warning"] and reply.parse().to_dict()["store"] is False and reply.parse().output_text
    *_, last = client.responses.create(**SHORT, input="x", stream=True)
    assert last.type in ("response.completed", "response.incomplete") and last.response.to_dict()["store"] is False


def test_every_key_has_its_own(engine: Engine, path: Path, tmp_path: Path) -> None:
    """Conversations that another customer reads, continues or deletes; one's own that are gone after a restart."""
    file = tmp_path / "keys.json"
    filed = add_key(file, "ann")
    made: dict[str, str] = {}
    for keys in (KeyRing(["first-key", "second-key"], file), KeyRing(["second-key", "first-key"], file)):
        state = ServerState(keys, store=ResponseStore(path))
        state.models.add(NAME, again(engine), engine.renderer)
        running = Running(build_app(state))
        for key in ("first-key", "second-key", filed):
            client = running.client(key)
            mine = made.setdefault(key, client.responses.create(**SHORT, input=key[:4]).id)
            assert client.responses.retrieve(mine).id == mine
            for response_id in set(made.values()) - {mine}:
                for ask in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
                    with pytest.raises(openai.NotFoundError):
                        ask(response_id)
                with pytest.raises(openai.BadRequestError):
                    client.responses.create(**SHORT, input="x", previous_response_id=response_id)
        running.close()


def test_many_at_once(client: openai.OpenAI) -> None:
    def converse(number: int) -> str:
        first = client.responses.create(**SHORT, input=f"one {number}")
        second = client.responses.create(**SHORT, input="two", previous_response_id=first.id)
        assert client.responses.retrieve(first.id).output == first.output
        (item,) = client.responses.input_items.list(first.id)
        assert item.to_dict()["content"][0]["text"] == f"one {number}"  # type: ignore[index]
        return second.id

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(converse, range(16)))) == 16


def test_a_slow_disk_holds_up_nobody_else(server: Running, client: openai.OpenAI, path: Path) -> None:
    """A commit on the event loop: every stream of every client stands still while one response is written."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: client.responses.create(**SHORT, input="x"))
        assert client.responses.create(**SHORT, input="y", store=False).output
        assert httpx.get(f"{server.url}/health", timeout=5).status_code == 200 and not waiting.done()
        other.execute("COMMIT")
        other.close()
        assert client.responses.retrieve(waiting.result().id)


@pytest.mark.parametrize("stream", [True, False])
def test_what_a_client_has_heard_of_survives_kill_9(start: Any, tmp_path: Path, path: Path, stream: bool) -> None:
    """A response that was announced as finished and is gone."""
    folder = small.saved(tmp_path, "tiny", 256)
    process: Process = start(str(folder), "--store", str(path), "--store-days", "2")
    if stream:
        for event in process.client.responses.create(**SHORT, input="x", stream=True):
            if event.type == "response.incomplete":
                break
        made = event.response  # type: ignore[union-attr]
    else:
        made = process.client.responses.create(**SHORT, input="x")
    process.popen.kill()
    process.popen.wait()
    assert path.stat().st_mode & 0o077 == 0  # conversations are nobody else's business
    client = start(str(folder), "--store", str(path)).client
    assert client.responses.retrieve(made.id).to_dict() == made.to_dict()
    assert client.responses.create(**SHORT, input="y", previous_response_id=made.id).usage


def row(number: int, days_old: float, previous: str | None = None) -> Stored:
    response = {"id": f"resp_{number}", "created_at": int(time.time() - days_old * 86_400), "output": []}
    return Stored(read_input(str(number)), response, previous)


def test_old_responses_go(path: Path) -> None:
    """A store that grows for ever; a conversation that loses its beginning while somebody is having it."""
    rows = [row(0, 9), row(1, 9), row(2, 6, "resp_1"), row(3, 1, "resp_2"), row(4, 6), row(5, 4)]

    async def work() -> set[str]:
        store = ResponseStore(path, days=5)
        for stored in rows:
            await store.put(stored, "")
        assert await store.expire() == 2 and await store.expire() == 0
        left = {stored.response["id"] for stored in rows if await store.get(stored.response["id"], "")}
        assert [stored.response["id"] for stored in await store.chain("resp_3", "")] == ["resp_1", "resp_2", "resp_3"]
        store.close()
        return left

    assert asyncio.run(work()) == {"resp_1", "resp_2", "resp_3", "resp_5"}


def test_old_responses_go_when_a_server_starts(engine: Engine, path: Path) -> None:
    async def fill() -> None:
        store = ResponseStore(path)
        await store.put(row(1, 40), "")
        await store.put(row(2, 20), "")
        store.close()

    asyncio.run(fill())
    running = Running(create_app(again(engine), engine.renderer, NAME, store=ResponseStore(path)))
    assert httpx.get(f"{running.url}/v1/responses/resp_2").status_code == 200
    assert httpx.get(f"{running.url}/v1/responses/resp_1").status_code == 404
    running.close()


@pytest.mark.parametrize("kind", ["text", "database", "newer", "folder", "nowhere"])
def test_a_file_that_is_no_store_is_left_alone(path: Path, kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Somebody else's database that gets a table of ours; a traceback."""
    if kind == "text":
        path.write_text("these are my notes, " * 100)
    elif kind == "folder":
        path.mkdir()
    elif kind == "nowhere":
        path = tmp_path / "no" / "where.db"
    else:
        if kind == "newer":
            ResponseStore(path).close()
        with sqlite3.connect(path) as other:
            other.execute("PRAGMA user_version = 9" if kind == "newer" else "CREATE TABLE theirs (x)")
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StorageError, match="--store"):
        ResponseStore(path)
    assert (path.read_bytes() if path.is_file() else None) == before
    if kind == "text":
        folder = small.saved(tmp_path, "tiny", 64)
        done = tutelage(capsys, "serve", str(folder), "--port", "0", "--store", str(path))
        assert done.code == 2 and "--store" in done.err and "Traceback" not in done.err
