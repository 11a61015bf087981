"""Recipes: every key is checked before anything runs, and nothing runs that is there already."""

from __future__ import annotations

import ast
import functools
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.pipeline import recipe_of, tutelage, write_recipe, write_sources
from tutelage import api
from tutelage.cli import main
from tutelage.config import stages
from tutelage.config.base import Section, artifact, setting
from tutelage.config.spec import RENAMED, StageSpec
from tutelage.config.stages import Data
from tutelage.errors import ConfigError
from tutelage.files import read_json
from tutelage.plan import code
from tutelage.recipe import Runner, load_recipe, plan_recipe
from tutelage.rundir import RunDir, lineage
from tutelage.stages import FILE_COMMANDS, STAGES

TEXT = """\
name: test
scales:
  smoke: {words.vocab_size: 300}
  broken: {words.vocab_sise: 300}
stages:
  corpus:
    stage: data
    sources: [texts]
  words:
    stage: tokenizer
    data: $corpus
    vocab_size: 400
"""


def load(folder: Path, text: str, *settings: tuple[str, Any]) -> Any:
    (folder / "r.yaml").write_text(text)
    return load_recipe(folder / "r.yaml", STAGES, list(settings))


@pytest.mark.parametrize(
    ("change", "line", "message", "fix"),
    [
        (("vocab_size: 400", "vocab_sise: 400"), 12, "unknown key `vocab_sise`", "did you mean `vocab_size`?"),
        (("stages:", "stage:"), 5, "unknown key `stage`", "did you mean `stages`?"),
        (("stage: tokenizer", "stage: tokeniser"), 10, "unknown stage kind `tokeniser`", "did you mean `tokenizer`?"),
        (("$corpus", "$corpsu"), 11, "`$corpsu` is not a stage above `words`", "did you mean `$corpus`?"),
        (("$corpus", "$words"), 11, "`$words` is not a stage above `words`", None),
        (("vocab_size: 400", "vocab_size: lots"), 12, "`vocab_size` has a value that does not fit", None),
        (("    data: $corpus\n", ""), 9, "`data` is required", None),
        (("    stage: tokenizer\n", ""), 9, "`words` needs `stage:`", None),
        (("name: test", "name: ../test"), 1, "not a name", None),
        (("  words:", "  wo.rds:"), 9, "not a name", None),
        (("{words.vocab_size: 300}", "3"), 2, "`scales` is a mapping", None),
        (("stage: data", "stage: evaluate\n    model: m"), 9, "unknown key `sources`", None),
    ],
)
def test_mistakes_are_placed(tmp_path: Path, change: tuple[str, str], line: int, message: str, fix: str | None) -> None:
    """A recipe of eight stages that fails in the seventh, hours later, for a misspelt key."""
    assert change[0] in TEXT
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, TEXT.replace(*change, 1))
    error = caught.value
    assert message in error.message and error.line == line and error.file == tmp_path / "r.yaml" and error.fix == fix


def test_a_stage_that_makes_something_else(tmp_path: Path) -> None:
    """`model: $corpus`, found out after the corpus is made."""
    text = TEXT + "  chat:\n    stage: sft\n    model: $words\n    data: $corpus\n"
    with pytest.raises(ConfigError, match="`model` takes model, and `\\$words` makes tokenizer") as caught:
        load(tmp_path, text)
    assert caught.value.line == 15


def test_scales_and_settings(tmp_path: Path) -> None:
    """A scale that outlives a `--set`, and settings that touch another stage."""
    sizes = [
        load(tmp_path, TEXT, *settings).stages["words"][1].vocab_size
        for settings in ((), (("scale", "smoke"),), (("scale", "full"),), (("words.vocab_size", 9), ("scale", "smoke")))
    ]
    assert sizes == [400, 300, 400, 9]
    assert load(tmp_path, TEXT, ("corpus.sources", "elsewhere")).stages["corpus"][1].sources == ["elsewhere"]


