"""Every recipe that ships is planned and run small."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from tests.pipeline import World, inside, tutelage, world  # noqa: F401 (a fixture)
from tutelage.files import read_json
from tutelage.recipe import load_recipe
from tutelage.stages import STAGES

RECIPES = Path(__file__).parent.parent / "recipes"


def settings(name: str, here: World) -> list[str]:
    """What a user has to give: their files, their model."""
    texts, chats, model = here.folder / "texts", here.folder / "chats.jsonl", here.made["base"] / "model"
    return {
        "quickstart": [],
        "adapt": [],
        "classifier": [],
        "translate": [],
        "pretrain_folder": [f"corpus.sources={texts}"],
        "continue_pretraining": [f"corpus.sources=[{texts}]", f"adapted.model={model}", f"before.model={model}"],
        "expert_iteration": [f"{name}.model={here.made['chat'] / 'model'}" for name in ("before", "answers_1", "round_1")],
        "dpo": [f"chat.model={model}"],
        "rlhf": [f"chat.model={model}"],
        "qlora": [f"adapter.model={model}"],
        "grpo-maths": [f"taught.model={model}"],
        "sft_jsonl": [f"chats.sources={chats}", f"chat.model={model}"],
    }[name]


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_recipe(recipe: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """A recipe in the README that fails in a newcomer's first minute, or whose plan and run disagree."""
    given = [word for text in settings(recipe.stem, world) for word in ("--set", text)]
    with inside(tmp_path):
        planned = tutelage(capsys, "run", recipe, *given, "--set", "scale=smoke", "--dry-run")
        assert planned.code == 0, planned.err
        assert not Path("runs").exists() and "plan of" in planned.err
        done = tutelage(capsys, "run", recipe, *given, "--set", "scale=smoke")
        assert done.code == 0, done.err[-3000:]
        made = {p.parent.name.rsplit("-", 1)[0]: p.parent for p in (tmp_path / "runs" / recipe.stem).glob("*/run.json")}
        assert all(read_json(folder / "run.json")["status"] == "done" for folder in made.values())
        assert (made["report"] / "report" / "report.html").stat().st_size > 10_000 and "report.html" in done.err
        for folder in made.values():
            if (folder / "model").exists():
                with safe_open(folder / "model" / "model.safetensors", "np") as weights:
                    assert weights.keys()
        again = tutelage(capsys, "run", recipe, *given, "--set", "scale=smoke", "--dry-run")
        assert again.code == 0 and "run after" not in again.err and again.err.count(" hit ") == len(plan_of(recipe))


def plan_of(recipe: Path) -> list[str]:
    return list(load_recipe(recipe, STAGES, []).stages)


def test_full_scale_is_planned(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Settings that only the small scale has tried; a plan without time and memory."""
    for recipe in sorted(RECIPES.glob("*.yaml")):
        given = [word for text in settings(recipe.stem, world) for word in ("--set", text)]
        with inside(tmp_path):
            said = tutelage(capsys, "run", recipe, *given, "--dry-run")
        assert said.code == 0, said.err
        table = said.err.split("in all ")[0]  # the derivations of each training come after it
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
        assert len(rows) == len(plan_of(recipe)) and all(all(row) for row in rows) and "in all " in said.err
    assert not (tmp_path / "runs").exists()


def test_every_setting_of_a_scale_is_one_of_its_recipe() -> None:
    """A `smoke` scale that some recipe lacks: nothing would run it."""
    for recipe in RECIPES.glob("*.yaml"):
        assert load_recipe(recipe, STAGES, [("scale", "smoke")]).name == recipe.stem
