"""A write that is cut short leaves what was there before, and nothing that could be taken for whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline import environment
from tutelage import files
from tutelage.files import read_json, whole_file, whole_folder, write_json
from tutelage.rundir import RunDir


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    """run.json cut in the middle: a run that can be neither resumed nor listed."""
    write_json(tmp_path / "a.json", {"old": 1})
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), whole_file(tmp_path / "a.json") as f:
            f.write('{"new": ')
            f.flush()
            assert read_json(tmp_path / "a.json") == {"old": 1}
            raise error
    assert read_json(tmp_path / "a.json") == {"old": 1} and os.listdir(tmp_path) == ["a.json"]


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    """A model folder of new weights and an old configuration."""
    with whole_folder(tmp_path / "model") as out:
        (out / "config.json").write_text("old")
    with pytest.raises(ValueError), whole_folder(tmp_path / "model") as out:
        (out / "config.json").write_text("new")
        raise ValueError
    assert (tmp_path / "model" / "config.json").read_text() == "old" and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_leaves_the_old(tmp_path: Path, kind: str) -> None:
    """SIGKILL runs no `finally`: the half-written copy must not bear the name, and the next attempt must clear it away."""
    run = RunDir(tmp_path / "r" / "x-0123456789ab", "data", "0" * 64)
    run.path.mkdir(parents=True)
    target = run.path / "model"
    if kind == "file":
        target.write_text("old")
        body = "with whole_file(p) as f: f.write('new'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    else:
        target.mkdir()
        (target / "a").write_text("old")
        body = "with whole_folder(p) as out: (out / 'a').write_text('new'); os.kill(os.getpid(), signal.SIGKILL)"
    code = f"import os, signal, pathlib; from tutelage.files import *\np = pathlib.Path({str(target)!r})\n{body}"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == -signal.SIGKILL
    assert (target if kind == "file" else target / "a").read_text() == "old" and len(os.listdir(run.path)) == 2
    with run.attempt({}):
        assert not [n for n in os.listdir(run.path) if "partial" in n]
    assert (target if kind == "file" else target / "a").read_text() == "old"


DIES_BETWEEN_RENAMES = """
import os, signal, pathlib
from tutelage import files

def rename(self, target):
    if ".partial-" in self.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target)

real, pathlib.Path.replace = pathlib.Path.replace, rename
files._exchange = lambda *names: False
with files.whole_folder(pathlib.Path({path!r})) as out:
    (out / "a").write_text("new")
"""


def old_model(folder: Path) -> None:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "a").write_text("old")


def test_a_folder_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment in which the old folder is gone and the new one not there: the two change places in one step."""
    old_model(tmp_path)
    (tmp_path / "other").mkdir()
    if not files._exchange(tmp_path / "model", tmp_path / "other"):
        pytest.skip("this system or file system cannot swap two names")
    assert os.listdir(tmp_path / "other") == ["a"] and os.listdir(tmp_path / "model") == []
    monkeypatch.setattr(Path, "replace", None)
    with whole_folder(tmp_path / "other") as out:
        (out / "a").write_text("new")
    assert (tmp_path / "other" / "a").read_text() == "new" and sorted(os.listdir(tmp_path)) == ["model", "other"]


@pytest.mark.parametrize("mend", ["write", "attempt"])
def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path, mend: str) -> None:
    """Where names cannot be swapped, a kill leaves the old folder under a temporary name: the sweep took it for rubbish."""
    run = RunDir(tmp_path / "x-0123456789ab", "data", "0" * 64)
    old_model(run.path)
    code = DIES_BETWEEN_RENAMES.format(path=str(run.path / "model"))
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == -signal.SIGKILL
    assert not (run.path / "model").exists()
    if mend == "attempt":
        with run.attempt({}):
            assert (run.path / "model" / "a").read_text() == "old"
    else:
        with pytest.raises(ValueError), whole_folder(run.path / "model"):
            assert (run.path / "model" / "a").read_text() == "old"
            raise ValueError
    assert (run.path / "model" / "a").read_text() == "old" and not list(run.path.glob(".*.old-*"))


def test_an_error_between_two_renames_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk at the second rename, after which the model is nowhere."""
    old_model(tmp_path)
    real = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise ValueError
        return real(self, target)

    monkeypatch.setattr(files, "_exchange", lambda *names: False)
    with monkeypatch.context() as patch, pytest.raises(ValueError), whole_folder(tmp_path / "model") as out:
        patch.setattr(Path, "replace", failing)
        (out / "a").write_text("new")
    assert (tmp_path / "model" / "a").read_text() == "old" and os.listdir(tmp_path) == ["model"]
    with whole_folder(tmp_path / "model") as out:
        (out / "a").write_text("new")
    assert (tmp_path / "model" / "a").read_text() == "new" and os.listdir(tmp_path) == ["model"]
