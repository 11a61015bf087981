"""Records about answers and tiny runs of the stages that learn from them."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

from tests.guarantees import tiny
from tutelage import api
from tutelage.rundir import RunDir

RATES = {"lr": 1e-2, "matrix_lr": 1e-2, "embedding_lr": 1e-2}
GAMES = Path(__file__).parents[1] / "rollout" / "games.py"
COMMON = {"threads": 1, "device": "cpu", "optimizer": RATES, "checkpoint_every": 2, "evaluate_every": 2, "max_length": 96}


@functools.cache
def preferences() -> Path:
    """40 questions whose better answer names an animal."""
    rng = random.Random(0)
    rows = [
        {"question": f"Which one, {i}?", "chosen": f"The {rng.choice(('cat', 'dog', 'owl'))}, {i}.",
         "rejected": f"The {rng.choice(('mat', 'door', 'hill'))}, {i}."}
        for i in range(40)
    ]  # fmt: skip
    return _made("preferences", rows)


@functools.cache
def prompts() -> Path:
    """40 questions with an expected answer."""
    return _made("prompts", [{"question": f"Say a letter, {i}.", "answer": "e"} for i in range(40)])


def _made(kind: str, rows: list[dict[str, Any]]) -> Path:
    file = tiny.home() / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return api.data(sources=[str(file)], kind=kind, dedup="exact", validation_share=0.2, runs=tiny.home() / kind).path


STAGES: dict[str, dict[str, Any]] = {
    "preference": {"steps": 6, "batch": 4, "method": "dpo", "micro_tokens": 128},
    "grpo": {"stage": "rl", "steps": 6, "batch": 4, "samples": 4, "max_tokens": 8, "probes": 4, "micro_tokens": 128,
             "rewards": {"letters": {"kind": "regex", "pattern": "(?s).*[aeiou].*"}, "short": {"kind": "length", "maximum": 6}}},
}  # fmt: skip
STAGES["ppo"] = {**STAGES["grpo"], "method": "ppo", "updates": 2, "minibatches": 2, "kl": 0.05, "kl_in": "reward"}
STAGES["reused"] = {**STAGES["grpo"], "method": "dapo", "updates": 3, "zero_variance": "resample", "kl": 0.02, "old": "trainer"}
STAGES["episodes"] = {**STAGES["grpo"], "environment": f"{GAMES}:Dice", "max_rounds": 3, "rewards": {"environment": 1}}


def settings(name: str, **change: Any) -> dict[str, Any]:
    """The settings of a tiny stage, its inputs included."""
    own = dict(STAGES[name])
    data = preferences() if own.get("stage", name) == "preference" else prompts()
    return {"model": str(tiny.checkpoint()), "data": str(data), **COMMON, **own, **change}


def run(name: str, runs: Path, **change: Any) -> RunDir:
    values = settings(name, **change)
    return api.stage(values.pop("stage", name), runs=runs, **values)


def start(
    name: str, runs: Path, die: dict[str, Any] | None = None, env: dict[str, str] | None = None, **change: Any
) -> tiny.Process:
    """The same in a process of its own, which `die` may kill."""
    values = settings(name, **change)
    stage = values.pop("stage", name)
    line = [stage, "--runs", str(runs), *(x for k, v in values.items() for x in ("--set", f"{k}={_text(v)}"))]
    return tiny.Process({"argv": line, "die": die or {}, "env": env or {}})


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def folder(name: str, runs: Path) -> Path:
    return tiny.run_folder(runs, STAGES[name].get("stage", name))
