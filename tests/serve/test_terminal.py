"""The chat in the terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engine import small
from tests.pipeline import environment
from tutelage import api
from tutelage.cli import chat, chat_session
from tutelage.engine import Engine, Sampling
from tutelage.errors import ArtifactError, ConfigError, DataError
from tutelage.models.export import save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("chat")
    renderer = small.renderer(base / "tokenizer")
    model = small.model(renderer.tokenizer.vocab_size, 4096)
    save(model, base / "model", base / "tokenizer", stop_ids=renderer.stop_ids)
    return base / "model"


GREEDY = Sampling(12, temperature=0)


def test_once_prints_the_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts read stdout: the answer and nothing else."""
    chat.chat(folder, once="the cat", sampling=GREEDY, system="one")
    engine = chat.open_engine(folder, None, "cpu", "float32")
    turns = [{"role": "system", "content": "one"}, {"role": "user", "content": "the cat"}]
    assert capsys.readouterr().out == engine.generate([turns], GREEDY)[0].text + "\n"


def test_commands(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A /reset that forgets nothing: the second answer must be the first one's."""
    asked: list[Any] = []
    stream = Engine.stream

    def seen(self: Engine, prompt: Any, sampling: Sampling) -> Any:
        asked.append([m["role"] for m in prompt])
        return stream(self, prompt, sampling)

    monkeypatch.setattr(Engine, "stream", seen)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nmore\n/reset\nhi\n/system be\nhi\n/what\n/exit\nnever\n"))
    chat.chat(folder, sampling=GREEDY)
    assert asked == [["user"], ["user", "assistant", "user"], ["user"], ["system", "user"]]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[2] or len(lines) > 4


def typed(text: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `ask` makes of an input, message by message."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return list(iter(chat.ask, None))


def test_messages_of_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pasted function that is asked line by line."""
    assert typed("one\\\n two\\\nthree\nfour\n", monkeypatch) == ["one\n two\nthree", "four"]
    assert typed('"""def f():\n    pass\n\n/exit\n"""\nx\n', monkeypatch) == ["def f():\n    pass\n\n/exit", "x"]
    assert typed('"""one line"""\n/help\n /help\n"""not closed\n', monkeypatch) == ["one line", "/help", "/help", "not closed"]


def open_chat(folder: Path, max_length: int | None = None, **how: Any) -> chat_session.Chat:
    return chat_session.Chat(chat.open_engine(folder, max_length, "cpu", "float32"), None, Sampling(**{"seed": 1, **how}))


def test_params(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt parameter that is taken in silence; half of a wrong line that is done."""
    talk = open_chat(folder, max_tokens=5, ignore_eos=True)
    assert chat_session.command(talk, "/params temperature=0.2  top_p=0.9 max_tokens=7")
    assert (talk.sampling.temperature, talk.sampling.top_p, talk.sampling.max_tokens) == (0.2, 0.9, 7)
    assert "temperature=0.2  top_p=0.9  top_k=0" in capsys.readouterr().err
    assert talk.answer("hi", str).tokens == 7
    for line, says in (
        ("/params temprature=1", "did you mean `temperature`?"),
        ("/params top_p=0.5 temperature=-1", "field:    temperature"),
        ("/params seed=x", "not a seed"),
        ("/params hot", "key=value"),
        ("/rest", "did you mean /reset?"),
        ("/etc/passwd is what?", "a space before it"),
        ("/save", "needs a file"),
    ):
        with pytest.raises(ConfigError) as caught:
            chat_session.command(talk, line)
        assert says in str(caught.value) and talk.sampling.top_p == 0.9
    chat_session.command(talk, "/help")
    said = capsys.readouterr().err
    assert all(name in said for name in chat_session.COMMANDS)


def test_saved_conversations_are_training_data(folder: Path, tmp_path: Path) -> None:
    """A file that `tutelage data` refuses, that has a conversation twice, or that loses the one before."""
    talk, path = open_chat(folder, max_tokens=5, ignore_eos=True), tmp_path / "talks.jsonl"
    talk.system = "be a cat"
    talk.reset()
    with pytest.raises(DataError, match="no assistant turn"):
        talk.save(path)
    talk.answer("one", str)
    assert talk.save(path) == 1
    talk.answer("two", str)
    assert talk.save(path) == 1
    first = list(talk.messages)
    talk.reset()
    talk.answer("three", str)
    assert talk.save(path) == 2
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"messages": first}, {"messages": talk.messages}] and len(first) == 5
    made = api.data(kind="conversations", sources=[path], validation_share=0.0, runs=tmp_path / "runs")
    assert made.facts["records"] == 2
    other = open_chat(folder, max_tokens=5)
    assert other.load(path) == 2 and other.messages == talk.messages and other.system == "be a cat"
    path.write_text('{"text": "mine"}\n')
    with pytest.raises(DataError, match=r"talks.jsonl:1: unknown conversation format"):
        talk.save(path)
    with pytest.raises(DataError, match="no such file"):
        talk.load(tmp_path / "none")
    assert path.read_text() == '{"text": "mine"}\n' and len(other.messages) == 3


def test_what_others_wrote_into_the_file_stays(folder: Path, tmp_path: Path) -> None:
    """Tools and notes of earlier rows that a save takes away, and tools that a chat goes on without."""
    talk, path = open_chat(folder, max_tokens=5, ignore_eos=True), tmp_path / "talks.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}]
    row = {"messages": turns, "tools": [{"type": "function", "function": {"name": "f"}}], "note": "mine"}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="tools, which a chat cannot offer"):
        talk.load(path)
    talk.answer("one", str)
    assert talk.save(path) == 2
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0]) == row
    path.write_text(json.dumps({"messages": turns}) + "\n")
    assert talk.load(path) == 1 and talk.messages == turns


def test_undo_takes_back_one_exchange(folder: Path) -> None:
    """A question that stays without its answer, or a system prompt that goes with it."""
    talk = open_chat(folder, max_tokens=5, ignore_eos=True)
    talk.system = "be"
    talk.reset()
    talk.answer("one", str)
    before = list(talk.messages)
    talk.answer("two", str)
    assert talk.undo() == "two" and talk.messages == before
    assert talk.undo() == "one" and talk.messages == [{"role": "system", "content": "be"}] and talk.undo() is None


def test_a_conversation_that_outgrows_the_context(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An earlier turn that is dropped in silence; an answer that ends in the middle without a word; a dead end without advice."""
    talk = open_chat(folder, max_tokens=20, ignore_eos=True)
    talk.answer("the cat", str)
    assert "cut at max_tokens=20; /params max_tokens=N" in capsys.readouterr().err
    context = len(talk.engine.encode([*talk.messages, {"role": "user", "content": "sat"}])) + 10
    tight = open_chat(folder, max_length=context, max_tokens=20, ignore_eos=True)
    tight.messages = talk.messages
    given = tight.answer("sat", str)
    said = capsys.readouterr().err
    assert (
        (given.tokens, given.context) == (10, context) and f"the context of {context} tokens is full" in said and "/reset" in said
    )
    kept = list(tight.messages)
    with pytest.raises(DataError, match="longer than the context") as caught:
        tight.answer("more", str)
    assert f"fewer than {context}" in str(caught.value) and "/undo" in str(caught.value) and "/save" in str(caught.value)
    assert tight.messages == kept
    tight.undo()
    assert tight.answer("sat", str).text == given.text


class Typist:
    """The chat in a process of its own, on a terminal of its own."""

    def __init__(self, folder: Path, state: Path, **how: Any) -> None:
        code = (
            "from pathlib import Path; from tutelage.engine import Sampling; from tutelage.cli.chat import chat; "
            f"chat(Path({str(folder)!r}), sampling=Sampling(3000, seed=1, ignore_eos=True), **{how!r}); print('left')"
        )
        ours, theirs = pty.openpty()
        environ = {**environment(), "XDG_STATE_HOME": str(state), "TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environ, start_new_session=True,
            preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(theirs)
        self.terminal = ours
        self.seen = ""

    def interrupt(self) -> None:
        """Ctrl-C at the prompt. One that comes just before Python's `input` waits for a key is seen at the next key only."""
        ready: list[int] = []
        while not ready:
            self.type("\x03")
            ready, _, _ = select.select([self.terminal], [], [], 3.0)

    def expect(self, text: str, seconds: float = 120.0) -> str:
        """Reads until `text` comes; what came up to there."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            self.read(max(0.0, end - time.monotonic()))
        before, _, self.seen = self.seen.partition(text)
        return before

    def read(self, seconds: float = 120.0) -> None:
        """Waits for something to read."""
        ready, _, _ = select.select([self.terminal], [], [], seconds)
        assert ready, f"nothing after {self.seen[-2000:]!r}"
        self.seen += os.read(self.terminal, 65536).decode("utf-8", "replace")

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def leave(self) -> None:
        self.type("\x04")
        self.expect("left")
        assert self.process.wait(60) == 0
        os.close(self.terminal)


def _own_terminal() -> None:
    """Ctrl-C typed at the terminal reaches the process that has it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_keys_of_a_terminal(folder: Path, tmp_path: Path) -> None:
    """Ctrl-C that leaves the chat or hangs it; arrow keys that print ^[[A; a history that others can read, or that is kept
    against the user's will."""
    history = tmp_path / "tutelage" / "chat_history"
    chat = Typist(folder, tmp_path)
    chat.expect("> ")
    chat.type("tell me a story\n")
    chat.expect("story\r\n")
    while len(re.sub(r"\x1b\[[?\d]*[a-z]|\s", "", chat.seen)) < 3:  # of the answer, not of the terminal
        chat.read()
    chat.type("\x03")
    chat.expect("(stopped)")
    made = re.search(r"(\d+) tokens, [\d,]+ tokens/s; ", chat.expect("4,096 tokens of context used"))
    assert made and int(made[1]) < 3000
    chat.expect("> ")
    chat.type("half a li")
    chat.expect("half a li")
    chat.interrupt()
    chat.expect("Ctrl-D or /exit leaves")
    chat.expect("> ")
    chat.leave()
    assert history.read_text() == "tell me a story\n" and stat.S_IMODE(history.stat().st_mode) == 0o600
    again = Typist(folder, tmp_path)
    again.expect("> ")
    again.type("\x1b[A")
    again.expect("tell me a story")
    again.type("\x15/params\n")
    again.expect("temperature=1.0")
    again.expect("> ")
    again.leave()
    assert history.read_text() == "tell me a story\n/params\n"
    private = Typist(folder, tmp_path / "other", history=False)
    private.expect("> ")
    private.type("/params\n")
    private.expect("temperature=1.0")
    private.expect("> ")
    private.leave()
    assert not (tmp_path / "other").exists()


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(folder: Path) -> None:
    """A stopped answer must free the engine, or the next one waits for it."""
    talk = chat.Chat(chat.open_engine(folder, None, "cpu", "float32"), None, Sampling(50, seed=1, ignore_eos=True))

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    talk.answer("hi", interrupt)
    assert talk.engine.idle
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]


def test_missing_model_is_an_error(tmp_path: Path) -> None:
    """A traceback where a sentence would do."""
    with pytest.raises(ArtifactError):
        chat.chat(tmp_path / "none", once="x")


def test_no_slow_imports(folder: Path) -> None:
    """transformers takes longer to import than a small model takes to answer."""
    code = (
        "import sys\nimport tutelage.cli.chat\nassert 'torch' not in sys.modules\n"
        f"tutelage.cli.chat.chat({str(folder)!r}, once='hi')\n"
        "assert not {'transformers', 'fastapi', 'pydantic_settings'} & set(sys.modules), 'slow import'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
