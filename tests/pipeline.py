"""A small world for tests of commands, recipes and runs: sources, a recipe over them, and its finished runs, made once."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tutelage.cli import main

ANIMALS = ("cat", "dog", "horse", "owl", "fox", "hen", "goat", "mouse", "swan", "bee")
PLACES = ("mat", "door", "hill", "barn", "river", "field", "tower", "bridge")
TRAIN = {
    "sequence_length": 128, "batch_tokens": 512, "steps": 2, "evaluate_rows": 2, "threads": 1, "kernels": False,
}  # fmt: skip
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
         "intermediate_size": 48}  # fmt: skip


def write_sources(folder: Path) -> None:
    """`texts/*.txt` (40 documents) and `chats.jsonl` (80 conversations)."""
    (folder / "texts").mkdir(parents=True)
    for i, (animal, place) in enumerate((a, p) for a in ANIMALS for p in PLACES[:4]):
        lines = [f"Day {i}, hour {h}: the {animal} number {i * 7 + h} sat by the {place} and counted {h * i}." for h in range(5)]
        (folder / "texts" / f"{i:02d}.txt").write_text("\n".join(lines), encoding="utf-8")
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as f:
        for i, (animal, place) in enumerate((a, p) for a in ANIMALS for p in PLACES):
            asked, said = f"Where is {animal} {i}?", f"The {animal} {i} is by the {place}."
            row = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            f.write(json.dumps({"messages": row}) + "\n")


def recipe_of(folder: Path) -> dict[str, Any]:
    """A recipe of every kind of stage but the report over the sources in `folder`."""
    return {
        "name": "small",
        "scales": {"smoke": {"base.steps": 1, "chat.steps": 1}},
        "stages": {
            "corpus": {"stage": "data", "sources": [str(folder / "texts")], "dedup": "exact", "validation_share": 0.2},
            "chats": {"stage": "data", "kind": "conversations", "sources": [str(folder / "chats.jsonl")], "dedup": "exact",
                      "validation_share": 0.2},
            "words": {"stage": "tokenizer", "data": "$corpus", "vocab_size": 300},
            "base": {"stage": "pretrain", "data": "$corpus", "tokenizer": "$words", "size": "20k", "architecture": dict(SHAPE),
                     **TRAIN},
            "chat": {"stage": "sft", "model": "$base", "data": "$chats", **TRAIN},
        },
    }  # fmt: skip


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")  # JSON is YAML
    return path


@dataclass(frozen=True)
class Said:
    """What a command did."""

    code: int
    out: str
    err: str


def tutelage(capsys: pytest.CaptureFixture[str], *arguments: object, columns: int = 300) -> Said:
    """Runs a command through the entry point of the console script, in this process."""
    capsys.readouterr()
    words = [str(a) for a in arguments]
    with mock.patch.object(sys, "argv", ["tutelage", *words]), mock.patch.dict(os.environ, {"COLUMNS": str(columns)}):
        try:
            main.main()
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    said = capsys.readouterr()
    return Said(code, said.out, said.err)


def spawn(*arguments: object, **how: Any) -> subprocess.Popen[str]:
    """The same command in a process of its own."""
    line = [sys.executable, "-m", "tutelage", *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), **how)


def environment() -> dict[str, str]:
    root = str(Path(__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": root, "COLUMNS": "300", "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@dataclass(frozen=True)
class World:
    """Sources, recipe and finished runs. Tests read it and do not change it."""

    folder: Path
    recipe: Path
    runs: Path
    made: dict[str, Path]  # name of a stage: its run directory


_worlds: list[World] = []


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    if not _worlds:  # a fixture that several modules import is built by each of them
        from tutelage import api

        folder = tmp_path_factory.mktemp("world")
        write_sources(folder)
        recipe = write_recipe(folder / "small.yaml", recipe_of(folder))
        made = api.run(recipe, runs=folder / "runs")
        _worlds.append(World(folder, recipe, folder / "runs", {name: run.path for name, run in made.items()}))
    return _worlds[0]
