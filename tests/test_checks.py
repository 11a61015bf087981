"""What the settings alone are wrong in is said before the first stage of a recipe runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pipeline import tutelage
from tutelage.errors import ConfigError, MissingExtra, UserError
from tutelage.recipe import Runner, load_recipe, plan_recipe, run_recipe
from tutelage.stages import STAGES

LAST: list[tuple[dict[str, Any], str, str]] = [
    ({"stage": "rl", "rewards": {"exact": 1}, "gamma": 0.9}, "changes nothing here, with method=grpo", "gamma"),
    ({"stage": "rl", "rewards": {"exact": 1}, "samples": 1}, "nothing to be compared with", "samples"),
    ({"stage": "rl", "rewards": {"exact": 1}, "method": "dpo"}, "no method of this name", "method"),
    ({"stage": "rl", "rewards": {"model": 1}}, "a reward of the kind `model` needs one", "reward_model"),
    ({"stage": "rl", "rewards": {"mine": {"kind": "function", "path": "no:f"}}}, "cannot be imported", "rewards.mine.path"),
    ({"stage": "reward", "method": "reward", "loss": "huber"}, "reward has no setting `loss`", "loss"),
    ({"stage": "preference", "method": "grpo"}, "a method of another stage", "method"),
    ({"stage": "preference", "method": "simpo", "reference": "$chat"}, "keeps no reference", "reference"),
    ({"stage": "distil", "teacher": "$chat", "policy": "on", "top_k": 4}, "changes nothing here, with policy=on", "top_k"),
    ({"stage": "rl", "rewards": {"exact": 1}, "tools": ["calculater"]}, "no such tool", "tools"),
    ({"stage": "rl", "rewards": {"exact": 1}, "environment": "no:Game"}, "cannot load the environment", "environment"),
    ({"stage": "rl", "rewards": {"environment": 1}}, "`environment` needs one", "environment"),
    ({"stage": "rl", "rewards": {"exact": 0}}, "all weights are 0", "rewards"),
    ({"stage": "preference"}, "other records than this stage reads(.|\n)*Conversation, which asked makes", "data"),
    ({"stage": "reward"}, "other records than this stage reads", "data"),
    ({"stage": "classify", "model": "$chat", "folds": 1}, "not a number of folds", "folds"),
    ({"stage": "classify", "model": "$chat"}, "other records than this stage reads(.|\n)*--kind examples", "data"),
    ({"stage": "sft", "template": "chatmll"}, "did you mean chatml", "template"),
    ({"stage": "evaluate", "data": None}, "nothing to measure", "documents"),
    ({"stage": "merge", "model": None, "data": None, "adapter": "$chat"}, "trains a whole model", "adapter"),
    ({"stage": "adapt", "replay_share": 0.5}, "changes nothing here, with no general text", "replay_share"),
    ({"stage": "extend_vocab", "train": False, "epochs": 2}, "changes nothing here, with train=false", "epochs"),
]  # fmt: skip


def recipe(folder: Path, last: dict[str, Any]) -> Path:
    stages = {
        "asked": {"stage": "data", "kind": "conversations", "sources": ["skill:reverse?count=20&held_out=4"], "dedup": "exact"},
        "words": {"stage": "tokenizer", "data": "$asked", "vocab_size": 300},
        "chat": {"stage": "pretrain", "data": "$asked", "tokenizer": "$words", "size": "1m"},
        "last": {k: v for k, v in {"model": "$chat", "data": "$asked", **last}.items() if v is not None},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"name": "late", "stages": stages}, sort_keys=False), encoding="utf-8")
    return file


@pytest.mark.parametrize(("last", "message", "field"), LAST, ids=[f"{x['stage']}-{f}" for x, _, f in LAST])
def test_the_last_stage_is_asked_first(last: dict[str, Any], message: str, field: str, tmp_path: Path) -> None:
    """Hours of training, and then a setting of the last stage that could have been refused at once."""
    file = recipe(tmp_path, last)
    loaded = load_recipe(file, STAGES, [], [])
    for act in (plan_recipe, run_recipe):
        with pytest.raises(UserError, match=message) as caught:
            act(loaded, Runner(STAGES, tmp_path / "runs", loaded.name))
        assert (caught.value.field, caught.value.file) == (f"stages.last.{field}", file)
        key = field.rpartition(".")[2]
        lines = file.read_text(encoding="utf-8").splitlines()
        assert caught.value.line is not None and lines[caught.value.line - 1].strip().startswith((f"{key}:", "last:"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("last", "field"),
    [
        ({"stage": "sft", "adapter": {"rank": 8}}, "adapter.rank"),
        ({"stage": "sft", "device": "gpuu"}, "device"),
        ({"stage": "rl", "rewards": {"length": 1}}, "rewards.length"),
    ],
)  # fmt: skip
def test_fields_that_do_not_go_together_have_a_place(last: dict[str, Any], field: str, tmp_path: Path) -> None:
    """`field: adapter.rank`, and nobody knows of which of sixteen stages."""
    file = recipe(tmp_path, last)
    with pytest.raises(ConfigError) as caught:
        plan_recipe(load_recipe(file, STAGES, [], []), Runner(STAGES, tmp_path / "runs", "late"))
    assert (caught.value.field, caught.value.file) == (f"stages.last.{field}", file)
    key = field.rpartition(".")[2]
    assert file.read_text(encoding="utf-8").splitlines()[(caught.value.line or 0) - 1].strip().startswith(f"{key}:")


def test_a_missing_library_is_told_by_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--dry-run` of maths problems said nothing of math-verify, which the run then lacked."""
    file = recipe(tmp_path, {"stage": "rl", "rewards": {"maths": 1}})
    monkeypatch.setitem(sys.modules, "math_verify", None)
    found = tutelage(capsys, "run", file, "--dry-run", "--runs", tmp_path / "runs")
    assert found.code == 2 and "math-verify" in found.err and "tutelage[rl]" in found.err
    loaded = load_recipe(file, STAGES, [], [])
    with pytest.raises(MissingExtra):
        plan_recipe(loaded, Runner(STAGES, tmp_path / "runs", loaded.name))


def test_what_is_there_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished recipe that can no longer be looked at, since a library has gone."""
    stages = {"asked": {"stage": "data", "kind": "conversations", "sources": ["skill:reverse?count=20&held_out=4"]}}
    file = tmp_path / "one.yaml"
    file.write_text(yaml.safe_dump({"name": "one", "stages": stages}), encoding="utf-8")
    loaded = load_recipe(file, STAGES, [], [])
    run_recipe(loaded, Runner(STAGES, tmp_path / "runs", loaded.name))

    def refuse(config: Any) -> None:
        raise ConfigError("not today", field="kind")

    monkeypatch.setattr("tutelage.preflight.checks.data", refuse)
    run_recipe(loaded, Runner(STAGES, tmp_path / "runs", loaded.name))
    with pytest.raises(ConfigError, match="not today"):
        run_recipe(loaded, Runner(STAGES, tmp_path / "runs", loaded.name, force=True))
