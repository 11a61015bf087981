"""Promise 8: the same seed gives the same bytes; another seed another model."""

from __future__ import annotations

from tests.guarantees import tiny


def test_one_seed_one_model(tmp_path):
    """Guards against anything that is not seeded or depends on time, names or addresses: two real runs in two places write the
    same model file; another seed changes weights and the order of data."""
    again, other = tiny.start(tmp_path / "again"), tiny.start(tmp_path / "other", seed=1)
    assert (again.wait(), other.wait()) == (0, 0), again.said + other.said
    runs = [tiny.straight(), tiny.run_folder(tmp_path / "again"), tiny.run_folder(tmp_path / "other")]
    first, second, third = ((r / "model" / "model.safetensors").read_bytes() for r in runs)
    assert first == second != third
    assert tiny.metrics(runs[0]) == tiny.metrics(runs[1])
    start = [tiny.metrics(r)[0]["validation_loss"] for r in runs]  # of the new weights, on text that no seed orders
    assert start[0] == start[1] != start[2]
    counts = [[row["tokens"] for row in tiny.metrics(r)] for r in runs]
    assert counts[0] == counts[1] != counts[2]
