"""What a run hands on is what it made: digests are compared where an input is opened, and a hit is whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipeline import environment, tutelage
from tests.test_rundir import DIGEST, make
from tutelage import aside, digests
from tutelage.errors import ArtifactError
from tutelage.files import folder_digest, read_json, read_object, whole_folder, write_json
from tutelage.references import find
from tutelage.rundir import RunDir, all_runs, lineage

Capture = pytest.CaptureFixture[str]


def zeros(file: Path) -> None:
    """The same size, other content."""
    file.write_bytes(bytes(file.stat().st_size))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "zeros": zeros,
    "shorter": lambda file: os.truncate(file, 1),
    "lost": lambda file: file.unlink(),
    "more": lambda file: write_json(file.with_name("more.json"), {}),
    "the folder is lost": lambda file: (file.unlink(), file.parent.rmdir())[0],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_artifact_is_neither_an_input_nor_a_hit(tmp_path: Path, damage: str) -> None:
    """A model trained on zeros, and a run without its result that is a hit for ever."""
    run = make(tmp_path)
    file = run.folder("tokenizer") / "tokenizer.json"
    assert find(str(run.path), "tokenizer", tmp_path).digest == folder_digest(file.parent) and run.done
    DAMAGE[damage](file)
    for reference in (str(run.path), "r/words", *([str(file.parent)] if file.parent.exists() else [])):
        if reference == str(file.parent) and not file.exists():
            continue  # no folder of this kind any more
        with pytest.raises(ArtifactError, match=r"changed after the run|lost its tokenizer") as caught:
            find(reference, "tokenizer", tmp_path)
        assert str(file.parent) in str(caught.value.file) and "run its command again" in str(caught.value.fix)
    assert not run.done and run.finished
    with run.attempt({}):
        assert not run.finished  # from the first moment on
        write_json(file, {})
        file.with_name("more.json").unlink(missing_ok=True)
    assert run.done and find(str(run.path), "tokenizer", tmp_path).run == run.path


def test_the_damaged_file_is_named_after_a_copy_too(tmp_path: Path) -> None:
    """An error about gigabytes that does not say which file; times and inodes that differ where nothing else does."""
    run = make(tmp_path)
    for name in ("a", "b"):
        (run.folder("tokenizer") / name).write_text(name)
    with run.attempt({}):
        pass
    os.utime(run.folder("tokenizer") / "b", (1, 1))
    assert run.done
    (run.folder("tokenizer") / "b").write_text("c")
    with pytest.raises(ArtifactError, match="changed: b"):
        find(str(run.path), "tokenizer", tmp_path)
    (run.folder("tokenizer") / "b").write_text("b")
    assert run.done


def test_content_is_read_once_for_each_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gigabytes that are read for each plan; and a memory that is believed when a file has changed since."""
    run, read, real = make(tmp_path), [], digests.readable_digest
    monkeypatch.setattr(digests, "readable_digest", lambda file: (read.append(file.name), real(file))[1])
    for _ in range(3):
        assert run.done and find("r/words", "tokenizer", tmp_path)
    assert read == []
    (run.folder("tokenizer") / "tokenizer.json").write_text("[]")
    assert not run.done and not run.done and read == ["tokenizer.json"]
    (run.path / ".digests.json").write_text("not JSON")
    assert not run.done and len(read) == 2


