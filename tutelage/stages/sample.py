"""Stage `sample`: a model, prompts and rewards -> several answers to each prompt, judged. Nothing is trained."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tutelage import log
from tutelage.chat.render import Renderer
from tutelage.config.stages import Sample
from tutelage.errors import Setting
from tutelage.files import whole_file, whole_folder, write_json
from tutelage.models.adapters.virtual_tokens import max_text_tokens
from tutelage.models.open import load
from tutelage.records import SCHEMA_VERSION, Prompt, Rollout, dump_line
from tutelage.rollout.sampler import Sampler
from tutelage.rollout.source import Judging, read_rollouts
from tutelage.rundir import RunDir
from tutelage.setup import trainer
from tutelage.setup.sampling import prompts_of, reward_model_of, rubric_of, sampler_for, with_room
from tutelage.tokenizer.load import TokenizerFolder

TOGETHER = 64  # prompts in a file: what an interrupted run loses at most


def run(config: Sample, run: RunDir) -> dict[str, Any]:
    other = "train" if config.part == "validation" else "validation"
    fix = f"set {Setting('part', other)}, or make data with a {config.part} part (validation_share)"
    asked = prompts_of(run, config.part, fix)
    device = trainer.choose_device(config)
    model: Any = load(run.input("model"), device=device)
    words = TokenizerFolder.open(run.input("model"))
    length = min(max_text_tokens(model), 2048)
    sampler = sampler_for(model, Renderer(words), length, config.max_tokens, config.temperature)
    prompts = with_room(sampler, asked, config.part)
    prompts = prompts[: config.max_prompts or None]
    with rubric_of(config, words, reward_model_of(config, run, device)) as rubric:
        files = answer(config, run.folder("rollouts"), sampler, rubric, prompts)
    with whole_folder(run.folder("records")) as out:
        return write(out, files)


def answer(config: Sample, folder: Path, sampler: Sampler, judge: Judging, prompts: Sequence[Prompt]) -> list[Path]:
    """Files of judged rollouts, those made that were not there."""
    groups = [prompts[i : i + TOGETHER] for i in range(0, len(prompts), TOGETHER)]
    files = [folder / f"step_{number:06d}.jsonl" for number in range(len(groups))]
    missing = [(file, group) for file, group in zip(files, groups, strict=True) if not file.exists()]
    started, tokens = time.monotonic(), 0
    for file, group in log.counted(missing, f"{TOGETHER} prompts x {config.samples} answers"):
        made = [r for rows in sampler.answer(group, config.samples, seed=config.seed, step=0, version=0) for r in rows]
        tokens += sum(len(r.ids) for r in made)
        with whole_file(file) as f:
            f.writelines(dump_line(r) + "\n" for r in judged(made, judge))
    if missing:
        log.say(f"{tokens:,} tokens, {tokens / max(time.monotonic() - started, 1e-9):,.0f} a second")
    return files


def judged(rollouts: Sequence[Rollout], judge: Judging) -> list[Rollout]:
    return [
        replace(r, reward=v.reward, terms=dict(v.terms), meta={**r.meta, **({"notes": v.notes} if v.notes else {})})
        for r, v in zip(rollouts, judge.judge(rollouts), strict=True)
    ]


def write(out: Path, files: Sequence[Path]) -> dict[str, Any]:
    """The records artifact, and its facts."""
    sums = dict.fromkeys(("answers", "prompts", "reward", "best_reward", "cut", "tokens"), 0.0)
    size = 0
    with (out / "train.jsonl").open("w", encoding="utf-8") as f:
        for file in files:
            f.write(file.read_text(encoding="utf-8"))
            best: dict[str, float] = {}
            for r in read_rollouts(file):
                reward = r.reward or 0.0
                best[r.prompt] = max(best.get(r.prompt, reward), reward)
                sums["answers"] += 1
                sums["reward"] += reward
                sums["cut"] += r.finish_reason == "length"
                sums["tokens"] += len(r.ids)
                size += len(r.text.encode())
            sums["prompts"] += len(best)
            sums["best_reward"] += sum(best.values())
    n, m = max(1.0, sums["answers"]), max(1.0, sums["prompts"])
    facts = {
        "prompts": int(sums["prompts"]), "answers": int(sums["answers"]), "reward": sums["reward"] / n,
        "best_reward": sums["best_reward"] / m, "cut": int(sums["cut"]), "tokens": int(sums["tokens"]),
    }  # fmt: skip
    for name in ("validation", "rejected"):
        (out / f"{name}.jsonl").write_text("")
    nothing = {"records": 0, "bytes": 0}
    write_json(
        out / "card.json", {**facts, "parts": {"train": {"records": facts["answers"], "bytes": size}, "validation": nothing}}
    )
    write_json(out / "schema.json", {"type": "Rollout", "version": SCHEMA_VERSION})
    log.say(f"{facts['answers']:,} answers to {facts['prompts']:,} prompts: reward {facts['reward']:.3f} on average, "
            f"{facts['best_reward']:.3f} of the best of each prompt")  # fmt: skip
    return facts
