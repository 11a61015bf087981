"""One learning-rate dial moves everything that is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import World, tutelage, world  # noqa: F401 (a fixture)
from tutelage import api
from tutelage.config.base import build
from tutelage.config.stages import Pretrain, Sft
from tutelage.errors import ConfigError
from tutelage.setup.hyperparameters import RATES, derive_all, explicit_rates, scaled_rates

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
         "intermediate_size": 128, "vocab_size": 512}  # fmt: skip


def pretrain_rates(**settings: Any) -> dict[str, float]:
    config = build(Pretrain, {"data": "d", "tokenizer": "t", "size": "500k", "tokens": 1e6, "architecture": SHAPE, **settings})
    found = derive_all(config, 512, 10**6, None)
    return {name: float(found.values[name]) for name in RATES}


def test_rates_keep_their_ratio_to_lr() -> None:
    """`lr` that moves the norms alone, while matrices and embeddings train at their derived rates."""
    free = pretrain_rates()
    half = pretrain_rates(lr=free["lr"] / 2)
    assert half == pytest.approx({name: rate / 2 for name, rate in free.items()}, rel=1e-5)
    assert pretrain_rates(optimizer={"lr": free["lr"] / 2}) == half
    assert pretrain_rates(lr=free["lr"] / 2, optimizer={"matrix_lr": 0.7})["matrix_lr"] == 0.7
    derived = {"lr": (0.01, "a"), "matrix_lr": (0.004, "b"), "embedding_lr": (0.02, "c")}
    config = build(Sft, {"model": "m", "data": "d", "lr": 1e-4})
    assert {n: r for n, (r, _) in scaled_rates(explicit_rates(config), derived).items()} == pytest.approx(
        {"lr": 1e-4, "matrix_lr": 4e-5, "embedding_lr": 2e-4}
    )


def test_a_peak_given_twice_is_refused() -> None:
    """Which of two would win nobody could tell."""
    with pytest.raises(ConfigError, match="given twice") as caught:
        build(Sft, {"model": "m", "data": "d", "lr": 1e-4, "optimizer": {"lr": 1e-3}})
    assert caught.value.field == "lr" and "leave optimizer.lr out" in str(caught.value.fix)
    build(Sft, {"model": "m", "data": "d", "lr": 1e-4, "optimizer": {"lr": 1e-4}})


def test_the_dial_really_moves_the_training(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Ten steps at 1e-6 teach next to nothing, at the derived rate something, at 2e-2 the most."""
    losses = []
    for lr in (1e-6, None, 2e-2):
        run = api.sft(
            model=world.made["base"], data=world.made["chats"], runs=tmp_path, lr=lr, steps=10, sequence_length=128,
            batch_tokens=512, threads=1, kernels=False,
        )  # fmt: skip
        rows = [json.loads(x) for x in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
        losses.append((held_out[0], held_out[-1]))
    assert abs(losses[0][1] - losses[0][0]) < 0.01
    assert losses[0][1] - losses[1][1] > 0.05
    assert losses[1][1] - losses[2][1] > 0.3


def test_dry_run_prints_the_derivation(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """`--dry-run` said `lr: derived` where the README promises the number and its reason."""
    line = ["sft", "--model", world.made["base"], "--data", world.made["chats"], "--runs", tmp_path, "--dry-run"]
    said = tutelage(capsys, *line, columns=200)
    shown = said.out + said.err
    assert "a trained model moves in small steps" in shown and "the checkpoint's context" in shown
    given = tutelage(capsys, *line, "--lr", "1e-5", columns=200)
    shown = given.out + given.err
    assert "matrix_lr" in shown and "1 x lr, the ratio of the derived rates" in shown and not list(tmp_path.glob("*/run.json"))
