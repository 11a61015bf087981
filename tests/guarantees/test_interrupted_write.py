"""A write that is cut short leaves what was there before, and nothing that could be taken for whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline import environment
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
