"""How far it is from the command line to the optimizer's step."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.pipeline import TRAIN, World, tutelage, world  # noqa: F401 (a fixture)
from tutelage.objectives import next_token
from tutelage.train.optim import Optimizers

PACKAGE = Path(__file__).parent.parent / "tutelage"
ON_THE_WAY = ["cli/main.py", "stages/sft.py", "setup/trainer.py", "train/loop.py", "train/step.py"]
LOSS = "objectives/next_token.py"
CALLS = {"objectives/__init__.py"}  # `Objective.__call__`: one line that passes the settings on


def files_on_the_stack() -> list[str]:
    """The package's files whose functions are being called, from the outermost, each once."""
    found: list[str] = []
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            found.append(path.relative_to(PACKAGE).as_posix())
        frame = frame.f_back  # type: ignore[assignment]
    return list(dict.fromkeys(reversed(found)))


def test_six_files_from_the_command_line_to_the_step(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """Guards the reading: each further file between `tutelage sft` and `optimizer.step()` is one that everybody has to open."""
    seen: dict[str, list[str]] = {}
    step, loss = Optimizers.step, next_token.next_token

    def watched_step(self: Optimizers) -> None:
        seen.setdefault("step", files_on_the_stack())
        step(self)

    def watched_loss(*args: object) -> object:
        seen.setdefault("loss", files_on_the_stack())
        return loss(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Optimizers, "step", watched_step)
    monkeypatch.setattr(next_token, "next_token", watched_loss)
    options = [x for key, value in {**TRAIN, "steps": 1}.items() for x in (f"--{key}", value)]
    line = ["sft", "--model", world.made["base"], "--data", world.made["chats"], *options, "--runs", tmp_path]
    said = tutelage(capsys, *line)
    assert said.code == 0, said.err
    options_file = "cli/options.py"  # its command class sets how settings are spelled; typer calls it
    assert [f for f in seen["step"] if f != options_file] == ON_THE_WAY
    assert [f for f in seen["loss"] if f not in (options_file, *CALLS)] == ON_THE_WAY
    lines = {file: len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in (*ON_THE_WAY, LOSS)}
    assert sum(lines.values()) < 900, lines
    assert lines["cli/main.py"] <= 150, lines
