"""Log-probabilities over HTTP where a model ends its answer: an entry for every token that `usage` counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.serve.running import Running
from tutelage.engine import Engine
from tutelage.serve.app import create_app


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    running = Running(create_app(engine, engine.renderer, "tiny"))
    yield running
    running.close()


def ending(engine: Engine) -> dict[str, float]:
    """A bias that makes the model end at once."""
    return {str(engine.renderer.tokenizer.eos_id): 100.0}


def parse_logprobs(choice: dict[str, Any], prompt_length: int) -> tuple[float, bool]:
    """lm-eval's `LocalCompletionsAPI.parse_logprobs`: the last entry is taken for the one new token, and dropped."""
    logprobs = choice["logprobs"]
    own = logprobs["token_logprobs"][prompt_length:-1]
    top = logprobs["top_logprobs"][prompt_length:-1]
    return sum(own), all(value == max(best.values()) for value, best in zip(own, top, strict=True))


def test_lm_eval_reads_the_whole_continuation(server: Running, engine: Engine) -> None:
    """Wherever the model would end next, the continuation lost its last token: 71 of 80 scores of one model were wrong."""
    begin, answer = engine.encode("the cat sat on"), engine.renderer.tokenizer.encode_text(" the mat")
    body = {
        "model": "tiny", "prompt": [[*begin, *answer]], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True,
        "logit_bias": ending(engine),
    }  # fmt: skip
    choice = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    want = Engine(engine.model).score([([*begin, *answer], len(begin))])[0]
    assert parse_logprobs(choice, len(begin))[0] == pytest.approx(want.sum(), abs=1e-4)
    assert len(choice["logprobs"]["tokens"]) == len(begin) + len(answer) + 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_token_has_an_entry(server: Running, engine: Engine, stream: bool) -> None:
    """In text and in chat, whole and streamed; its text is no part of the answer's."""
    client = server.client()
    how: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "temperature": 0, "logit_bias": ending(engine), "stream": stream}

    def choices(made: Any) -> list[Any]:
        return [c.choices[0] for c in made] if stream else [made.choices[0]]

    text = choices(client.completions.create(prompt="the cat", logprobs=1, **how))
    assert sum(len(c.logprobs.tokens) for c in text if c.logprobs) == 1 and "".join(c.text for c in text) == ""
    assert text[-1].finish_reason == "stop"
    talk = choices(
        client.chat.completions.create(messages=[{"role": "user", "content": "the cat"}], logprobs=True, top_logprobs=2, **how)
    )
    assert sum(len(c.logprobs.content) for c in talk if c.logprobs) == 1 and talk[-1].finish_reason == "stop"


def test_more_stop_texts_than_openai_takes(server: Running) -> None:
    """lm-eval sends all of a task's stop texts and the end token: humaneval and gsm8k-cot-llama got 400."""
    client: openai.OpenAI = server.client()
    stops: Any = [f"stop{i}" for i in range(64)]
    assert client.completions.create(model="tiny", prompt="the cat", max_tokens=2, stop=stops).usage
    with pytest.raises(openai.BadRequestError, match="at most 64 stop texts"):
        client.completions.create(model="tiny", prompt="the cat", max_tokens=2, stop=[*stops, "one more"])
