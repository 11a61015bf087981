"""Shows rollouts: prompts, the answers of each group, and their rewards."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

from rich.table import Column, Table
from rich.text import Text

from tutelage import log
from tutelage.cli.show import out, run_of
from tutelage.errors import ArtifactError
from tutelage.records import Conversation, Message, Prompt, Rollout, read_records


def show_rollouts(reference: str, root: Path, step: int | None = None, limit: int = 5) -> None:
    """Prints the groups of one iteration. Raises `ArtifactError` for a run without rollouts, or without those of `step`."""
    folder = run_of(reference, root) / "rollouts"
    files = {int(f.stem.split(".")[0].removeprefix("step_")): f for f in sorted(folder.glob("step_*.jsonl"))}
    if not files:
        raise ArtifactError("this run made no rollouts", file=folder, fix="look at a run of `tutelage rl` or `tutelage sample`")
    chosen = max(files) if step is None else step
    if chosen not in files:
        raise ArtifactError(
            "no rollouts of this step", file=folder, found=chosen, expected=f"one of: {', '.join(map(str, list(files)[:12]))}, …"
        )
    rollouts = list(read_records(files[chosen], Rollout))  # answers may hold what `splitlines` takes for the end of a line
    questions = _prompts(folder.parent)
    console = out()
    for shown, (prompt, group) in enumerate(groupby(rollouts, key=lambda r: r.prompt)):
        if shown == limit:
            break
        console.print(_group(questions.get(prompt, prompt), list(group)))
    rewards = [r.reward for r in rollouts if r.reward is not None]
    log.say(
        f"step {chosen}: {len(rollouts)} answers to {len({r.prompt for r in rollouts})} prompts, "
        f"mean reward {sum(rewards) / max(1, len(rewards)):.3f}; steps: {', '.join(map(str, list(files)[:20]))}"
    )


def _group(question: str, group: list[Rollout]) -> Table:
    first = group[0]
    title = question if first.answer is None else f"{question}  [expected: {first.answer[:60]}]"
    names = list(first.terms)
    head = [Column(n, justify="right") for n in ("reward", *(names if len(names) > 1 else ()), "advantage", "tokens")]
    table = Table(*head, Column("answer", overflow="fold"), title=Text(title), title_justify="left")
    for r in group:
        terms = [f"{r.terms[n]:.2f}" for n in names] if len(names) > 1 else []
        worth = "" if r.advantage is None else f"{r.advantage:+.2f}"
        said = " | ".join(f"{m.role}: {m.content}" for m in r.messages) if len(r.messages) > 1 else r.text
        why = "" if r.used else f"  (left out: {r.meta.get('left_out')})"
        cut = "…" if r.finish_reason == "length" else ""
        reward = "" if r.reward is None else f"{r.reward:.2f}"
        table.add_row(*map(Text, (reward, *terms, worth, str(sum(r.mask)), said + cut + why)))
    return table


def _prompts(run: Path) -> dict[str, str]:
    """The last words of each prompt of the run's data, where that is still there."""
    parents = json.loads((run / "run.json").read_text(encoding="utf-8"))["parents"]
    data = next((run / p["path"] for p in parents if p["name"] == "data"), None)
    if data is None or not (data / "records" / "schema.json").exists():
        return {}
    kind = json.loads((data / "records" / "schema.json").read_text(encoding="utf-8"))["type"]
    found: dict[str, str] = {}
    for part in ("train", "validation"):
        file = data / "records" / f"{part}.jsonl"
        prompts = read_records(file, Prompt) if kind == "Prompt" else (Prompt.of(c) for c in read_records(file, Conversation))
        found |= {p.id: _last(p.messages) for p in prompts}
    return found


def _last(messages: tuple[Message, ...]) -> str:
    return messages[-1].content
