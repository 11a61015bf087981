"""Replay in fine-tuning: general text holds back forgetting, and forgetting is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.guarantees import tiny
from tests.pipeline import World, world  # noqa: F401 (a fixture)
from tests.stages.test_preference_methods import records
from tutelage import api
from tutelage.data.tokens.replay import ReplaySource
from tutelage.errors import ConfigError
from tutelage.objectives import objective
from tutelage.objectives.replay import with_replay
from tutelage.train.step import StepConfig, gradients

QUICK = {"steps": 12, "batch_tokens": 512, "sequence_length": 128, "threads": 1, "kernels": False, "max_documents": 4,
         "optimizer": {"lr": 0.01, "matrix_lr": 0.01, "embedding_lr": 0.01}}  # fmt: skip


def test_the_gradient_is_that_of_both_parts() -> None:
    """Guards against counts that mix: text with many tokens must not drown what is taught, nor dilute it."""
    task, text = tiny.source("conversations"), tiny.source("documents", seed=3)
    both = ReplaySource(task, text)
    found = {}
    for name, source, method in (
        ("task", task, objective("next_token")), ("text", text, objective("next_token")),
        ("both", both, with_replay(objective("next_token"))),
    ):  # fmt: skip
        model = tiny.model(dtype=torch.float64)
        result = gradients(StepConfig({"policy": model}, method, {"replay": 0.5}), source.next(2))
        found[name] = result, tiny.gradients_of(model)
    for key, whole in found["both"][1].items():
        torch.testing.assert_close(whole, found["task"][1][key] + 0.5 * found["text"][1][key], rtol=1e-9, atol=1e-12)
    terms = found["both"][0].terms
    assert terms["loss"] == pytest.approx(found["task"][0].loss) and terms["replay"] == pytest.approx(found["text"][0].loss)


def test_a_micro_batch_of_either_part_comes_apart() -> None:
    """A loss that is not finite is traced to its rows, those of replayed text too."""
    both = ReplaySource(tiny.source("conversations"), tiny.source("documents", seed=3))
    batch = both.next(0)
    replayed = [i for i, micro in enumerate(batch.micro) if micro.replay]
    assert replayed and len(replayed) < len(batch.micro)
    for i in (0, replayed[0]):
        rows = batch.rows_apart(i)
        assert len(rows) == len(batch.micro[i].ids) and all(row.replay == batch.micro[i].replay for row in rows)
    assert ReplaySource(tiny.source("conversations"), tiny.source("documents", seed=3)).state_dict() == both.state_dict()


def forgotten(run: Any) -> float:
    return float(run.facts["adaptation_effect"]["general"]["change"]["value"])


def test_sft_with_replay_forgets_less(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Guards against fine-tuning that destroys the base: with general text its bits per byte rise less, and both are told."""
    settings = {"model": world.made["base"], "data": world.made["chats"], "runs": tmp_path, **QUICK}
    without = api.sft(general=world.made["corpus"], replay_share=0.0, **settings)
    replayed = api.sft(general=world.made["corpus"], replay_share=0.5, **settings)
    assert forgotten(replayed) < forgotten(without)
    assert "general: " in replayed.facts["verdict"] and replayed.facts["adaptation_effect"]["general"]["documents"] == 4
    rows = [json.loads(x) for x in (replayed.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any("term/replay" in row for row in rows) and any("general_bits_per_byte" in row for row in rows)


def test_preferences_and_rewards_replay_too(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Every tuning stage has the setting: a stage that ignored it would train without general text."""
    quick = {"steps": 2, "batch": 4, "threads": 1, "kernels": False, "micro_tokens": 200, "max_documents": 3, "runs": tmp_path}
    pairs = records(tmp_path, "preferences")
    chosen = api.preference(model=world.made["chat"], data=pairs, general=world.made["corpus"], **quick)
    prompts = api.data(sources=[str(tmp_path / "preferences.jsonl")], kind="prompts", fields={"answer": "chosen"}, dedup="exact",
                       validation_share=0.2, runs=tmp_path / "made")  # fmt: skip
    rewarded = api.rl(
        model=world.made["chat"], data=prompts, general=world.made["corpus"],
        rewards={"letter": {"kind": "regex", "pattern": "(?s).*[aeiou].*"}},
        samples=4, max_tokens=4, probes=2, **quick,
    )  # fmt: skip
    for run in (chosen, rewarded):
        rows = [json.loads(x) for x in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert any("term/replay" in row for row in rows) and run.facts["adaptation_effect"]["general"]["documents"] == 3


def test_replay_without_general_text_is_refused(world: World, tmp_path: Path) -> None:  # noqa: F811
    """A share of nothing would be ignored without a word."""
    with pytest.raises(ConfigError, match="no general text"):
        api.sft(model=world.made["base"], data=world.made["chats"], replay_share=0.3, runs=tmp_path, steps=1)
