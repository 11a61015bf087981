"""Tables of plans, runs and lineage."""

from __future__ import annotations

import fnmatch
import os
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree

from tutelage import log
from tutelage.config.base import Section, nearest
from tutelage.errors import ConfigError
from tutelage.files import read_json
from tutelage.plan.time import NOTHING
from tutelage.recipe import Estimate, Planned, Runner, Unknown
from tutelage.references import find, matching
from tutelage.rundir import RunDir, all_runs, finished, held, lineage


def show_plan(plan: list[Planned], runner: Runner) -> None:
    """Prints the plan: stage, hit or miss, time and memory with their sums; then where each run is, and the formulas."""
    table = Table("stage", "kind", "status", "time", "memory", title=f"plan of {runner.recipe}", title_justify="left")
    notes = []
    for item in plan:
        status = "run (forced)" if runner.force and item.status == "hit" else item.status
        table.add_row(*map(Text, (item.name, item.kind, status, *_expected(item.estimate, resumes=item.status == "resume"))))
        if isinstance(item.estimate, Estimate):
            rest = ", less what an earlier attempt has done" if item.status == "resume" else ""
            notes.append(f"{item.name}: {item.estimate.because}{rest}; memory {item.estimate.room}")
        if item.run is not None:
            notes.append(f"{item.name}: {item.run.path}")
    if log.rank() == 0:
        log.console.print(table)
    if len(plan) > 1:
        log.say(_total(plan))
    for note in notes:
        log.say(note, style="dim")


def show_stage_plan(planned: Planned, runner: Runner) -> None:
    """The plan of a single stage: what it does, its row of the plan, and every setting."""
    planned.estimate = runner.estimate(planned)
    log.say(runner.table[planned.kind].help, style="bold")
    show_plan([planned], runner)
    show_derivations([planned])
    show_config(planned.config)


def show_derivations(plan: list[Planned]) -> None:
    """The derived numbers of every training stage that has still to run, each with its reason."""
    from tutelage.preflight.derivations import derivation

    if log.rank() != 0:
        return
    for item in plan:
        found = None if item.status == "hit" else derivation(item)
        if isinstance(found, Unknown):
            log.say(f"{item.name}: derived numbers {found}")
        elif found is not None:
            table = Table("name", "value", "because", title=f"{item.name}: derived (* given)", title_justify="left")
            for row in found:
                table.add_row(*map(Text, row))
            log.console.print(table)


def _expected(estimate: Estimate | Unknown | None, resumes: bool = False) -> tuple[str, str]:
    """Time and memory of a stage, for people. If it `resumes`, an earlier attempt has done some of the work."""
    if isinstance(estimate, Unknown):
        return str(estimate), str(estimate)
    if estimate is None:
        return clock(0), size(0)
    seconds, memory = estimate.seconds, estimate.memory_bytes
    time = f"at most {clock(seconds.high)}" if resumes else f"{clock(seconds.low)} - {clock(seconds.high)}"
    return time, f"{size(memory.low)} - {size(memory.high)}"


def _total(plan: list[Planned]) -> str:
    """The sum of the times, the largest memory, and the stages that are in neither."""
    known = [item.estimate for item in plan if isinstance(item.estimate, Estimate)]
    seconds = sum((e.seconds for e in known), NOTHING)
    low, high = (max((getattr(e.memory_bytes, end) for e in known), default=0) for end in ("low", "high"))
    waiting = [item.name for item in plan if isinstance(item.estimate, Unknown)]
    if not known and not waiting:
        return "nothing to do: every stage is there"
    rest = f"; + what is not known yet: {', '.join(waiting)}" if waiting else ""
    return f"in all {clock(seconds.low)} - {clock(seconds.high)}, at most {size(low)} - {size(high)} at a time{rest}"


def show_config(config: Section) -> None:
    """Every setting of a stage as it would be used, in YAML on stdout."""
    print(yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True), end="")


def out() -> Console:
    """Console for requested tables: stdout, and as wide as needed in a pipe."""
    return Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 10_000)


def clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


STATES = ("done", "failed", "interrupted", "killed", "running", "damaged", "lost")


def chosen_runs(root: Path, like: str | None, stage: str | None, status: str | None) -> list[tuple[Path, dict[str, Any]]]:
    """The runs below a folder that fit, oldest first. `like`: a part of `recipe/stage-digest`, also with *; or a run directory.
    Raises `ConfigError` for an unknown status."""
    if status is not None and status not in STATES:
        near = nearest(status, list(STATES))
        raise ConfigError(
            "no run has this status", field="status", found=status, expected=f"one of: {', '.join(STATES)}",
            fix=f"did you mean `{near}`?" if near else "look at the column of `tutelage runs`",
        )  # fmt: skip
    return [
        (path, row)
        for path, row in all_runs(root)
        if (like is None or _is_like(path, like))
        and (stage is None or row["stage"] == stage)
        and (status is None or status_of(path, row).partition(" ")[0] == status)
    ]


