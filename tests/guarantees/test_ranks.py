"""Promise 6: two ranks are one rank. Real processes over gloo, as `torchrun` starts them."""

from __future__ import annotations

import signal

from safetensors.torch import load_file

from tests.guarantees import tiny
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
