"""What the report knows: a run, everything it came from, and the evaluation of it, read from run directories alone.

Everything is optional: a file that is missing or cannot be read leaves its section out, with the reason in `left_out`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tutelage.errors import ArtifactError
from tutelage.files import read_json
from tutelage.plan.energy import energy as estimated

HISTOGRAM_BYTES = 64_000_000  # above this, document lengths come from the card's quantiles alone
ROLES = {
    "records": "data",
    "tokenizer": "tokenizer",
    "tokens": "tokens",
    "model": "model",
    "scores": "evaluation",
    "report": "report",
}


@dataclass(slots=True)
class Node:
    """One run of the chain."""

    path: Path
    facts: dict[str, Any]  # run.json
    parents: list[dict[str, Any]] = field(default_factory=list)  # {"name", "kind", "path", "digest", "run": folder name or None}
    config: str = ""  # config.yaml as it is
    metrics: list[dict[str, Any]] = field(default_factory=list)

    @property
    def stage(self) -> str:
        return str(self.facts.get("stage", "?"))

    @property
    def name(self) -> str:
        return str(self.facts.get("name") or self.stage)

    @property
    def kind(self) -> str:
        artifact = self.facts.get("artifact")
        return str(artifact.get("kind", "")) if isinstance(artifact, dict) else ""

    @property
    def seconds(self) -> float:
        return number(self.facts.get("seconds")) or 0.0


@dataclass(slots=True)
class Story:
    """The chain of one run, parents before children, and what was found beside it."""

    run: Node
    chain: list[Node]
    scores: dict[str, Any] | None = None
    gallery: dict[str, Any] | None = None
    gains: list[tuple[str, dict[str, Any]]] = field(
        default_factory=list
    )  # model, what an evaluation says was gained since another
    left_out: list[tuple[str, str]] = field(default_factory=list)  # section, reason

    def training(self) -> list[Node]:
        return [n for n in self.chain if any("loss" in row for row in n.metrics)]


def read_story(run: Path, scores: Sequence[Path] = ()) -> Story:
    """The story of a run directory. `scores` are folders of evaluations (scores.json), each section from the first that has it;
    without any the newest finished one in the chain, or beside the run, whose parents lie in the chain. Raises `ArtifactError`
    where there is no run.json."""
    if not (run / "run.json").exists():
        raise ArtifactError("not a run directory: it has no run.json", file=run, fix="give a folder that `tutelage runs` lists")
    left_out: list[tuple[str, str]] = []
    chain: list[Node] = []
    _walk(run.resolve(), chain, set(), left_out)
    story = Story(chain[-1], chain, left_out=left_out)
    found, story.gains = _find_scores(story), _find_gains(story, scores)
    folders = list(scores) or ([found] if found else [])
    if not folders:
        left_out.append(("Scores", "no finished evaluation of this run was found: `tutelage evaluate` makes one"))
    for folder in folders:
        story.scores = _joined(story.scores, _optional_json(folder / "scores.json", "Scores", left_out))
        story.gallery = _joined(story.gallery, _optional_json(folder / "gallery.json", "What it says", left_out))
    return story


def _joined(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
    """Two evaluations as one: what the first lacks or has empty comes from the second."""
    if first is None or second is None:
        return first or second
    return {**second, **{k: v for k, v in first.items() if v}}


def _walk(path: Path, chain: list[Node], seen: set[Path], left_out: list[tuple[str, str]]) -> None:
    """Adds the run and what it came from, parents first."""
    seen.add(path)
    facts = _optional_json(path / "run.json", "Lineage", left_out)
    if facts is None:
        facts = {"stage": path.name}
    node = Node(path, facts)
    for parent in facts.get("parents") or []:
        target = Path(os.path.normpath(path / str(parent.get("path", ""))))
        known = (target / "run.json").exists()
        node.parents.append({**parent, "run": target.name if known else None})
        if known and target not in seen:
            _walk(target, chain, seen, left_out)
        elif not known:
            left_out.append(
                ("Lineage", f"{node.name} came from {parent.get('name')} at {target.name}, which is not a run directory")
            )
    if (path / "config.yaml").exists():
        node.config = (path / "config.yaml").read_text(encoding="utf-8", errors="replace")
    node.metrics = read_metrics(path / "metrics.jsonl")
    chain.append(node)


def _find_scores(story: Story) -> Path | None:
    """The evaluation nearest to the run: itself, an ancestor, or a run beside it that measured one of the chain's models."""
    for node in reversed(story.chain):
        if (node.path / "scores" / "scores.json").exists():
            return node.path / "scores"
    paths = [n.path for n in story.chain]
    candidates = sorted(story.run.path.parent.glob("*/scores/scores.json"), key=lambda p: p.stat().st_mtime)
    best: tuple[int, Path] | None = None
    for file in candidates:
        target = _measured(file)
        if target in paths and (best is None or paths.index(target) >= best[0]):
            best = (paths.index(target), file.parent)
    return best[1] if best else None