def test_what_nobody_can_remember_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of another user, in a folder that one may not write: a traceback instead of a second look."""
    run = make(tmp_path)
    (run.path / ".digests.json").unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(digests, "write_json", full)
    assert run.done and run.done and not (run.path / ".digests.json").exists()


@pytest.mark.parametrize("status", ["running", "failed", "interrupted", None])
def test_done_alone_is_no_finished_run(tmp_path: Path, status: str | None) -> None:
    """`DONE` in an unfinished run, which made it a hit and an input."""
    run = make(tmp_path)
    write_json(run.path / "run.json", {**read_json(run.path / "run.json"), "status": status})
    assert not run.done
    with pytest.raises(ArtifactError, match=r"not finished|run.json is damaged"):
        find("r/words", "tokenizer", tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from tutelage.rundir import RunDir
seen, last, real = 0, int(sys.argv[2]), Path.replace

def replace(self, target):
    global seen
    seen += 1
    if seen == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target)

Path.replace = replace
run = RunDir(Path(sys.argv[1]), "tokenizer", "0123456789ab" * 5)
with run.attempt({}, fresh=True):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("place", [1, 2, 4, 6, 8, 99])
def test_a_killed_force_is_no_hit_and_loses_nothing(tmp_path: Path, place: int) -> None:
    """`--force` that deletes `model/` before `DONE`: killed in between, the same command is a hit without a model; and one that
    destroys the finished result before there is a new one."""
    run = make(tmp_path)
    code = subprocess.run([sys.executable, "-c", KILLED, str(run.path), str(place)], env=environment())
    assert code.returncode == -signal.SIGKILL
    there = [p for p in run.path.rglob("tokenizer.json")]
    assert len(there) == 1 and read_json(there[0]) == {}
    assert not run.done or there[0].parent == run.folder("tokenizer")
    with run.attempt({}):
        write_json(run.folder("tokenizer") / "tokenizer.json", {"new": 1})
    assert run.done and len(list(run.path.rglob("tokenizer.json"))) == 1
    assert {p.name for p in run.path.iterdir()} == {
        "DONE", "run.json", "config.yaml", "logs", "tokenizer", ".lock", ".digests.json",
    }  # fmt: skip


def test_a_failed_force_gives_the_old_result_back(tmp_path: Path) -> None:
    """A finished run that is gone because its replacement met a full disk."""
    run = make(tmp_path)
    with pytest.raises(ValueError), run.attempt({}, fresh=True):
        assert not run.done and (run.path / aside.OLD / "DONE").exists()
        write_json(run.folder("tokenizer") / "tokenizer.json", {"new": 1})
        raise ValueError
    assert run.done and read_json(run.folder("tokenizer") / "tokenizer.json") == {}
    assert not (run.path / aside.OLD).exists() and len(list((run.path / "logs").iterdir())) == 2


BROKEN = {
    "cut": '{"stage": "tok', "a list": "[]", "empty": "", "no stage": "{}", "deep": "[" * 100_000, "bytes": b"\xff\xfe",
    "parents": '{"stage": "a", "status": "done", "digest": "b", "parents": [1]}',
    "outside": '{"stage": "a", "status": "done", "digest": "b", "parents": [], "artifact": {"path": "../..", "digest": "c"}}',
}  # fmt: skip


@pytest.mark.parametrize("content", BROKEN)
def test_a_damaged_run_json_is_named_and_mended(tmp_path: Path, capsys: Capture, content: str) -> None:
    """A traceback in `runs`, `show`, every stage and the run's own next attempt, for one file of one run."""
    data = BROKEN[content]
    parent = make(tmp_path, "words")
    child = make(tmp_path, "more", inputs={"data": find(str(parent.path), "tokenizer", tmp_path)})
    (parent.path / "run.json").write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ArtifactError) as caught:
        find("r/words", "tokenizer", tmp_path)
    assert caught.value.file == parent.path / "run.json" and "run its command again" in str(caught.value.fix)
    assert sorted(row["status"] for _, row in all_runs(tmp_path)) == ["damaged", "done"]
    assert [row["status"] for *_, row in lineage(child.path)] == ["done", "damaged"]
    said = tutelage(capsys, "runs", "--runs", tmp_path)
    assert said.code == 0 and "damaged" in said.out and "more-" in said.out
    said = tutelage(capsys, "show", child.path, "--runs", tmp_path)
    assert said.code == 0 and "damaged" in said.out
    said = tutelage(capsys, "show", parent.path, "--runs", tmp_path)
    assert said.code == 2 and "run.json" in said.err and "fix:" in said.err
    with parent.attempt({}):
        pass
    assert parent.done


