"""The plan of a recipe: every stage has a range with a formula, or says what it waits for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import World, recipe_of, tutelage, world, write_recipe, write_sources  # noqa: F401 (a fixture)
from tutelage.config.stages import Data
from tutelage.plan.machine import Machine
from tutelage.preflight import data_sizes, estimates
from tutelage.recipe import Estimate, Planned, Runner, Unknown, load_recipe, plan_recipe
from tutelage.stages import STAGES

ROOT = Path(__file__).parent.parent.parent
MACHINE = Machine(cpu="x", cores=2, threads=2, memory_bytes=25 * 10**9, gemm_flops_fp32=191e9, gemm_flops_bf16=191e9,
                  memory_bandwidth=1e10, torch_version="x", quiet=True)  # fmt: skip


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "measure", lambda: MACHINE)


def plan(recipe: Path, runs: Path, *settings: tuple[str, Any]) -> dict[str, Estimate | Unknown | None]:
    loaded = load_recipe(recipe, STAGES, list(settings))
    return {p.name: p.estimate for p in plan_recipe(loaded, Runner(STAGES, runs, loaded.name))}


def test_a_measured_quickstart_lies_inside_its_plan(tmp_path: Path) -> None:
    """Guards the chain of guesses from sources to questions: seconds of a quickstart on two cores at 191 GFLOP/s
    (of `scores`, which reads the documents too since, the sum of its questions, 2.79 s, and of the baselines and documents)."""
    found = plan(ROOT / "recipes" / "quickstart.yaml", tmp_path)
    took = {"corpus": 2.64, "questions": 0.59, "tokenizer": 0.92, "base": 475.5, "base_scores": 22.66, "chat": 172.6,
            "sums": 0.4, "answers": 4.0, "rl": 104.7, "scores": 16.1, "report": 1.26}  # fmt: skip
    unknown = {name for name, estimate in found.items() if isinstance(estimate, Unknown)}
    asked = {"sums_before", "sums_dpo", "sums_rl"}  # under a second each
    assert unknown == {"pairs", "dpo"} and found.keys() == took.keys() | unknown | asked
    for name, seconds in took.items():
        estimate = found[name]
        assert isinstance(estimate, Estimate) and estimate.because and estimate.room
        assert estimate.seconds.low < seconds < estimate.seconds.high, name
        assert 0 < estimate.memory_bytes.low < estimate.memory_bytes.high


def test_a_measured_quickstart_lies_inside_its_amounts() -> None:
    """Guards against sources whose records are counted twice, or on the wrong side of the split."""
    stages = load_recipe(ROOT / "recipes" / "quickstart.yaml", STAGES, []).stages
    for name, records, held_out, size in (("corpus", 1164, 79, 2_338_698), ("questions", 10_688, 1110, 585_580)):
        made = data_sizes.expected(Planned(name, *stages[name]))
        assert made.held_out.low < held_out < made.held_out.high
        total, text = made.train + made.held_out, made.train_bytes + made.held_out_bytes
        assert total.low < records < total.high and text.low < size < text.high < 4 * text.low


def test_what_only_a_run_can_tell_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A blank cell, or a guess, where the data are a name on another machine."""
    recipe = recipe_of(tmp_path)
    stages = recipe["stages"]
    stages["corpus"]["sources"] = ["hf:org/texts"]
    stages["chats"]["sources"] = ["hf:org/chats"]
    stages["chat"] |= {"steps": "derived", "epochs": 2}
    stages["scores"] = {"stage": "evaluate", "model": "$chat", "questions": "$chats"}
    file = write_recipe(tmp_path / "r.yaml", recipe)
    found = plan(file, tmp_path / "runs")
    said = {name: str(e) if isinstance(e, Unknown) else type(e) for name, e in found.items()}
    assert said == {
        "corpus": "known after reading hf:org/texts", "chats": "known after reading hf:org/chats", "words": "known after corpus",
        "base": Estimate, "chat": "known after chats", "scores": "known after chats",
    }  # fmt: skip
    shown = tutelage(capsys, "run", file, "--runs", tmp_path / "runs", "--dry-run").err
    table = shown.split("in all ")[0]  # the derivations of each training come after it
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    assert len(rows) == 6 and all(all(row) for row in rows)
    assert "+ what is not known yet: corpus, chats, words, chat, scores" in shown


def test_finished_stages_take_nothing(world: World, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """A sum that counts what is there already; a total that is not the sum."""
    shown = tutelage(capsys, "run", world.recipe, "--runs", world.runs, "--dry-run").err
    assert shown.count(" hit ") == 5 and shown.count(" 0 s ") == 5 and "nothing to do: every stage is there" in shown
    shown = tutelage(capsys, "run", world.recipe, "--runs", world.runs, "--dry-run", "--force").err
    ends = [tuple(map(int, m)) for m in re.findall(r"(\d+) s +- (\d+) s ", shown)]
    low, high = map(int, re.search(r"in all (\d+) s - (\d+) s", shown).groups())  # type: ignore[union-attr]
    assert abs(low - sum(a for a, _ in ends)) <= 3 and abs(high - sum(b for _, b in ends)) <= 3


def test_records_that_are_there_are_counted(world: World, tmp_path: Path) -> None:  # noqa: F811
    """A guess where the card says it."""
    corpus = data_sizes.counted(world.made["corpus"] / "records")
    assert corpus.train == data_sizes.Span(corpus.train.low, corpus.train.low) and not corpus.conversations
    assert corpus.train.low + corpus.held_out.low <= 40 and data_sizes.counted(world.made["chats"] / "records").conversations
    write_sources(tmp_path)
    found = data_sizes.source(str(tmp_path / "chats.jsonl"), Data(sources=["x"]))
    assert found.records.low == 81 and found.largest == 0  # 80 lines and what may follow the last
    found = data_sizes.source(str(tmp_path / "texts"), Data(sources=["x"]))
    assert found.records == data_sizes.Span(40, 40) and found.text.low == sum(p.stat().st_size for p in tmp_path.glob("texts/*"))


def test_a_wrong_source_is_told_by_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback of the estimate, or a plan without a complaint."""
    for source, says in (("python-questions:?functions=x", "not a whole number"), ("skill:sing", "unknown skill")):
        said = tutelage(capsys, "data", "--kind", "conversations", "--sources", source, "--dry-run")
        assert said.code == 2 and says in said.err and "Traceback" not in said.err
