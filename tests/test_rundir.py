"""The run directory: held by one process, whole or resumable, and honest about what became of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import environment
from tutelage.errors import ArtifactError, DataError, StorageError
from tutelage.files import folder_digest, read_json, write_json
from tutelage.references import find, matching
from tutelage.rundir import Artifact, RunDir, all_runs, held

DIGEST = "0123456789ab"


def make(root: Path, name: str = "words", recipe: str = "r", **more: Any) -> RunDir:
    """A finished run that made a tokenizer."""
    run = RunDir(root / recipe / f"{name}-{DIGEST}", "tokenizer", DIGEST * 5, **more)
    with run.attempt({"seed": 0}) as facts:
        write_json(run.folder("tokenizer") / "tokenizer.json", {})
        facts["tokens"] = 7
    return run


def test_a_finished_run_says_everything(tmp_path: Path) -> None:
    """A run without its command, parents, versions, digest or log cannot be questioned later."""
    first = make(tmp_path, "words")
    inputs = {"data": find(str(first.path), "tokenizer", tmp_path), "raw": Artifact("records", tmp_path, "d" * 64)}
    run = make(tmp_path, "more", inputs=inputs, seed=5)
    row = read_json(run.path / "run.json")
    assert (row["status"], row["stage"], row["name"], row["digest"], row["seed"]) == ("done", "tokenizer", "more", run.digest, 5)
    assert row["parents"] == [
        {
            "name": "data",
            "kind": "tokenizer",
            "stage": "tokenizer",
            "path": f"../words-{DIGEST}",
            "digest": inputs["data"].digest,
        },
        {"name": "raw", "kind": "records", "stage": None, "path": "../..", "digest": "d" * 64},
    ]
    assert row["artifact"] == {"kind": "tokenizer", "path": "tokenizer", "digest": folder_digest(run.folder("tokenizer"))}
    assert {"started", "seconds", "command", "commit", "versions", "machine", "tokens"} <= row.keys()
    assert (run.path / "config.yaml").read_text() == "seed: 0\n" and (run.path / "DONE").read_text() == f"{run.digest}\n"
    assert (run.path / "logs" / "attempt_1.log").exists() and run.facts["tokens"] == 7 and run.done


def test_done_is_written_last(tmp_path: Path) -> None:
    """A parent that is read while it is being made."""
    run = RunDir(tmp_path / "r" / f"x-{DIGEST}", "tokenizer", DIGEST)
    with run.attempt({}):
        assert not run.done and read_json(run.path / "run.json")["status"] == "running" and held(run.path)
        with pytest.raises(ArtifactError, match=r"not finished \(status: running\)"):
            find(f"r/{run.path.name}", "tokenizer", tmp_path)
    assert run.done and not held(run.path)


@pytest.mark.parametrize(
    ("error", "status"),
    [(DataError("bad row"), "failed"), (ValueError("a bug"), "failed"), (KeyboardInterrupt(), "interrupted")],
)
def test_what_became_of_a_run(tmp_path: Path, error: BaseException, status: str) -> None:
    """A failed run that says `running` for ever, or that counts as finished; and a log that is overwritten."""
    run = RunDir(tmp_path / "r" / f"x-{DIGEST}", "tokenizer", DIGEST)
    for attempt in (1, 2):
        with pytest.raises(type(error)), run.attempt({}) as facts:
            facts["tokens"] = 3
            raise error
        row = read_json(run.path / "run.json")
        assert row["status"] == status and row.get("error") == (str(error) or None) and row["tokens"] == 3 and not run.done
        assert (run.path / "logs" / f"attempt_{attempt}.log").exists() and not held(run.path)
    with run.attempt({}):
        pass
    assert run.done and "error" not in read_json(run.path / "run.json")


def test_two_processes_on_one_run(tmp_path: Path) -> None:
    """Two processes that write over one another's files; and `--force`, which must not clear what another is writing."""
    run = RunDir(tmp_path / "r" / f"x-{DIGEST}", "tokenizer", DIGEST)
    code = (
        "import sys; from pathlib import Path; from tutelage.rundir import RunDir\n"
        f"run = RunDir(Path({str(run.path)!r}), 'tokenizer', {DIGEST!r})\n"
        "with run.attempt({}):\n"
        "    (run.path / 'mine').write_text('kept'); print('held', flush=True); sys.stdin.readline()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert other.stdin and other.stdout and other.stdout.readline() == "held\n"
    try:
        for fresh in (False, True):
            with pytest.raises(StorageError, match="another process") as caught, run.attempt({}, fresh=fresh):
                raise AssertionError("never entered")
            assert caught.value.file == run.path and caught.value.fix
        assert (run.path / "mine").exists() and held(run.path)
        assert [row["status"] for _, row in all_runs(tmp_path)] == ["running"]
    finally:
        other.communicate("\n", timeout=60)
    assert other.returncode == 0 and run.done and not held(run.path)


def test_a_killed_attempt_is_swept(tmp_path: Path) -> None:
    """Half-written files of a killed process that fill the disk, or that a glob takes for whole ones."""
    run = RunDir(tmp_path / "r" / f"x-{DIGEST}", "tokenizer", DIGEST)
    (run.path / "checkpoints" / ".step_000002.partial-99").mkdir(parents=True)
    (run.path / "checkpoints" / "step_000001").mkdir()
    (run.path / ".run.json.partial-99").write_text("{")
    (run.path / ".model.old-99").mkdir()
    with run.attempt({}):
        left = {p.relative_to(run.path).as_posix() for p in run.path.rglob("*")}
    assert {"checkpoints/step_000001"} == {p for p in left if "partial" in p or "old-" in p or "step" in p}


def test_fresh_keeps_the_logs_alone(tmp_path: Path) -> None:
    """`--force` that resumes from an old checkpoint; and one that loses the log of the attempt before."""
    run = make(tmp_path)
    (run.path / "checkpoints").mkdir()
    with run.attempt({}, fresh=True):
        assert not (run.path / "checkpoints").exists() and not run.done and not (run.path / "tokenizer").exists()
    assert len(list((run.path / "logs").iterdir())) == 2


def test_references(tmp_path: Path) -> None:
    """`recipe/stage` that finds another stage with a longer name, or an older run of its own."""
    old = make(tmp_path, "base")
    make(tmp_path, "base-long")
    new = RunDir(tmp_path / "r" / "base-ffffffffffff", "tokenizer", "f" * 64)
    with new.attempt({}):
        write_json(new.folder("tokenizer") / "tokenizer.json", {})
    for reference, path in (("r/base", new.path), (f"base-{DIGEST}", old.path), (str(old.path), old.path)):
        found = find(reference, "tokenizer", tmp_path)
        assert (found.run, found.path) == (path, path / "tokenizer"), reference
    inside = find(str(old.path / "tokenizer"), "tokenizer", tmp_path)
    assert inside.run is not None and inside.run.resolve() == old.path.resolve()
    assert inside.digest == find(str(old.path), "tokenizer", tmp_path).digest
    assert matching("r/*", tmp_path, "DONE") == [] == matching("../r/base", tmp_path, "DONE")


def test_references_to_nothing(tmp_path: Path) -> None:
    """Tracebacks for names that are wrong in every way that a name can be."""
    run = make(tmp_path)
    (tmp_path / "empty").mkdir()
    for reference, kind, message in (
        ("r/nothing", "model", "no model there"),
        ("/no/such/folder", "model", "no model there"),
        ("[x]/*", "model", "no model there"),
        (str(tmp_path / "empty"), "model", "not a model folder: it has no config.json"),
        (str(tmp_path / "empty"), "run", "not a run folder: it has no run.json"),
        ("r/words", "model", "this run made tokenizer, not model"),
    ):
        with pytest.raises(ArtifactError, match=message) as caught:
            find(reference, kind, tmp_path)
        assert caught.value.file is not None and caught.value.fix
    (run.folder("tokenizer") / "tokenizer.json").unlink()
    run.folder("tokenizer").rmdir()
    with pytest.raises(ArtifactError, match="lost its tokenizer"):
        find("r/words", "tokenizer", tmp_path)
