"""The chat in the terminal."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine import small
from tutelage.engine import Engine, Sampling
from tutelage.errors import ArtifactError
from tutelage.models.export import save
from tutelage.serve import terminal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("chat")
    renderer = small.renderer(base / "tokenizer")
    model = small.model(renderer.tokenizer.vocab_size, 512)
    save(model, base / "model", base / "tokenizer", stop_ids=renderer.stop_ids)
    return base / "model"


GREEDY = Sampling(12, temperature=0)


def test_once_prints_the_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts read stdout: the answer and nothing else."""
    terminal.chat(folder, once="the cat", sampling=GREEDY, system="one")
    engine = terminal.open_engine(folder, None, "cpu", "float32")
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
    terminal.chat(folder, sampling=GREEDY)
    assert asked == [["user"], ["user", "assistant", "user"], ["user"], ["system", "user"]]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[2] or len(lines) > 4


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(folder: Path) -> None:
    """A stopped answer must free the engine, or the next one waits for it."""
    talk = terminal.Chat(terminal.open_engine(folder, None, "cpu", "float32"), None, Sampling(50, seed=1, ignore_eos=True))

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    talk.answer("hi", interrupt)
    assert talk.engine.idle
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]


def test_missing_model_is_an_error(tmp_path: Path) -> None:
    """A traceback where a sentence would do."""
    with pytest.raises(ArtifactError):
        terminal.chat(tmp_path / "none", once="x")


def test_no_slow_imports(folder: Path) -> None:
    """transformers takes longer to import than a small model takes to answer."""
    code = (
        "import sys\nfrom tutelage.serve import terminal\nassert 'torch' not in sys.modules\n"
        f"terminal.chat({str(folder)!r}, once='hi')\n"
        "assert not {'transformers', 'fastapi', 'pydantic_settings'} & set(sys.modules), 'slow import'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