def test_json_that_cannot_be_read_is_an_error_of_ours(tmp_path: Path) -> None:
    """`JSONDecodeError` without the file's name."""
    for content in (b"{", b"\xff", b"[" * 100_000):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ArtifactError) as caught:
            read_json(tmp_path / "a.json")
        assert caught.value.file == tmp_path / "a.json" and caught.value.fix
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ArtifactError, match="not a JSON object"):
        read_object(tmp_path / "a.json")


def test_files_of_a_folder_have_the_users_mode(tmp_path: Path) -> None:
    """Weights of mode 0600 beside a config.json of 0644: another user is told that there are none."""
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            with whole_folder(tmp_path / "model") as out:
                os.close(os.open(out / "model.safetensors", os.O_CREAT | os.O_WRONLY, 0o600))
                (out / "config.json").write_text("{}")
        finally:
            os.umask(before)
        assert {p.stat().st_mode & 0o777 for p in (tmp_path / "model").iterdir()} == {mode}


def test_a_file_without_rights_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`No such file` for weights that are there and that one may not read."""
    from tutelage.models import folder as load

    def refused(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(Path, "open", refused)
    for act in (lambda: load.stored_shapes(tmp_path, []), lambda: read_json(tmp_path / "config.json")):
        with pytest.raises(ArtifactError, match="permission denied") as caught:
            act()
        assert "chmod +r" in str(caught.value.fix) and tmp_path in Path(str(caught.value.file)).parents


# `tutelage runs`


def ran(capsys: Capture, root: Path, *words: object) -> tuple[int, str]:
    said = tutelage(capsys, "runs", "--runs", root, *words)
    return said.code, said.out + said.err


def test_runs_are_filtered_and_removed(tmp_path: Path, capsys: Capture) -> None:
    """Failed runs that stay for ever; and a removal that takes what a finished run was made from."""
    parent = make(tmp_path, "words")
    child = make(tmp_path, "more", inputs={"data": find(str(parent.path), "tokenizer", tmp_path)})
    failed = RunDir(tmp_path / "other" / f"x-{DIGEST}", "data", DIGEST)
    with pytest.raises(ValueError), failed.attempt({}):
        raise ValueError("no")
    for words, names in (
        (["--status", "failed"], {"x-"}),
        (["--stage", "tokenizer"], {"words-", "more-"}),
        (["r/w*"], {"words-"}),
    ):
        found = ran(capsys, tmp_path, *words)[1]
        assert all((f"{name}{DIGEST}" in found) == (name in names) for name in ("words-", "more-", "x-"))
    assert "did you mean `failed`?" in ran(capsys, tmp_path, "--status", "faild")[1]
    assert ran(capsys, tmp_path, "--remove")[0] == 2 and ran(capsys, tmp_path, "--yes")[0] == 2
    assert "nobody is here" in ran(capsys, tmp_path, "--remove", "--status", "failed")[1] and failed.path.exists()
    assert ran(capsys, tmp_path, "--remove", "--status", "failed", "--yes")[0] == 0 and not failed.path.parent.exists()
    code, said = ran(capsys, tmp_path, "--remove", "words", "--yes")
    assert code == 2 and "was made from this run" in said and "--force" in said and parent.done
    with parent.attempt({}):
        assert "is being made" in ran(capsys, tmp_path, "--remove", "words", "--yes", "--force")[1]
    assert ran(capsys, tmp_path, "--remove", "words", "--yes", "--force")[0] == 0 and not parent.path.exists() and child.done


def test_a_question_comes_before_a_removal(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are gone for a slip of the finger."""
    run = make(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, left in ((False, True), (True, False)):
        monkeypatch.setattr("typer.confirm", lambda *_, answer=answer, **__: answer)
        assert ran(capsys, tmp_path, "--remove", "words")[0] == 0
        assert run.path.exists() == left


def test_show_draws_a_shared_parent_once_and_figures_for_people(tmp_path: Path, capsys: Capture) -> None:
    """Whole subtrees that are drawn again for each way to them, and `loss 8.847564458847046e-09`."""
    corpus = make(tmp_path, "corpus")
    inputs = {"data": find(str(corpus.path), "tokenizer", tmp_path)}
    sides = [find(str(make(tmp_path, name, inputs=inputs).path), "tokenizer", tmp_path) for name in ("one", "two")]
    both = make(tmp_path, "both", inputs={"a": sides[0], "b": sides[1]})
    top = make(tmp_path, "top", inputs={"x": find(str(both.path), "tokenizer", tmp_path), "a": sides[0]})
    facts = {"loss": 8.847564458847046e-09, "stopped_early": None, "tokens": 1234567, "train_seconds": 754.2}
    write_json(top.path / "run.json", {**read_json(top.path / "run.json"), **facts})
    said = tutelage(capsys, "show", top.path, "--runs", tmp_path).out
    assert said.count("its chain is above") == 1 and said.count(f"one-{DIGEST}") == 2
    assert "8.848e-09" in said and "1,234,567" in said and "13 min" in said and "stopped" not in said


@pytest.mark.parametrize("words", [["runs", "--runs", ""], ["show", "x", "--runs", " "], ["serve", "x", "--name", ""]])
def test_empty_names_are_refused(words: list[str], capsys: Capture, tmp_path: Path) -> None:
    """`--runs "$UNSET"`, which writes into the working folder."""
    if words[0] == "serve":
        words = ["serve", str(make(tmp_path).path), "--name", ""]
    said = tutelage(capsys, *words)
    assert said.code == 2 and "Traceback" not in said.err


def test_torchrun_prints_one_path(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """`$(torchrun … tutelage pretrain …)` that is two words."""
    (tmp_path / "a.txt").write_text("some text of some length, which is kept")
    line = ["data", "--sources", tmp_path / "a.txt", "--validation-share", "0", "--min-chars", "1", "--runs", tmp_path / "runs"]
    assert tutelage(capsys, *line).out.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    assert tutelage(capsys, *line).out == ""


def test_results_of_every_stage_have_a_headline() -> None:
    """`report`, `tokens` and `merge`, whose column was empty."""
    from tutelage.cli.show import headline

    assert headline({"stage": "tokens", "splits": {"train": {"tokens": 1000}, "validation": {"tokens": 24}}}) == "1,024 tokens"
    assert headline({"stage": "report", "bytes": 20480}) == "a page of 20 kB"
    assert "a whole model" in headline({"stage": "merge", "logit_difference": 1e-6})


def test_a_part_file_with_strange_lines_goes_on(tmp_path: Path, capsys: Capture) -> None:
    """`KeyError: 'tokens'` for a line of `generate`'s part file; and a row number that asks for all the memory there is."""
    from tutelage.errors import ConfigError
    from tutelage.inference.output_file import ResumableOutput, check_output

    for strange in (
        '{"row": 0}',
        "[]",
        '{"row": 900000, "tokens": [1, 2], "result": {}}',
        '{"row": 1, "tokens": 3, "result": {}}',
    ):
        out = tmp_path / "out.jsonl"
        with ResumableOutput(out, {"seed": 0}, force=True, rows=3) as part:
            part.append(0, {"text": "a"}, [1, 2])
        with part.path.open("a") as f:
            f.write(strange + "\n" + json.dumps({"row": 2, "tokens": [1, 1], "result": {}}) + "\n")
        with ResumableOutput(out, {"seed": 0}, rows=3) as part:
            assert part.rows == 1 and part.holds(0) and not part.holds(2)
        assert "out.jsonl.part:2: a damaged line; from here on 2 rows" in capsys.readouterr().err
    part.state.write_text("{")
    with pytest.raises(ArtifactError) as caught:
        ResumableOutput(out, {"seed": 0})
    assert caught.value.file == part.state and "--force" in str(caught.value.fix)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="a device or a pipe"):
        check_output(tmp_path / "pipe", replace=True)
    with pytest.raises(ConfigError, match="a device or a pipe"):
        check_output(Path("/dev/null"), replace=True)
