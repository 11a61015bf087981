"""Stage `prefer` with methods beside DPO: what they learn from, and their own settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import World, world  # noqa: F401 (a fixture)
from tutelage import api
from tutelage.errors import ConfigError, DataError

QUICK = {"steps": 2, "batch": 4, "threads": 1, "kernels": False, "micro_tokens": 200}


def records(folder: Path, kind: str) -> Path:
    rows: list[dict[str, Any]] = []
    for i in range(20):
        row: dict[str, Any] = {"question": f"Where is cat {i}?"}
        if kind == "preferences":
            row |= {"chosen": f"By the door {i}.", "rejected": f"Nobody knows {i}.", "margin": 0.5 * (i % 3)}
        else:
            row |= {"answer": f"By the door {i}.", "label": i % 4 != 0}
        rows.append(row)
    file = folder / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Path(api.data(sources=[file], kind=kind, dedup="exact", validation_share=0.2, runs=folder / "made").path)


def prefer(world: World, tmp_path: Path, kind: str, **settings: Any) -> Any:  # noqa: F811
    return api.prefer(model=world.made["chat"], data=records(tmp_path, kind), runs=tmp_path / "runs", **QUICK, **settings)


def last(run: Any) -> dict[str, float]:
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "loss" in row][-1]


def test_kto_learns_from_ratings(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Guards against a method of the table that no stage can run: verdicts, reference and balance reach the loss."""
    run = prefer(world, tmp_path, "ratings", method="kto", desirable_weight=0.5)
    said = (run.path / "logs" / "attempt_1.log").read_text(encoding="utf-8")
    assert run.facts["answers"] == 14
    assert said.count("10 desirable and 4 undesirable answers, weighted 0.5 and 1\n") == 1
    assert {"term/kl", "term/accuracy"} <= last(run).keys()
    assert (run.path / "model" / "config.json").is_file()


def test_settings_of_a_method_reach_it(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Guards against settings and margins that the stage takes and drops."""
    run = prefer(world, tmp_path, "preferences", method="dpo", offset=4.0)
    assert last(run)["loss"] > 1.0  # without margins it would begin at ln 2
    assert last(prefer(world, tmp_path, "preferences", method="cpo", sft=0.0)).keys().isdisjoint({"term/sft"})
    with pytest.raises(ConfigError, match="`gamma` means nothing to dpo"):
        prefer(world, tmp_path, "preferences", method="dpo", gamma=1.0)


def test_other_records_and_other_methods_are_refused(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Guards against ratings read as pairs, and against a reward model's method that trains a language model."""
    with pytest.raises(DataError, match="--kind ratings"):
        prefer(world, tmp_path, "preferences", method="kto")
    with pytest.raises(ConfigError, match="method"):
        prefer(world, tmp_path, "preferences", method="reward")
