"""OpenAI batch files through `tutelage generate`: read and answered as the server would, in OpenAI's shape."""

from __future__ import annotations

import base64
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from tests.pipeline import tutelage
from tests.serve.test_generate import USER, Capture, die, read, write
from tutelage import api
from tutelage.engine import Engine, Sampling
from tutelage.errors import ConfigError, DataError
from tutelage.inference.batch import row_seed


def request(custom_id: str, body: object, url: str = "/v1/chat/completions") -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def test_an_openai_batch_file_and_back(model: Path, engine: Engine, tmp_path: Path, capsys: Capture) -> None:
    """A batch written for another endpoint that needs to be rewritten; a parameter of a body that is not honoured."""
    turns = [{"role": "developer", "content": "one"}, {"role": "user", "content": [{"type": "text", "text": "the cat"}]}]
    plain = [{"role": "system", "content": "one"}, {"role": "user", "content": "the cat"}]
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": turns, "max_completion_tokens": 9, "temperature": 0.9, "seed": 3, "n": 2}),
        ("/v1/chat/completions", {"messages": turns, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", {"prompt": ["the cat", "one two"], "max_tokens": 5, "temperature": 0}),
        ("/v1/completions", {"prompt": "the cat", "max_tokens": 3, "echo": True}),
    ]
    source = write(tmp_path / "in.jsonl", [request(f"r{i}", {"model": "gpt", **b}, url) for i, (url, b) in enumerate(bodies)])
    said = tutelage(capsys, "generate", model, source, "-o", tmp_path / "out.jsonl", "--seed", 5, "--slots", 2)
    assert said.code == 0 and "asked for gpt were answered by model" in said.err, said.err
    got = read(tmp_path / "out.jsonl")
    assert [row["custom_id"] for row in got] == ["r0", "r1", "r2", "r3"] and len({row["id"] for row in got}) == 4
    for row, (url, _) in zip(got, bodies, strict=True):
        assert row.keys() == {"id", "custom_id", "response", "error"} and row["error"] is None
        assert row["response"]["status_code"] == 200 and row["response"]["request_id"]
        kind: Any = ChatCompletion if "chat" in url else Completion
        kind.model_validate(row["response"]["body"], strict=True)
    chat, scored, two, echoed = (row["response"]["body"]["choices"] for row in got)
    want = engine.generate([plain], Sampling(9, temperature=0.9, seed=3, n=2))
    assert [c["message"]["content"] for c in chat] == [c.text for c in want]
    assert scored[0]["message"]["content"] == engine.generate([plain], Sampling(4, seed=row_seed(5, 1)))[0].text
    assert len(scored[0]["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert [c["text"] for c in two] == [c.text for c in engine.generate(["the cat", "one two"], Sampling(5, temperature=0))]
    assert echoed[0]["text"].startswith("the cat")


def test_embeddings_and_responses_of_a_batch_file(model: Path, engine: Engine, tmp_path: Path, capsys: Capture) -> None:
    """An archive to be embedded that is refused for its URL; tokens that are not counted under these endpoints' names."""
    turns = [{"role": "system", "content": "one two"}, USER]
    asked = {"model": "m", "input": USER["content"], "instructions": "one two", "max_output_tokens": 7, "temperature": 1.3}
    rows = [
        request("one", {"model": "m", "input": "the cat"}, "/v1/embeddings"),
        request("many", {"model": "m", "input": ["one two", "the cat"], "encoding_format": "base64"}, "/v1/embeddings"),
        request("free", asked, "/v1/responses"),
        request("seeded", {**asked, "seed": 3}, "/v1/responses"),
    ]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    facts = api.generate(model=model, input=source, output=output, seed=5)
    got = read(output)
    assert [row["custom_id"] for row in got] == ["one", "many", "free", "seeded"] and facts["errors"] == 0
    bodies = [row["response"]["body"] for row in got]
    cat, one = engine.embed([engine.encode("the cat"), engine.encode("one two")])
    for data in bodies[1]["data"]:
        data["embedding"] = np.frombuffer(base64.b64decode(data["embedding"]), "<f4").tolist()
    for body, vectors in zip(bodies, ([cat], [one, cat]), strict=False):
        found = CreateEmbeddingResponse.model_validate(body, strict=True).data
        assert [d.embedding for d in found] == [pytest.approx(v.tolist(), abs=1e-6) for v in vectors]
    for body, seed in zip(bodies[2:], (row_seed(5, 2), 3), strict=True):
        (want,) = engine.generate([turns], Sampling(7, temperature=1.3, seed=seed))
        assert Response.model_validate(body, strict=True).output_text == want.text and body["store"] is False
        assert (body["usage"]["input_tokens"], body["usage"]["output_tokens"]) == (len(want.prompt), len(want.ids))
    read_of = [body["usage"].get("prompt_tokens", body["usage"].get("input_tokens")) for body in bodies]
    assert facts["prompt_tokens"] == sum(read_of) and facts["prompt_tokens"] > 0
    assert facts["completion_tokens"] == sum(body["usage"].get("output_tokens", 0) for body in bodies)


def test_a_killed_batch_file_goes_on(model: Path, tmp_path: Path, capsys: Capture) -> None:
    """Requests without a seed that are answered otherwise after a kill; Ctrl-C that hangs in the server's thread."""
    body = {"model": "m", "prompt": "the cat", "max_tokens": 9}
    source = write(tmp_path / "in.jsonl", [request(str(i), body, "/v1/completions") for i in range(12)])
    outputs = tmp_path / "straight.jsonl", tmp_path / "out.jsonl"
    words = ["generate", model, source, "--seed", 5, "--slots", 2, "-o"]
    assert tutelage(capsys, *words, outputs[0]).code == 0
    assert die([*words, outputs[1]], 4, signal.SIGKILL, torn=True).returncode == -signal.SIGKILL
    stopped = die([*words, outputs[1]], 3, signal.SIGINT, torn=False)
    assert stopped.returncode == 130 and "the same command goes on" in stopped.stderr, stopped.stderr
    said = tutelage(capsys, *words, outputs[1])
    assert said.code == 0 and "of them there already" in said.err
    one, two = ([(r["custom_id"], r["response"]["body"]["choices"]) for r in read(path)] for path in outputs)
    assert one == two and len({str(choices) for _, choices in one}) > 6


HELLO = {"model": "m", "messages": [USER]}
BAD_REQUESTS: list[tuple[dict[str, Any], str, int | None]] = [
    (request("1", {**HELLO, "temperature": 9}), "body.temperature", 400),
    (request("1", {**HELLO, "web_search": 1}), "body.web_search", 400),
    (request("1", {**HELLO, "max_tokens": 5000}), "body.messages", 400),
    (request("1", {**HELLO, "stream": True}), "body.stream", None),
    (request("1", HELLO, "/v1/moderations"), "url", None),
    (request("1", {**HELLO, "input": "x"}, "/v1/embeddings"), "body.messages", 400),
    (request("1", {"model": "m", "input": "x", "dimensions": 8}, "/v1/embeddings"), "body.dimensions", 400),
    (request("1", {"model": "m", "input": "x", "seed": 1}, "/v1/embeddings"), "body.seed", 400),
    (request("1", {"model": "m", "input": "x", "store": True}, "/v1/responses"), "body.store", 400),
    (request("1", {"model": "m", "input": "x", "stream": True}, "/v1/responses"), "body.stream", None),
    ({**request("1", HELLO), "method": "GET"}, "method", None),
    (request("1", "x"), "body", None),
    ({**request("1", HELLO), "custom_id": 1}, "custom_id", None),
]


@pytest.mark.parametrize(("bad", "field", "status"), BAD_REQUESTS, ids=lambda x: x if isinstance(x, str) else None)
def test_bad_requests_of_a_batch_file(model: Path, tmp_path: Path, bad: dict[str, Any], field: str, status: int | None) -> None:
    """One refused request that ends the whole batch without a name, or that is left out."""
    good = request("0", {**HELLO, "max_tokens": 2})
    source, output = write(tmp_path / "in.jsonl", [good, bad, {**good, "custom_id": "2"}]), tmp_path / "out.jsonl"
    with pytest.raises(DataError) as caught:
        api.generate(model=model, input=source, output=output)
    assert (caught.value.file, caught.value.line, caught.value.field) == (source, 2, field)
    facts = api.generate(model=model, input=source, output=output, on_error="skip")
    row = read(output)[1]
    assert facts["errors"] == 1 and row["custom_id"] == bad["custom_id"]
    if status is None:
        assert row["response"] is None and row["error"]["code"] == "invalid_row" and field in row["error"]["message"]
    else:
        assert row["response"]["status_code"] == status and row["response"]["body"]["error"]["param"] == field[5:]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_custom_id_that_comes_twice(model: Path, tmp_path: Path, on_error: Any) -> None:
    """Two answers under one name, of which whoever reads them by name loses one."""
    rows = [request(name, {**HELLO, "max_tokens": 2}) for name in ("a", "b", "a")]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    if on_error == "stop":
        with pytest.raises(DataError, match="custom_id comes twice") as caught:
            api.generate(model=model, input=source, output=output)
        assert (caught.value.line, caught.value.field) == (3, "custom_id") and not output.exists()
        return
    assert api.generate(model=model, input=source, output=output, on_error="skip")["errors"] == 1
    assert [row["error"] is None for row in read(output)] == [True, True, False]


def test_settings_of_the_command_do_not_change_a_batch_file(model: Path, tmp_path: Path) -> None:
    """`--temperature 0.5` that is taken and has no effect."""
    source = write(tmp_path / "in.jsonl", [request("0", HELLO)])
    with pytest.raises(ConfigError, match="`temperature` would have no effect"):
        api.generate(model=model, input=source, output=tmp_path / "out.jsonl", temperature=0.5)