def _measured(scores: Path) -> Path | None:
    """The run whose model an evaluation is of."""
    facts = _quiet_json(scores.parent.parent / "run.json") or {}
    models = [p for p in facts.get("parents") or [] if p.get("kind") == "model"]
    return Path(os.path.normpath(scores.parent.parent / str(models[0].get("path", "")))) if models else None


def _find_gains(story: Story, given: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    """(model, gains) of the evaluations given or beside the run that measured a model of its chain and name one from before, the
    newest of each pair of models, in the chain's order."""
    places = {node.path: i for i, node in enumerate(story.chain)}
    found: dict[tuple[int, str], dict[str, Any]] = {}
    files = [
        *story.run.path.parent.glob("*/scores/scores.json"),
        *(f / "scores.json" for f in given if (f / "scores.json").exists()),
    ]
    for file in sorted({p.resolve() for p in files}, key=lambda p: p.stat().st_mtime):
        target = _measured(file)
        row = (_quiet_json(file) or {}).get("gains")
        if target in places and isinstance(row, dict):
            found[places[target], str(row.get("model"))] = row
    return [(story.chain[place].name, row) for (place, _), row in sorted(found.items(), key=lambda item: item[0])]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl with their finite numbers; a line cut short by a kill is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append({k: v for k, v in row.items() if number(v) is not None})
    return rows


def column(node: Node, key: str) -> tuple[list[float], list[float]]:
    """(tokens, value) of every row that has `key`; a row without `tokens` takes those of its step."""
    by_step = {row["step"]: row["tokens"] for row in node.metrics if "step" in row and "tokens" in row}
    pairs = [(row.get("tokens", by_step.get(row.get("step"))), row[key]) for row in node.metrics if key in row]
    kept = [(float(x), float(y)) for x, y in pairs if x is not None]
    return [x for x, _ in kept], [y for _, y in kept]


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def card(node: Node) -> dict[str, Any] | None:
    return _quiet_json(node.path / "records" / "card.json")


def length_histogram(node: Node, bins: int = 28) -> list[dict[str, float]] | None:
    """Training records per length bin, equal on a log scale: `{"low", "high", "count"}`, in characters; None for large data."""
    file = node.path / "records" / "train.jsonl"
    if not file.exists() or file.stat().st_size > HISTOGRAM_BYTES:
        return None
    lengths = []
    with file.open(encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            lengths.append(len(row["text"]) if "text" in row else sum(len(m.get("content", "")) for m in row.get("messages", [])))
    if not lengths or max(lengths) < 1:
        return None
    logs = np.log10(np.maximum(lengths, 1))
    low, high = float(logs.min()), float(logs.max())
    counts, edges = np.histogram(logs, bins=bins, range=(low, high if high > low else low + 1))
    return [{"low": 10**a, "high": 10**b, "count": int(c)} for a, b, c in zip(edges[:-1], edges[1:], counts, strict=True)]


def training_samples(node: Node, most: int = 5) -> list[dict[str, Any]]:
    """The first prompt's continuation at up to `most` evenly spread steps: `{"step", "prompt", "text"}`."""
    files = sorted((node.path / "samples").glob("step_*.json"))
    chosen = files if len(files) <= most else [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)]
    out = []
    for file in chosen:
        rows = _quiet_json(file)
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            out.append({"step": int(file.stem.split("_")[1]), **{k: str(rows[0].get(k, "")) for k in ("prompt", "text")}})
    return out


def energy(node: Node) -> dict[str, Any]:
    """Watt-hours of a run: what it recorded (`energy` in run.json, of `plan.energy`), else the same count of its seconds here."""
    own = node.facts.get("energy")
    kwh = number(own.get("kwh")) if isinstance(own, dict) else None
    if isinstance(own, dict) and kwh is not None:
        watts, pue = number(own.get("watts")) or 0.0, number(own.get("pue")) or 1.0
        origin, because = own.get("origin", "estimated"), own.get("because", "no source given")
        how = f"{origin}: seconds x {watts:.3g} W x PUE {pue:g} / 3600 ({because})"
        return {"wh": kwh * 1000, "how": how}
    found = estimated(node.seconds, "CPU")
    how = f"estimated: seconds x {found.watts:.3g} W x PUE {found.pue:g} / 3600 ({found.because}), where a run recorded none"
    return {"wh": found.kwh * 1000, "how": how}


def stored_parameters(model: Path) -> float | None:
    """Numbers in the weights of a model folder, from the safetensors headers alone; a tied matrix is stored once."""
    total = 0
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as f:
            try:
                header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
                total += sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
            except (ValueError, KeyError, TypeError, OverflowError, MemoryError):
                return None
    return float(total) or None


def rates(node: Node) -> dict[str, float | None]:
    """What a training run reached: tokens, tokens/s, share of the machine's product rate, FLOPs, final losses."""
    steps = [row for row in node.metrics if "loss" in row]
    tokens = number(node.facts.get("tokens")) or (number(steps[-1].get("tokens")) if steps else None)
    speeds = [row["tokens_per_second"] for row in steps if "tokens_per_second" in row]
    shares = [row["mfu"] for row in steps if "mfu" in row]
    validation = [row["validation_loss"] for row in node.metrics if "validation_loss" in row]
    return {
        "tokens": tokens,
        "steps": float(len({row.get("step") for row in steps})) if steps else None,
        "tokens_per_second": float(np.median(speeds)) if speeds else None,
        "mfu": float(np.median(shares)) if shares else None,
        "flops": number(node.facts.get("flops")),
        "peak_memory_bytes": number(node.facts.get("peak_memory_bytes")),
        "loss": float(np.mean([row["loss"] for row in steps[-20:]])) if steps else None,
        "validation_loss": validation[-1] if validation else None,
    }


def plan_rows(node: Node) -> list[dict[str, Any]]:
    """Planned beside measured, for what the run recorded of both: `plan` in run.json and the fact of the same name."""
    plan = node.facts.get("plan")
    rows = []
    if isinstance(plan, dict):
        measured = {**rates(node), "seconds": node.seconds, **node.facts}
        for key, value in plan.items():
            planned, got = number(value), number(measured.get(key))
            if planned is not None and got is not None:
                rows.append({"what": key, "planned": planned, "measured": got})
    return rows


def config_rows(node: Node) -> dict[str, Any]:
    try:
        value = yaml.safe_load(node.config)
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def _quiet_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ArtifactError):
        return None


def _optional_json(path: Path, section: str, left_out: list[tuple[str, str]]) -> dict[str, Any] | None:
    value = _quiet_json(path)
    if isinstance(value, dict):
        return value
    reason = "is not valid JSON" if path.exists() else "does not exist"
    left_out.append((section, f"{path.parent.name}/{path.name} {reason}"))
    return None
