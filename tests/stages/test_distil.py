"""Stage `distil`: with the teacher beside the student, and with its words kept in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.pipeline import SHAPE, TRAIN, World, tutelage, world  # noqa: F401 (a fixture)
from tutelage import api
from tutelage.data.tokens.loader import GlobalBatch
from tutelage.errors import ConfigError
from tutelage.files import read_json
from tutelage.models.open import load
from tutelage.rollout.source import RolloutSource
from tutelage.rundir import RunDir
from tutelage.train.checkpoint import latest

SETTINGS = {**TRAIN, "steps": 4, "evaluate_every": 2, "optimizer": {"lr": 0.01, "matrix_lr": 0.01, "embedding_lr": 0.01}}


def distil(world: World, runs: Path, **settings: object) -> RunDir:  # noqa: F811
    inputs = {"model": world.made["base"], "teacher": world.made["chat"], "data": world.made["corpus"]}
    return api.distil(runs=runs, **{**inputs, **SETTINGS, **settings})


@pytest.mark.parametrize("settings", [{}, {"top_k": 8, "loss": "jsd", "beta": 0.2}], ids=["beside", "kept"])
def test_a_student_comes_closer(world: World, tmp_path: Path, settings: dict[str, object]) -> None:  # noqa: F811
    """A student that does not learn, a teacher that does, or one that is written into every checkpoint."""
    run = distil(world, tmp_path, **settings)
    rows = [r for r in map(dict, _lines(run.path / "metrics.jsonl")) if "validation/divergence" in r]
    assert rows[-1]["validation/divergence"] < rows[0]["validation/divergence"]
    assert run.facts["validation_divergence"] == pytest.approx(rows[-1]["validation/divergence"])
    assert not list((run.path / "checkpoints").rglob("teacher*"))
    saved = latest(run.path / "checkpoints")
    assert saved is not None and (saved / "policy.safetensors").exists()
    assert (run.path / "teacher" / "plan.json").exists() == ("top_k" in settings)
    student, before = (dict(load(p / "model").named_parameters()) for p in (run.path, world.made["base"]))  # type: ignore[attr-defined]
    assert student.keys() == before.keys()
    assert any(not torch.equal(p, before[n]) for n, p in student.items())


def test_conversations_teach_the_answers_only(world: World, tmp_path: Path) -> None:  # noqa: F811
    """The teacher's opinion of the user's words is not what an assistant learns."""
    run = distil(world, tmp_path, data=world.made["chats"], steps=1, epochs=None, top_k=4)
    totals = read_json(next(tmp_path.glob("cli/tokens-*/tokens/tokens.json")))["splits"]["train"]
    kept = sum(p.stat().st_size - 128 for p in (run.path / "teacher").glob("*.logprobs.npy")) // 16
    assert kept == totals["supervised"] < totals["tokens"]


ON = {"policy": "on", "steps": 4, "rollouts": {"prompts": 4, "samples": 2, "max_tokens": 12}, "threads": 1, "seed": 3,
      "optimizer": {"lr": 0.003, "matrix_lr": 0.003, "embedding_lr": 0.003}, "checkpoint_every": 1}  # fmt: skip


def on_policy(world: World, runs: Path) -> RunDir:  # noqa: F811
    """The student asks what the teacher makes of its own answers."""
    return api.distil(runs=runs, model=world.made["base"], teacher=world.made["chat"], data=world.made["chats"], **ON)


def test_on_its_own_answers(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Answers that are made by old weights, or by other noise after an interruption: a resumed run is the unbroken one."""
    straight = on_policy(world, tmp_path / "straight")
    rows = [r for r in _lines(straight.path / "metrics.jsonl") if "term/divergence" in r]
    assert len(rows) == 4 and all(r["term/divergence"] > 0 for r in rows)
    written = sorted((straight.path / "rollouts").glob("step_*.jsonl"))
    first = list(_lines(written[0]))
    assert len(written) == 4 and len(first) == 8 and len({r["prompt"] for r in first}) == 4
    assert all("reward" not in r and r["version"] == 0 for r in first)
    whole = RolloutSource.next

    def broken(source: RolloutSource, step: int) -> GlobalBatch:
        if step == 2:
            raise KeyboardInterrupt
        return whole(source, step)

    monkeypatch.setattr(RolloutSource, "next", broken)
    with pytest.raises(KeyboardInterrupt):
        on_policy(world, tmp_path / "broken")
    monkeypatch.setattr(RolloutSource, "next", whole)
    resumed = on_policy(world, tmp_path / "broken")
    for name, p in load(straight.path / "model").named_parameters():  # type: ignore[attr-defined]
        assert torch.equal(p, dict(load(resumed.path / "model").named_parameters())[name])  # type: ignore[attr-defined]
    for file in written:
        assert file.read_text() == (resumed.path / "rollouts" / file.name).read_text()


def test_what_cannot_be_is_refused(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Distributions over other tokens, and settings that would be taken and do nothing."""
    wrong = (
        ({"beta": 0.5}, "beta"), ({"rest": "bucket"}, "rest"), ({"top_k": 300}, "top_k"), ({"rollouts": {"prompts": 2}}, "off"),
        ({"policy": "on", "top_k": 4}, "policy=on"),
    )  # fmt: skip
    for settings, says in wrong:
        with pytest.raises(ConfigError, match=says):
            distil(world, tmp_path, **settings)
    words = api.tokenizer(runs=tmp_path, data=world.made["corpus"], vocab_size=280)
    other = api.pretrain(runs=tmp_path, data=world.made["corpus"], tokenizer=words, size="20k", architecture=SHAPE, **TRAIN)
    with pytest.raises(ConfigError, match="different vocabularies"):
        distil(world, tmp_path, teacher=other)


def test_the_plan_counts_the_teacher(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """A plan that leaves out half of the work."""
    made = world.made
    line = [
        "distil",
        "--runs",
        tmp_path,
        "--model",
        made["base"],
        "--teacher",
        made["chat"],
        "--data",
        made["corpus"],
        "--dry-run",
    ]
    said = tutelage(capsys, *line)
    assert said.code == 0 and said.err.count("MFLOP") >= 2, said.out + said.err


def _lines(path: Path):
    import json

    return (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
