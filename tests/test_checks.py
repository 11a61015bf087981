"""What the settings alone are wrong in is said before the first stage of a recipe runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pipeline import tutelage
from tutelage.errors import ConfigError, MissingExtra
from tutelage.recipe import Runner, load_recipe, plan_recipe, run_recipe
from tutelage.stages import STAGES

LAST: list[tuple[dict[str, Any], str, str]] = [
    ({"stage": "rl", "rewards": {"exact": 1}, "gamma": 0.9}, "changes nothing here, with method=grpo", "last.gamma"),
    ({"stage": "rl", "rewards": {"exact": 1}, "samples": 1}, "nothing to be compared with", "last.samples"),
    ({"stage": "rl", "rewards": {"exact": 1}, "method": "dpo"}, "no such method", "last.method"),
    ({"stage": "rl", "rewards": {"model": 1}}, "a reward of the kind `model` needs one", "last.reward_model"),
    ({"stage": "rl", "rewards": {"mine": {"kind": "function", "path": "no:f"}}}, "cannot be imported", "last.rewards.mine.path"),
    ({"stage": "reward", "method": "reward", "loss": "huber"}, "`loss` means nothing to reward", "last.loss"),
    ({"stage": "prefer", "method": "grpo"}, "a method of another stage", "last.method"),
    ({"stage": "prefer", "method": "simpo", "reference": "$chat"}, "keeps no reference", "last.reference"),
    ({"stage": "distil", "teacher": "$chat", "policy": "on", "top_k": 4}, "changes nothing here, with policy=on", "last.top_k"),
    ({"stage": "adapt", "replay_share": 0.5}, "changes nothing here, with no general text", "last.replay_share"),
    ({"stage": "vocabulary", "train": False, "epochs": 2}, "changes nothing here, with train=false", "last.epochs"),
]  # fmt: skip


def recipe(folder: Path, last: dict[str, Any]) -> Path:
    stages = {
        "asked": {"stage": "data", "kind": "conversations", "sources": ["skill:reverse?count=20&held_out=4"], "dedup": "exact"},
        "words": {"stage": "tokenizer", "data": "$asked", "vocab_size": 300},
        "chat": {"stage": "pretrain", "data": "$asked", "tokenizer": "$words", "size": "1m"},
        "last": {"model": "$chat", "data": "$asked", **last},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"name": "late", "stages": stages}, sort_keys=False), encoding="utf-8")
    return file


@pytest.mark.parametrize(("last", "message", "field"), LAST, ids=[f"{x['stage']}-{f}" for x, _, f in LAST])
def test_the_last_stage_is_asked_first(last: dict[str, Any], message: str, field: str, tmp_path: Path) -> None:
    """Hours of training, and then a setting of the last stage that could have been refused at once."""
    loaded = load_recipe(recipe(tmp_path, last), STAGES, [], [])
    for act in (plan_recipe, run_recipe):
        with pytest.raises(ConfigError, match=message) as caught:
            act(loaded, Runner(STAGES, tmp_path / "runs", loaded.name))
        assert caught.value.field == field
    assert not (tmp_path / "runs").exists()


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

    monkeypatch.setattr("tutelage.stages.checks.data", refuse)
    run_recipe(loaded, Runner(STAGES, tmp_path / "runs", loaded.name))
    with pytest.raises(ConfigError, match="not today"):
        run_recipe(loaded, Runner(STAGES, tmp_path / "runs", loaded.name, force=True))
