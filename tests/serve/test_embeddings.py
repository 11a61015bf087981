"""Embeddings, and the way between text and tokens."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from openai.types import CreateEmbeddingResponse

from tests.engine import small
from tests.serve.running import Running
from tutelage.engine import Engine, Sampling
from tutelage.errors import ConfigError
from tutelage.models.interface import Batch
from tutelage.serve.app import create_app
from tutelage.serve.engine_thread import EngineThread

NAME, TEXTS = "tiny", ["the cat sat on the mat", "one", "naïve 🙂 café", "the dog sat by the door, and one two three"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return small.engine(tmp_path_factory.mktemp("tokenizer") / "t", context=128, slots=4)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    running = Running(create_app(engine, engine.renderer, NAME))
    yield running
    running.close()


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


def by_hand(engine: Engine, text: str) -> np.ndarray:
    with torch.inference_mode():
        hidden = engine.model(Batch.of([engine.encode(text)])).hidden[0]
    mean = hidden.mean(0)
    return np.asarray(mean / mean.norm())


def test_embeddings_are_the_mean_of_the_last_states(client: openai.OpenAI, engine: Engine) -> None:
    """Padding in the mean, results in the order of their lengths, vectors that are not of length 1."""
    got = client.embeddings.create(model=NAME, input=TEXTS)  # the client asks for base64
    for i, (row, text) in enumerate(zip(got.data, TEXTS, strict=True)):
        assert row.index == i and np.linalg.norm(row.embedding) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(row.embedding, by_hand(engine, text), atol=1e-5)
    assert got.usage.prompt_tokens == got.usage.total_tokens == sum(len(engine.encode(t)) for t in TEXTS)
    CreateEmbeddingResponse.model_validate(got.model_dump(), strict=True)


def test_both_encodings_say_the_same(client: openai.OpenAI, server: Running) -> None:
    """Bytes in the machine's own order, or of another type."""
    url = f"{server.url}/v1/embeddings"
    plain = httpx.post(url, json={"model": NAME, "input": "one", "dimensions": 32}).json()["data"][0]["embedding"]
    packed = httpx.post(url, json={"model": NAME, "input": "one", "encoding_format": "base64"}).json()["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), np.asarray(plain, np.float32))
    assert client.embeddings.create(model=NAME, input="one", encoding_format="float").data[0].embedding == plain


def test_every_shape_of_input(client: openai.OpenAI, engine: Engine) -> None:
    """Token ids that are taken for texts, or a list of ids for a list of inputs."""
    ids = engine.encode("the cat")
    want = client.embeddings.create(model=NAME, input="the cat").data[0].embedding
    for given, count in ((["the cat"], 1), (ids, 1), ([ids, ids], 2), (["the cat"] * 3, 3)):
        got = client.embeddings.create(model=NAME, input=given).data
        assert len(got) == count
        for row in got:
            np.testing.assert_allclose(row.embedding, want, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [({"dimensions": 16}, "dimensions", None), ({"input": []}, "input", None), ({"input": ["a", ""]}, "input", None),
     ({"input": [10**6]}, "input", None), ({"input": [1] * 129}, "input", "context_length_exceeded"),
     ({"encoding_format": "int8"}, "encoding_format", None), ({"input": ["x"] * 2049}, "input", None),
     ({"extra_body": {"task": "query"}}, "task", "unsupported_parameter")],
)  # fmt: skip
def test_bad_embeddings(client: openai.OpenAI, change: dict[str, Any], param: str, code: str | None) -> None:
    """A vector cut to fit, a text cut to fit: both look right and are not."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(**{"model": NAME, "input": "x", **change})
    assert (caught.value.param, caught.value.code) == (param, code)


class Generating(Engine):
    """An engine that gives no embeddings, as vLLM's."""

    def embed(self, prompts: Any, lora: Any = None) -> Any:
        raise ConfigError("no embeddings here", field="model")


def test_an_engine_without_embeddings_says_so(engine: Engine) -> None:
    """A 500, as if the server had failed."""
    running = Running(create_app(Generating(engine.model, engine.renderer), engine.renderer, NAME))
    with pytest.raises(openai.BadRequestError, match="no embeddings here") as caught:
        running.client().embeddings.create(model=NAME, input="x")
    running.close()
    assert caught.value.param == "model"


def test_groups_take_turns_with_answers(tmp_path: Path) -> None:
    """A thousand texts in one forward pass, while every running answer stands still."""
    thread = EngineThread(small.engine(tmp_path / "t", context=1024, slots=1))
    groups: list[tuple[int, int]] = []  # texts, tokens that the answer had by then

    async def ask() -> list[int]:
        response = await thread.submit([([1, 2], Sampling(900, ignore_eos=True), 0)])

        def read(_: Any, prompts: list[list[int]], lora: Any) -> list[int]:
            groups.append((len(prompts), response.sequences[0].made))
            return [len(p) for p in prompts]

        lengths = await thread.grouped([[1] * n for n in (3, 1, 8, 2, 7)], read, tokens=8)
        assert sum([len(event.ids) async for _, event in response.events()]) == 900
        return lengths

    thread.start()
    assert asyncio.run(ask()) == [3, 1, 8, 2, 7]
    thread.stop()
    thread.join()
    assert [count for count, _ in groups] == [1, 1, 2, 1]
    made = [tokens for _, tokens in groups]
    assert len(set(made)) == 4 and made == sorted(made)


def test_tokenize_gives_the_served_ids(server: Running, engine: Engine) -> None:
    """Clients that count tokens before they ask, and count others than the engine gets."""

    def tokenize(**body: Any) -> Any:
        reply = httpx.post(f"{server.url}/tokenize", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "naïve 🙂"}]
    whole = tokenize(prompt="the cat", model=NAME)
    assert whole == {"count": len(whole["tokens"]), "max_model_len": 128, "tokens": engine.encode("the cat")}
    chat = tokenize(messages=messages)["tokens"]
    assert chat == engine.renderer.prompt([{**messages[0], "role": "system"}, messages[1]])
    bare = tokenize(prompt="naïve 🙂 <|end|>", add_special_tokens=False)["tokens"]
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": bare}).json()
    assert back == {"prompt": "naïve 🙂 <|end|>"}
    assert "naïve 🙂" in httpx.post(f"{server.url}/detokenize", json={"tokens": chat}).json()["prompt"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [("tokenize", {}, "prompt"), ("tokenize", {"prompt": "x", "messages": []}, "prompt"),
     ("tokenize", {"messages": []}, "messages"),
     ("tokenize", {"messages": [{"role": "user", "content": "x"}], "add_special_tokens": True}, "add_special_tokens"),
     ("tokenize", {"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role"),
     ("detokenize", {"tokens": [-1]}, "tokens"), ("detokenize", {"tokens": [10**30]}, "tokens"),
     ("detokenize", {"tokens": ["1"]}, "tokens"), ("detokenize", {"tokens": [1], "model": "other"}, "model")],
)  # fmt: skip
def test_bad_tokens(server: Running, path: str, body: dict[str, Any], param: str) -> None:
    """Mistakes that become a traceback."""
    reply = httpx.post(f"{server.url}/{path}", json=body)
    assert reply.status_code in (400, 404) and reply.json()["error"]["param"] == param
