"""Promise 6: two ranks are one rank. Real processes over gloo, as `torchrun` starts them."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.guarantees import tiny
from tutelage import api
from tutelage.files import read_json


def test_two_ranks_train_the_model_of_one(tmp_path):
    """Guards against averaging where sums are meant, ranks that see the same rows, clipping before the sum, and files written
    twice: weights after ten steps, losses, gradient norms and the table of metrics are those of one rank to rounding."""
    pair = [tiny.start(tmp_path, env=env) for env in tiny.ranks(2)]
    assert [p.wait() for p in pair] == [0, 0], [p.said for p in pair]
    run, alone = tiny.run_folder(tmp_path), tiny.straight()
    one, two = (load_file(r / "model" / "model.safetensors") for r in (alone, run))
    assert tiny.furthest(one, two) < 1e-5  # ten steps of Muon, whose orthogonalisation magnifies rounding
    rows, expected = tiny.metrics(run), tiny.metrics(alone)
    assert [r.keys() for r in rows] == [r.keys() for r in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert all(abs(row[k] - wanted[k]) <= 2e-5 * abs(wanted[k]) for k in wanted), (row, wanted)
    assert read_json(run / "run.json")["ranks"] == 2
    first, wanted = (next(r for r in table if r["step"] == 1) for table in (rows, expected))
    assert abs(first["loss"] - wanted["loss"]) < 1e-6


def test_ctrl_c_on_one_rank_stops_all_at_one_step(tmp_path):
    """Guards against ranks that stop at different steps, one waiting for ever in a sum that the other never joins."""
    die = {"at": "forward", "count": 4, "how": signal.SIGINT, "rank": 1}
    pair = [tiny.start(tmp_path, env=env, die=die, checkpoint_every=100) for env in tiny.ranks(2)]
    assert [p.wait() for p in pair] == [130, 130], [p.said for p in pair]
    assert [p.name for p in (tiny.run_folder(tmp_path) / "checkpoints").iterdir()] == ["step_000004"]


ENCODER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
           "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
TRANSLATOR = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}


@pytest.mark.parametrize("stage", ["classify", "translate"])
def test_two_ranks_train_the_classifier_or_the_translator_of_one(tmp_path: Path, stage: str) -> None:
    """Guards against ranks that wait for each other for ever, and against scores and folders that each of them writes."""
    pytest.importorskip("transformers")
    if stage == "classify":
        rows = [{"text": f"number {i} is {'red' if i % 2 else 'blue'}", "label": "red" if i % 2 else "blue"} for i in range(40)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = api.data(sources=[tmp_path / "rows.jsonl"], kind="examples", dedup="exact", validation_share=0.2, runs=tmp_path)
        how: dict[str, Any] = {"max_length": 32, "folds": 2, "architecture": ENCODER, "batch": 16}
    else:
        data = api.data(sources=["skill:upper?count=40&held_out=6"], kind="conversations", dedup="exact", runs=tmp_path)
        how = {"max_target": 16, "architecture": TRANSLATOR, "batch": 16}
    how |= {
        "data": data.path,
        "tokenizer": tiny.tokenizer(),
        "steps": 4,
        "micro_tokens": 128,
        "checkpoint_every": 2,
        "threads": 1,
    }
    argv = [stage, *(x for k, v in how.items() for x in ("--set", f"{k}={json.dumps(v) if isinstance(v, dict) else v}"))]

    def started(folder: Path, env: dict[str, str]) -> tiny.Process:
        return tiny.Process({"argv": [*argv, "--runs", str(folder)], "die": {}, "env": env})

    alone = started(tmp_path / "one", {})
    assert alone.wait() == 0, alone.said
    pair = [started(tmp_path / "two", env) for env in tiny.ranks(2)]
    assert [p.wait(120) for p in pair] == [0, 0], pair[0].said + pair[1].said
    one, two = (tiny.run_folder(tmp_path / n, stage) for n in ("one", "two"))
    weights = [load_file(run / "model" / "model.safetensors") for run in (one, two)]
    assert tiny.furthest(*weights) < 1e-4
    assert read_json(one / "scores" / "scores.json").keys() == read_json(two / "scores" / "scores.json").keys()
    assert pair[1].said.count("held out") == 0, "a rank that writes nothing says what it found"