def _is_like(path: Path, like: str) -> bool:
    name = f"{path.parent.name}/{path.name}"
    return fnmatch.fnmatchcase(name, f"*{like}*") or (Path(like).is_dir() and Path(like).resolve() == path.resolve())


def show_runs(rows: list[tuple[Path, dict[str, Any]]], root: Path) -> None:
    """The table of runs."""
    if not rows:
        log.say(f"no such runs in {root}" if all_runs(root) else f"no runs in {root}")
        return
    table = Table(Column("run", overflow="fold"), "stage", "status", "started", "time", "result")
    for path, row in rows:
        started = str(row.get("started") or "")[:16].replace("T", " ")
        table.add_row(
            *map(Text, (str(path), row["stage"], status_of(path, row), started, clock(spent(path, row)), headline(row)))
        )
    out().print(table)


def status_of(path: Path, row: dict[str, Any]) -> str:
    """The status in run.json, corrected for a run whose process is gone."""
    made = (row.get("artifact") or {}).get("path")
    if row["status"] == "done" and not finished(path):  # a removal, or an attempt with --force, was cut short
        return "killed (resumes)"
    if row["status"] == "done" and made and not (path / made).is_dir():
        return f"lost its {made} (is made again)"
    if row["status"] == "running" and not held(path):
        return "killed (resumes)"
    return "interrupted (resumes)" if row["status"] == "interrupted" else str(row["status"])


def spent(path: Path, row: dict[str, Any]) -> float:
    """Seconds of all attempts, including one that is running."""
    going = row["status"] == "running" and held(path)
    since = time.time() - datetime.fromisoformat(row["started"]).timestamp() if going else 0.0
    return float(row.get("seconds") or 0.0) + max(0.0, since)


def headline(row: dict[str, Any]) -> str:
    """The one number that matters of a run."""
    from tutelage.evaluate.intervals import said

    gain = row.get("held_out_gain")
    if isinstance(gain, dict):  # of rewards
        before, after = (row[f"held_out_{when}"]["value"] for when in ("before", "after"))
        return f"held-out reward {before:.3f} to {after:.3f}, gain {said(gain)}"
    if row["stage"] == "evaluate" and isinstance(row.get("model"), str):
        return evaluated(row)
    found = row.get("held_out")
    if isinstance(found, dict) and isinstance(found.get("accuracy"), dict):  # of a reward model
        return f"held-out accuracy {said(found['accuracy'])}"
    if isinstance(row.get("splits"), dict):  # of shards of tokens
        return f"{sum(int(split['tokens']) for split in row['splits'].values()):,} tokens"
    if row["stage"] == "report" and isinstance(row.get("bytes"), int):
        return str(row.get("verdict") or f"a page of {size(row['bytes'])}")
    if row["stage"] == "merge" and isinstance(row.get("logit_difference"), float):
        return f"a whole model, logits within {row['logit_difference']:.1g} of the adapted one's"
    for key, text in (
        ("bits_per_byte", "{:.3f} bits per byte"),
        ("validation_loss", "validation loss {:.3f}"),
        ("loss", "loss {:.3f}"),
        ("bytes_per_token", "{:.2f} bytes per token"),
        ("tokens", "{:,} tokens"),
        ("records", "{:,} records"),
    ):
        if isinstance(row.get(key), int | float):
            return text.format(row[key])
    return str(row.get("error") or "").partition("\n")[0][:60]


def evaluated(row: dict[str, Any]) -> str:
    """The figures of an evaluation with their model and data.

    Example: `chat-1a2b: 1.462 bits per byte (1.384 to 1.549), perplexity 23.1 (21.0 to 25.3) on corpus-3c4d; 11.4% fewer bits
    than xz -9e after the training text`.
    """
    from tutelage.evaluate.intervals import said

    parts = []
    if isinstance(row.get("bits_per_byte"), dict):
        figures = f"{said(row['bits_per_byte'], '.3f', 'bits per byte')}, perplexity {said(row['perplexity'], '.1f')}"
        parts.append(f"{figures} on {row.get('documents')}")
    if isinstance(row.get("saving"), dict):
        saving = row["saving"]
        clear = saving["low"] > 0 or saving["high"] < 0
        more = "more" if saving["value"] < 0 else "fewer"
        than = f"{abs(saving['value']):.1%} {more} bits than" if clear else "no clear difference from"
        parts.append(f"{than} {row['baseline']}")
    if row.get("correct"):
        shares = ", ".join(f"{task} {said(share, '.1%')}" for task, share in list(row["correct"].items())[:4])
        parts.append(f"{shares} right on {row.get('questions')}")
    against = (row.get("comparison") or {}).get("questions")
    if against:
        points = {key: 100 * against[-1]["difference"][key] for key in ("value", "low", "high")}
        found = f"{points['value']:+.1f} points ({points['low']:+.1f} to {points['high']:+.1f})"
        parts.append(f"{against[-1]['task']} {found} against {row['comparison']['reference']}")
    return f"{row['model']}: {'; '.join(parts)}"


