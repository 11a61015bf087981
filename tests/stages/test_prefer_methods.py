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
    with pytest.raises(ConfigError, match="a method of another stage"):
        prefer(world, tmp_path, "preferences", method="reward")
    with pytest.raises(ConfigError, match="did you mean `dpo`"):
        prefer(world, tmp_path, "preferences", method="sigmoid")
    with pytest.raises(ConfigError, match="beta"):
        prefer(world, tmp_path, "preferences", method="dpo", beta=float("inf"))


@pytest.mark.parametrize("kind", ["preferences", "ratings"])
def test_rejected_answers_are_not_read_as_texts(world: World, tmp_path: Path, kind: str) -> None:  # noqa: F811
    """A model that is pretrained, fine-tuned or taught on what people did not want."""
    how: dict[str, Any] = {"data": records(tmp_path, kind), "model": world.made["chat"], "runs": tmp_path / "runs", "steps": 1}
    for stage, more in (("pretrain", {}), ("distil", {"teacher": world.made["chat"]}), ("sft", {})):
        with pytest.raises(DataError, match="other records than this stage reads") as error:
            getattr(api, stage)(**how, **more)
        assert "tutelage reward" in str(error.value)


def test_pairs_without_a_difference_after_a_cut_are_left_out(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Pairs that differ in what was cut away: a loss of ln 2 for ever."""
    rows = [{"question": f"Cat {i}?", "chosen": "yes " * 40 + "good", "rejected": "yes " * 40 + "bad"} for i in range(8)]
    rows += [{"question": f"Dog {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(8)]
    for name, some in (("all", rows), ("same", rows[:8])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    how: dict[str, Any] = {"model": world.made["chat"], "runs": tmp_path / "runs", "max_length": 30, "too_long": "right", **QUICK}
    read: dict[str, Any] = {"kind": "preferences", "validation_share": 0.0, "min_chars": 1, "runs": tmp_path / "made"}
    run = api.prefer(data=api.data(sources=[tmp_path / "all.jsonl"], **read), **how)
    assert run.facts["packing"]["left out, the same tokens on both sides"] > 0
    assert run.facts["answers"] == run.facts["packing"]["pairs"] - run.facts["packing"]["left out, the same tokens on both sides"]
    with pytest.raises(DataError, match="no pair is left"):
        api.prefer(data=api.data(sources=[tmp_path / "same.jsonl"], **read), **how)