@pytest.mark.parametrize(
    ("setting", "place", "message", "fix"),
    [
        (("scale", "smok"), "--set scale=smok", "unknown scale `smok`", "did you mean `smoke`?"),
        (("scale", "broken"), "r.yaml:4", "unknown key `vocab_sise`", "did you mean `vocab_size`?"),
        (("word.vocab_size", 3), "--set word.vocab_size=3", "unknown stage `word`", "did you mean `words`?"),
        (("words.vocab_size", "x"), "--set words.vocab_size=x", "`vocab_size` has a value that does not fit", None),
        (("words.vocab_sise", 3), "--set words.vocab_sise=3", "unknown key `vocab_sise`", "did you mean `vocab_size`?"),
        (("words.stage", "toks"), "--set words.stage=toks", "unknown stage kind `toks`", "did you mean `tokens`?"),
        (("words.data", "$corpsu"), "--set words.data=$corpsu", "`$corpsu` is not a stage above", "did you mean `$corpus`?"),
        (("words", True), "--set words=true", "`words` needs `stage:`", None),
    ],
)
def test_wrong_settings(tmp_path: Path, setting: tuple[str, Any], place: str, message: str, fix: str | None) -> None:
    """The recipe's file or line that is blamed for a word of the command line."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, TEXT, setting)
    assert message in caught.value.message and caught.value.fix == fix
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/{place}: " if place.startswith("r.yaml") else f"{place}: ")


def test_a_setting_that_replaces_a_section_takes_its_lines(tmp_path: Path) -> None:
    """The line of a nested key that the command line has replaced together with its section."""
    text = TEXT + "  base:\n    stage: pretrain\n    data: $corpus\n    tokenizer: $words\n    optimizer:\n      lr: 1e-3\n"
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, ("base.optimizer", {"lr": -1}))
    assert str(caught.value).startswith('--set base.optimizer={"lr": -1}: ')


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with sources and a recipe of two quick stages."""
    write_sources(tmp_path)
    recipe = recipe_of(tmp_path)
    recipe["stages"] = {k: v for k, v in recipe["stages"].items() if k in ("corpus", "words")}
    write_recipe(tmp_path / "r.yaml", recipe)
    return tmp_path


def go(folder: Path, **settings: Any) -> dict[str, RunDir]:
    return api.run(folder / "r.yaml", runs=folder / "runs", **settings)


def attempts(made: dict[str, RunDir]) -> dict[str, int]:
    return {name: len(list((run.path / "logs").iterdir())) for name, run in made.items()}


