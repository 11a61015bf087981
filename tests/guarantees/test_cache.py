"""Promise 10: what is kept is keyed by content and code, and every use of it is announced."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline import World, recipe_of, tutelage, world, write_recipe  # noqa: F401 (a fixture)
from tutelage.recipe import Runner
from tutelage.references import find
from tutelage.stages import STAGES


def test_every_stage_says_hit_or_miss(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """A result from a cache that nobody was told of; tokens made again for a model that was there."""
    said = tutelage(capsys, "run", world.recipe, "--runs", world.runs)
    assert said.code == 0 and all(f"{name}: hit, {path}" in said.err for name, path in world.made.items())
    assert "miss" not in said.err


def test_tokens_are_shared_by_the_runs_that_need_them(world: World, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """A corpus that is tokenized again for every new learning rate: the tokens are a run of their own, found by content."""
    recipe = recipe_of(world.folder)
    recipe["stages"].pop("chat")
    recipe["stages"]["base"]["optimizer"] = {"lr": 1e-3}
    path = write_recipe(world.folder / "other.yaml", recipe)
    said = tutelage(capsys, "run", path, "--runs", world.runs)
    assert said.code == 0 and "base: miss, running" in said.err and "tokens: hit" in said.err


def test_settings_content_and_code_make_the_key(world: World, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """One of the four left out of the key: a stale result under a new name."""
    runner = Runner(STAGES, world.runs)
    section = STAGES["tokenizer"].config()
    inputs = {"data": find(str(world.made["corpus"]), "records", world.runs)}
    config = section(data="x", vocab_size=300)
    key = runner.digest("tokenizer", config, inputs)
    assert key == runner.digest("tokenizer", section(data="elsewhere", vocab_size=300), inputs)
    assert key == read_digest(world)
    chats = {"data": find(str(world.made["chats"]), "records", world.runs)}
    others = [
        runner.digest("tokenizer", section(data="x", vocab_size=301), inputs),
        runner.digest("tokenizer", config, chats),
        runner.digest("tokens", config, inputs),
    ]
    monkeypatch.setattr("tutelage.recipe.code_digest", lambda module: "edited")
    others.append(runner.digest("tokenizer", config, inputs))
    assert len({key, *others}) == 5


def read_digest(world: World) -> str:  # noqa: F811
    return (world.made["words"] / "DONE").read_text().strip()
