"""Stage `preference` with methods beside DPO: what they learn from, and their own settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import World, world  # noqa: F401 (a fixture)
from tutelage import api
from tutelage.errors import ConfigError, DataError
from tutelage.rundir import RunDir

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
    return api.preference(model=world.made["chat"], data=records(tmp_path, kind), runs=tmp_path / "runs", **QUICK, **settings)


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
    with pytest.raises(ConfigError, match="dpo has no setting `gamma`"):
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
    read: dict[str, Any] = {"kind": "preferences", "validation_share": 0.0, "runs": tmp_path / "made"}
    run = api.preference(data=api.data(sources=[tmp_path / "all.jsonl"], **read), **how)
    assert run.facts["packing"]["left out, the same tokens on both sides"] > 0
    assert run.facts["answers"] == run.facts["packing"]["pairs"] - run.facts["packing"]["left out, the same tokens on both sides"]
    with pytest.raises(DataError, match="no pair is left"):
        api.preference(data=api.data(sources=[tmp_path / "same.jsonl"], **read), **how)


LONG = "yes " * 60
SETTINGS: dict[str, Any] = {"max_length": 40, "threads": 1, "steps": 2, "batch": 4}


def long_ones(folder: Path, kind: str, of: str) -> RunDir:
    """20 short rows to learn from, and 4 held-out ones; those of the part `of` are too long."""
    files = []
    for part, count in (("train", 20), ("validation", 4)):
        more = LONG if part == of else ""
        rows = [{"question": f"{part[:3]} {i}?", "chosen": f"{more}good {i}", "rejected": f"{more}bad {i}"} for i in range(count)]
        if kind == "ratings":
            rows = [{"question": r["question"], "answer": r["chosen"], "label": i % 2} for i, r in enumerate(rows)]  # type: ignore[dict-item]
        files.append(folder / f"{part}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return api.data(kind=kind, sources=[files[0]], validation_sources=[files[1]], dedup="exact", runs=folder)


@pytest.mark.parametrize(
    ("stage", "kind", "more", "message"),
    [("preference", "preferences", {}, "no pair is left"), ("preference", "ratings", {"method": "kto"}, "KTO needs two ratings"),
     ("reward", "preferences", {}, "no pair is left"), ("reward", "ratings", {}, "no rating is left")],
)  # fmt: skip
def test_held_out_rows_that_are_too_long_stop_nothing(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, kind: str, more: dict[str, Any], message: str  # noqa: F811
) -> None:  # fmt: skip
    """Guards against a sound training that ends with "no pair is left to learn from", and against counts of what never was."""
    how: dict[str, Any] = {"model": world.made["chat"], "runs": tmp_path, **SETTINGS, **more}
    made = getattr(api, stage)(data=long_ones(tmp_path, kind, "validation"), **how)
    said = " ".join(capsys.readouterr().err.split())
    noun = "pairs" if kind == "preferences" else "ratings"
    assert f"validation: nothing of it can be read, so nothing is measured on it (4 {noun}, 4 left out, too long;" in said
    assert "raise max_length (40), set too_long=left, or give shorter texts" in said
    assert made.facts["steps"] == 2 and "validation_loss" not in made.facts
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=message) as caught:
        getattr(api, stage)(data=long_ones(tmp_path / "other", kind, "train"), **how)
    assert caught.value.found == f"20 {noun}, 20 left out, too long" and "at most 40 tokens" in str(caught.value.expected)
