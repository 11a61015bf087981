"""Stages as a user meets them: killed ones resume, failed ones say why, and checkpoints hold no surprises."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.pipeline import SHAPE, TRAIN, World, spawn, tutelage, world  # noqa: F401 (a fixture)
from tutelage.files import read_json
from tutelage.rundir import all_runs


def training(world: World, runs: Path, **more: object) -> list[object]:  # noqa: F811
    settings = {
        **TRAIN,
        "size": "20k",
        "architecture": str(SHAPE),
        "steps": 40,
        "evaluate_every": 1,
        "checkpoint_every": 1,
        **more,
    }
    options = [x for key, value in settings.items() for x in (f"--{key}", value)]
    return ["pretrain", "--data", world.made["corpus"], "--tokenizer", world.made["words"], "--runs", runs, *options]


def test_a_killed_stage_resumes(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """A killed run that counts as done, that locks its successor out, or that starts over; and a log that is lost."""
    line = training(world, tmp_path, steps=12)
    process = spawn(*line)
    assert process.stderr
    for said in process.stderr:
        if said.startswith("step 3 "):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (path,) = (p for p, row in all_runs(tmp_path) if row["stage"] == "pretrain")
    assert not (path / "DONE").exists() and read_json(path / "run.json")["status"] == "running"
    assert "killed (resumes)" in tutelage(capsys, "runs", "--runs", tmp_path).out
    again = tutelage(capsys, *line)
    assert again.code == 0 and "pretrain: resuming" in again.err and "resuming after step" in again.err, again.err
    assert again.out == f"{path}\n" and (path / "DONE").exists() and read_json(path / "run.json")["steps"] == 12
    assert (path / "logs" / "attempt_1.log").exists() and "resuming after step" in (path / "logs" / "attempt_2.log").read_text()
    steps = [x for x in (path / "metrics.jsonl").read_text().splitlines() if '"loss"' in x]
    assert len(steps) == 12


def test_ctrl_c_leaves_a_resumable_run(world: World, tmp_path: Path) -> None:  # noqa: F811
    """A traceback for Ctrl-C, and a day of training lost."""
    process = spawn(*training(world, tmp_path, steps=4000, checkpoint_every=0, evaluate_every=2))
    assert process.stderr
    for said in process.stderr:
        if said.startswith("step 2 "):
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command again resumes" in rest and "Traceback" not in rest
    (path,) = (p for p, row in all_runs(tmp_path) if row["stage"] == "pretrain")
    assert read_json(path / "run.json")["status"] == "interrupted" and list((path / "checkpoints").glob("step_*"))


def test_folders_hold_safetensors_and_json_only(world: World) -> None:  # noqa: F811
    """A checkpoint whose optimizer state is a pickle."""
    suffixes = {p.suffix for name in ("base", "chat") for p in (world.made[name] / "checkpoints").rglob("*") if p.is_file()}
    assert suffixes == {".safetensors", ".json"}
    models = {p.suffix for name in ("base", "chat") for p in (world.made[name] / "model").rglob("*") if p.is_file()}
    assert models == {".safetensors", ".json", ".jinja"}


def test_evaluation_refuses_what_it_cannot_ask(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Questions that are left out without a word, since the model has no chat template."""
    import json
    import shutil

    folder = tmp_path / "plain"
    shutil.copytree(world.made["base"] / "model", folder)
    (folder / "chat_template.jinja").unlink()
    settings = read_json(folder / "tokenizer_config.json")
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tutelage.json").unlink(missing_ok=True)
    said = tutelage(capsys, "evaluate", "--model", folder, "--questions", world.made["chats"], "--runs", tmp_path / "runs")
    assert said.code == 2 and "no chat template" in said.err and "--template" in said.err