def show_run(reference: str, root: Path) -> None:
    """Draws the chain from data to a run, then its own numbers."""
    rows = lineage(run_of(reference, root))
    tree = Tree(_node("", *rows[0][2:]))
    branches, seen = {0: tree}, {rows[0][2].resolve()}
    for depth, name, folder, row in rows[1:]:
        label = _node(name, folder, row)
        if folder.resolve() in seen and row["parents"]:
            label.append("  (its chain is above)", style="dim")
        seen.add(folder.resolve())
        branches[depth] = branches[depth - 1].add(label)
    console = out()
    console.print(tree)
    table = Table(show_header=False)
    for key, value in _facts(rows[0][3]):
        table.add_row(key.replace("_", " "), Text(status_of(rows[0][2], rows[0][3]) if key == "status" else figure(key, value)))
    console.print(table)


def _facts(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The facts of run.json that one line can show; of several estimates under one key (`correct`, by task), each."""
    for key, value in row.items():
        if key in NOT_SHOWN or value is None or isinstance(value, list):
            continue
        if not isinstance(value, dict) or is_estimate(value):
            yield key, value
        elif value and all(map(is_estimate, value.values())):
            yield from ((f"{key} {name}", one) for name, one in value.items())


def is_estimate(value: Any) -> bool:
    """Whether a fact is a number with its interval."""
    return isinstance(value, dict) and {"value", "low", "high", "method"} <= value.keys()


NOT_SHOWN = ("parents", "versions", "machine", "artifact", "command")


def figure(key: str, value: Any) -> str:
    """A fact of run.json for people, with its unit.

    Example:
        >>> figure("train_seconds", 754.2), figure("loss", 2.718281828), figure("tokens", 1048576)
        ('13 min', '2.718', '1,048,576')
    """
    if is_estimate(value):
        from tutelage.evaluate.intervals import said

        return said(value, ".4g")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if key == "seconds" or key.endswith("_seconds"):
        return f"{value:.2g} s" if value < 10 else clock(value)
    if key == "bytes" or key.endswith("_bytes"):
        return size(value)
    if key == "mfu":
        return f"{value:.1%}"
    if key == "seed":
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def run_of(reference: str, root: Path) -> Path:
    """The run directory of a path or of recipe/stage, finished or not. Raises `ArtifactError`."""
    path = Path(reference)
    if not (path / "run.json").exists():
        path = next(iter(reversed(matching(reference, root, "run.json"))), path)
    return path if (path / "run.json").exists() else find(reference, "run", root).path


def _node(name: str, folder: Path, row: dict[str, Any]) -> Text:
    label = Text(f"{name}: " if name else "", overflow="fold")
    label.append(row["stage"], style="bold")
    label.append(f" {_short(folder)}  {row['status']}  {str(row['digest'])[:12]}  {headline(row)}")
    return label


def _short(path: Path) -> str:
    """A path below the current folder as a person would type it."""
    here = Path.cwd()
    return str(path.resolve().relative_to(here)) if path.resolve().is_relative_to(here) else str(path)


def show_next(made: dict[str, RunDir]) -> None:
    """Prints what to do next with the results of a recipe."""
    models = [(n, r) for n, r in made.items() if (r.path / "model").exists() and _talks(r.path / "model" / "config.json")]
    reports = [r for r in made.values() if (r.path / "report").exists()]
    if reports:
        log.say(f"\nreport: {reports[-1].path / 'report' / 'report.html'}", style="bold")
    if models:
        name, run = models[-1]
        reference = f"{run.recipe}/{name}" + ("" if run.root == Path("runs") else f" --runs {run.root}")
        log.say(f"talk:   tutelage chat {reference}", style="bold")
        log.say(f"serve:  tutelage serve {reference}", style="bold")


def _talks(config: Path) -> bool:
    """Whether a model can be talked to: neither a classifier nor a translator can."""
    others = ("Classification", "ConditionalGeneration")
    return not any(str(name).endswith(others) for name in read_json(config).get("architectures") or ())
