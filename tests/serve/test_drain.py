"""The end of a server, in a process of its own."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.engine import small
from tests.pipeline import tutelage
from tests.serve.running import Process
from tutelage.errors import ConfigError
from tutelage.serve.listen import Options, serve


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.saved(tmp_path_factory.mktemp("drain"), "tiny", 8192)


def long_answer(process: Process, tokens: int) -> Any:
    stream = process.client.completions.create(
        model="tiny", prompt="x", max_tokens=tokens, stream=True, stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(stream)
    return stream


def until_draining(process: Process) -> None:
    process.popen.send_signal(signal.SIGTERM)
    while httpx.get(f"{process.url}/ready").status_code == 200:
        pass


def test_sigterm_finishes_what_runs(start: Any, folder: Path) -> None:
    """A rolling update that cuts every answer on its way."""
    process = start(str(folder), str(folder), "--name", "tiny", "--name", "other", "--drain-seconds", "300")
    while httpx.get(f"{process.url}/ready").status_code != 200:
        pass
    assert sorted(m.id for m in process.client.models.list()) == ["other", "tiny"]
    stream = long_answer(process, 800)
    until_draining(process)
    assert httpx.get(f"{process.url}/health").status_code == 200
    with pytest.raises(openai.InternalServerError) as caught:
        process.client.completions.create(model="tiny", prompt="x", max_tokens=1)
    assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]
    assert list(stream)[-1].usage.completion_tokens == 800
    assert process.popen.wait(60) == 0, process.said


def test_draining_has_an_end(start: Any, folder: Path) -> None:
    """A server that one endless answer keeps alive; an answer that stops without a word."""
    process = start(str(folder), "--drain-seconds", "0.2")
    stream = long_answer(process, 8000)
    process.popen.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "shutting_down"
    assert process.popen.wait(60) == 0, process.said


def test_mistakes_end_with_a_sentence(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that listens for ever without a model, and two models of one name."""
    (tmp_path / "config.json").write_text("{}")
    tiny = str(folder)
    for words, text in (([str(tmp_path)], "error:"), ([tiny, tiny], "--name"), ([tiny, "--keys", "none"], "keys add")):
        done = tutelage(capsys, "serve", *words, "--port", "0")
        assert done.code == 2 and text in done.err and "Traceback" not in done.err, done.err


@pytest.mark.parametrize("port", [99999, "taken"])
def test_a_port_that_cannot_be_had_is_named_before_anything_is_loaded(port: int | str) -> None:
    """A traceback, or "serving at" on a port that belongs to somebody else."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wanted = taken.getsockname()[1] if port == "taken" else port
        with pytest.raises(ConfigError, match="cannot listen") as caught:
            serve({"m": Path("nowhere")}, Options(port=wanted))  # type: ignore[arg-type]
    assert "--port" in str(caught.value)
