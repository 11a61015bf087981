"""What the command line shows of plans, runs and lineage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.tree import Tree

from tutelage import log
from tutelage.recipe import Planned, Runner, lineage
from tutelage.rundir import RunDir, all_runs, find, held


def show_plan(plan: list[Planned], runner: Runner) -> None:
    """The table of a plan: stage, hit or miss, where, time and memory with their derivation."""
    table = Table("stage", "kind", "status", "time", "memory", title=f"plan of {runner.recipe}", title_justify="left")
    notes = []
    for item in plan:
        seconds = memory = ""
        if item.estimate is not None:
            seconds = f"{clock(item.estimate.seconds[0])} - {clock(item.estimate.seconds[1])}"
            memory = f"{size(item.estimate.memory_bytes[0])} - {size(item.estimate.memory_bytes[1])}"
            notes.append(f"{item.name}: {item.estimate.because}")
        status = "run (forced)" if runner.force and item.status == "hit" else item.status
        table.add_row(item.name, item.kind, status, seconds, memory)
    log.console.print(table)
    for note in notes:
        log.say(note, style="dim")


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


def show_runs(root: Path) -> None:
    """The table of all runs below a folder."""
    table = Table("run", "stage", "status", "started", "time", "result")
    for path, row in all_runs(root):
        status = row["status"]
        if status == "running" and not held(path):
            status = "killed (resumes)"
        table.add_row(
            str(path), row["stage"], status, str(row["started"])[:16].replace("T", " "), clock(row["seconds"]), headline(row)
        )
    log.console.print(table)


def headline(row: dict[str, Any]) -> str:
    """The one number that matters of a run."""
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
    return str(row.get("error", ""))[:60]


def show_run(reference: str, root: Path) -> None:
    """Draws the chain from data to a run, then its own numbers."""
    path = Path(reference)
    if not (path / "run.json").exists():
        path = find(reference, "run", root).path
    rows = lineage(path)
    tree = Tree(_node("", *rows[0][2:]))
    branches = {0: tree}
    for depth, name, folder, row in rows[1:]:
        branches[depth] = branches[depth - 1].add(_node(name, folder, row))
    log.console.print(tree)
    known = {"parents", "versions", "machine", "artifact", "command"}
    table = Table(show_header=False)
    for key, value in rows[0][3].items():
        if key not in known and not isinstance(value, dict | list):
            table.add_row(key, str(value))
    log.console.print(table)


def _node(name: str, folder: Path, row: dict[str, Any]) -> str:
    label = f"{name}: " if name else ""
    return f"{label}[bold]{row['stage']}[/bold] {folder}  {row['status']}  {str(row['digest'])[:12]}  {headline(row)}"


def show_next(finished: dict[str, RunDir]) -> None:
    """What to do with what a recipe made."""
    models = [(n, r) for n, r in finished.items() if (r.path / "model").exists()]
    reports = [r for r in finished.values() if (r.path / "report").exists()]
    if reports:
        log.say(f"\nreport: {reports[-1].path / 'report' / 'report.html'}", style="bold")
    if models:
        name, run = models[-1]
        reference = f"{run.recipe}/{name}"
        log.say(f"talk:   tutelage chat {reference}", style="bold")
        log.say(f"serve:  tutelage serve {reference}", style="bold")