def test_nothing_runs_twice(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipeline that starts over; and one that says nothing about what it took from where."""
    first = go(small)
    assert "corpus: miss, running" in capsys.readouterr().err
    again = go(small)
    said = capsys.readouterr().err
    assert f"corpus: hit, {first['corpus'].path}" in said and f"words: hit, {first['words'].path}" in said and "miss" not in said
    assert attempts(again) == {"corpus": 1, "words": 1}
    forced = go(small, force=True)
    assert attempts(forced) == {"corpus": 2, "words": 2} and "forced, running" in capsys.readouterr().err
    assert (
        {n: r.path for n, r in first.items()} == {n: r.path for n, r in again.items()} == {n: r.path for n, r in forced.items()}
    )


def test_touching_and_moving_change_nothing(small: Path) -> None:
    """A cache keyed by times or by paths."""
    first = go(small)
    os.utime(small / "texts" / "00.txt", (1, 1))
    (small / "texts").rename(small / "moved")
    again = go(small, **{"corpus.sources": [small / "moved"]})
    assert attempts(again) == {"corpus": 1, "words": 1} and again["words"].path == first["words"].path


def test_an_edited_source_reruns_what_depends_on_it(small: Path) -> None:
    """A stale cache: the old corpus under a new text."""
    first = go(small)
    file = small / "texts" / "00.txt"
    file.write_text(file.read_text() + "One more line about a zebra.\n")
    edited = go(small)
    assert edited["corpus"].path != first["corpus"].path and edited["words"].path != first["words"].path
    assert "zebra" in "".join(p.read_text() for p in (edited["corpus"].path / "records").glob("*.jsonl"))
    file.write_text(file.read_text().replace("One more line about a zebra.\n", ""))
    assert go(small)["words"].path == first["words"].path


def test_children_run_only_when_the_content_of_their_input_changed(small: Path) -> None:
    """A parent that ran again and made the same is no reason to train again."""
    first = go(small)
    (small / "texts" / "empty.txt").write_text("")  # another source, which gives no document
    edited = go(small)
    assert edited["corpus"].path != first["corpus"].path
    same = edited["corpus"].facts["artifact"]["digest"] == first["corpus"].facts["artifact"]["digest"]
    assert (edited["words"].path == first["words"].path) == same


def test_held_out_sources_are_not_sources(small: Path) -> None:
    """Two ways to divide the same files that share a run, and with it the wrong split."""
    one, two = str(small / "texts" / "00.txt"), str(small / "texts" / "01.txt")
    runner = Runner(STAGES, small / "runs")
    first = runner.digest("data", Data(sources=[one, two]), {})
    second = runner.digest("data", Data(sources=[one], validation_sources=[two]), {})
    assert first != second != runner.digest("data", Data(sources=[two], validation_sources=[one]), {})


def test_settings_outside_identity_are_hits(tmp_path: Path) -> None:
    """Another number of worker processes that tokenizes the corpus again."""
    write_sources(tmp_path)
    corpus = api.data(sources=[tmp_path / "texts"], runs=tmp_path / "runs")
    words = api.tokenizer(data=corpus, vocab_size=300, runs=tmp_path / "runs")
    one, two = (api.tokens(data=corpus, tokenizer=words, workers=n, runs=tmp_path / "runs") for n in (1, 2))
    assert one.path == two.path and attempts({"tokens": two}) == {"tokens": 1}


def test_code_that_makes_a_stage_is_in_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Editing the mechanism and getting yesterday's result; or editing an unrelated file and training for a day."""
    real = code.code_digest("tutelage.stages.data")
    package = tmp_path / "tutelage"
    shutil.copytree(code.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "PACKAGE", package)
    parsed = functools.cache(ast.parse)  # as code._tree, but by content
    monkeypatch.setattr(code, "_tree", lambda path: parsed(path.read_text(encoding="utf-8")))

    def digests() -> dict[str, str]:
        return {name: code.code_digest.__wrapped__(STAGES[name].module) for name in ("data", "tokenizer", "pretrain", "report")}

    before = digests()
    assert before["data"] == real
    for name, changed in (
        ("data/clean/filters.py", {"data"}),
        ("data/demo/words.txt", {"data"}),
        ("chat/templates/chatml.jinja", {"tokenizer", "pretrain"}),
        ("plan/dial.yaml", {"pretrain"}),
        ("models/kernels/loss.cpp", {"pretrain"}),
        ("evaluate/report.html.jinja", {"report"}),
        ("cli/main.py", set()),
        ("config/stages.py", set()),
        ("plan/prices.yaml", set()),
    ):
        file = package / name
        old = file.read_bytes()
        file.write_bytes(old + b"\n")
        after = digests()
        file.write_bytes(old)
        assert {n for n in before if before[n] != after[n]} == changed, name


def test_plan_tells_what_will_happen(small: Path) -> None:
    """A plan that runs something, or that promises a hit for a stage whose input will change."""
    loaded = load_recipe(small / "r.yaml", STAGES, [])
    assert [p.status for p in plan_recipe(loaded, Runner(STAGES, small / "runs", "small"))] == ["run", "run after corpus"]
    assert not (small / "runs").exists()
    go(small)
    assert [p.status for p in plan_recipe(loaded, Runner(STAGES, small / "runs", "small"))] == ["hit", "hit"]
    (small / "texts" / "00.txt").write_text("Quite another text, long enough to be kept by the filters.\n")
    assert [p.status for p in plan_recipe(loaded, Runner(STAGES, small / "runs", "small"))] == ["run", "run after corpus"]


def test_lineage(small: Path) -> None:
    """A model that can't say which texts it came from."""
    made = go(small)
    rows = lineage(made["words"].path)
    assert [(depth, name, row["stage"]) for depth, name, _, row in rows] == [(0, "run", "tokenizer"), (1, "data", "data")]
    parent = read_json(made["words"].path / "run.json")["parents"][0]
    assert parent["digest"] == made["corpus"].facts["artifact"]["digest"] and parent["stage"] == "data"
    resolved = (made["words"].path / "config.yaml").read_text()
    assert str(made["corpus"].path) in resolved and "$corpus" not in resolved


def test_a_section_and_a_row_declare_a_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that has to be described in six places, one of which is forgotten."""

    class CountWords(Section):
        """Count the words of the training part."""

        data: str = artifact("Documents to count.", kind="records")
        least: int = setting(1, "Shortest word, in characters.")

    def run(config: CountWords, run: RunDir) -> dict[str, Any]:
        run.folder("words").mkdir()
        text = (run.input("data") / "train.jsonl").read_text(encoding="utf-8")
        return {"words": sum(len(word) >= config.least for word in text.split())}

    write_sources(tmp_path)
    monkeypatch.setattr(stages, "CountWords", CountWords, raising=False)
    monkeypatch.setitem(sys.modules, "tutelage.stages.count_words", SimpleNamespace(run=run))  # type: ignore[arg-type]
    monkeypatch.setitem(STAGES, "count_words", StageSpec("CountWords", makes="words"))
    recipe = {"name": "r", "stages": {
        "corpus": {"stage": "data", "sources": [str(tmp_path / "texts")]},
        "words": {"stage": "count_words", "data": "$corpus", "least": 3},
    }}  # fmt: skip
    made = api.run(write_recipe(tmp_path / "r.yaml", recipe), runs=tmp_path / "runs")
    found = api.count_words(data=made["corpus"], least=3, runs=tmp_path / "runs")
    assert found.facts["words"] == made["words"].facts["words"] > 100 and "count_words" in dir(api)
    assert api.count_words.__doc__ == STAGES["count_words"].help == "Count the words of the training part."
    monkeypatch.setattr(main.app, "registered_commands", list(main.app.registered_commands))
    page = tutelage(capsys, "count-words", "--help").out + tutelage(capsys, "--help").out
    assert "Count the words of the training part." in page


def test_the_table_names_what_is_there() -> None:
    """A row whose name, module, check or estimate is another's: found by name, a misspelt one would be no check at all."""
    for name, spec in (STAGES | FILE_COMMANDS).items():
        assert spec.name == name and callable(spec.run()), name
    unchecked = {name for name, spec in STAGES.items() if spec.check() is None}
    assert unchecked == {"tokenizer", "tokens", "report"}
    assert all(spec.estimate() is not None for spec in STAGES.values())


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_names_of_stages_lead_to_the_new(old: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command of last month's notes that is unknown without a word of its new name."""
    said = tutelage(capsys, old, "--help")
    assert said.code == 2 and f"It is called '{new.replace('_', '-')}' now" in said.err
    with pytest.raises(AttributeError, match=f"called `{new}` now"):
        getattr(api, old)
    if new in STAGES:
        recipe = write_recipe(tmp_path / "r.yaml", {"name": "r", "stages": {"one": {"stage": old}}})
        with pytest.raises(ConfigError, match=f"did you mean `{new}`"):
            load_recipe(recipe, STAGES, [])
