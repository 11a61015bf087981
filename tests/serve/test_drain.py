"""The end of a server, in a process of its own."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.engine import small
from tests.pipeline import environment, tutelage
from tutelage.errors import ConfigError
from tutelage.serve.listen import Options, serve


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.saved(tmp_path_factory.mktemp("drain"), "tiny", 8192)


class Process:
    """`tutelage serve` on a free port."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, "-m", "tutelage.cli", "serve", *words, "--port", "0"]
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
        self.said: list[str] = []
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.said.append(line)
            if found := re.search(r"at (http://\S+)/v1", line):
                self.url = found[1]
                break
        else:
            raise AssertionError("".join(self.said))
        threading.Thread(target=lambda: self.said.extend(self.popen.stderr), daemon=True).start()  # type: ignore[arg-type]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def start() -> Iterator[Any]:
    made: list[Process] = []

    def started(*words: str) -> Process:
        made.append(Process(*words))
        return made[-1]

    yield started
    for process in made:
        process.popen.kill()
        process.popen.wait()


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
