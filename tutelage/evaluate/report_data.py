"""What the report knows: a run, everything it came from, and the evaluations of its models, read from run directories alone.

Everything is optional: a file that is missing or cannot be read leaves its section out, with the reason in `left_out`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tutelage.errors import ArtifactError
from tutelage.evaluate.report_models import MODELS, Measured, measured_path, read_scores
from tutelage.files import read_json
from tutelage.plan.energy import energy as estimated

HISTOGRAM_BYTES = 64_000_000  # above this, document lengths come from the card's quantiles alone


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
    """The chain of one run, parents before children, and the evaluations of its models."""

    run: Node
    chain: list[Node]
    model: Measured | None = None  # the model that is handed over
    parents: list[Measured] = field(default_factory=list)  # the models that it was trained from, nearest first
    others: list[Measured] = field(default_factory=list)  # further models that were evaluated, such as a teacher
    left_out: list[tuple[str, str]] = field(default_factory=list)  # section, reason

    def training(self) -> list[Node]:
        return [n for n in self.chain if any("loss" in row for row in n.metrics)]

    def measured(self) -> list[Measured]:
        """All models with figures."""
        known = [*([self.model] if self.model else []), *self.parents, *self.others]
        return [m for m in known if m.documents or m.questions]


def read_story(run: Path, scores: Sequence[Path] = ()) -> Story:
    """The story of a run directory. `scores` are folders of evaluations that come before those in the same folder as the run; of
    these, the ones that measured a model of the chain are read, the newest first. Raises `ArtifactError` where there is no
    run.json, or for given scores that cannot be shown."""
    if not (run / "run.json").exists():
        raise ArtifactError("not a run directory: it has no run.json", file=run, fix="give a folder that `tutelage runs` lists")
    left_out: list[tuple[str, str]] = []
    chain: list[Node] = []
    _walk(run.resolve(), chain, set(), left_out)
    story = Story(chain[-1], chain, left_out=left_out)
    ancestry = _ancestry(story)
    if ancestry:
        story.model, *story.parents = ancestry
    _add_evaluations(story, scores)
    return story


def _ancestry(story: Story) -> list[Measured]:
    """The model of the run and those that it was trained from, nearest first, as far as run directories name them."""
    nodes = {node.path: node for node in story.chain}
    if story.run.kind in MODELS:
        place: Path | None = story.run.path
    else:
        place = _trained_from(story.run) or next((n.path for n in reversed(story.chain) if n.kind in MODELS), None)
    out: list[Measured] = []
    while place is not None and place not in [m.path for m in out]:
        node = nodes.get(place)
        out.append(Measured(_title(node, story) if node else place.name, place))
        place = _trained_from(node) if node else None
    return out


def _trained_from(node: Node) -> Path | None:
    """Where the model is that a run began with, or that it measured."""
    by_name = {str(p.get("name")): p for p in node.parents if p.get("kind") in MODELS}
    found = by_name.get("adapter") or by_name.get("model")
    return Path(os.path.normpath(node.path / str(found.get("path", "")))) if found else None


def _title(node: Node, story: Story) -> str:
    """The name of a run, with its digest where another of the chain has the same."""
    return node.name if [n.name for n in story.chain].count(node.name) == 1 else node.path.name


def _add_evaluations(story: Story, given: Sequence[Path]) -> None:
    """Reads the evaluations into the models that they measured."""
    near = [n.path / "scores" for n in reversed(story.chain) if (n.path / "scores" / "scores.json").exists()]
    found = sorted(story.run.path.parent.glob("*/scores/scores.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    folders = [(Path(f), True) for f in given] + [(f, False) for f in (*near, *(p.parent for p in found))]
    seen: set[Path] = set()
    for folder, wanted in folders:
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        try:
            scores = read_scores(folder)
        except ArtifactError as error:
            if wanted:
                raise
            if _model_of(folder, {}, story, every=False) is not None:
                story.left_out.append(("Scores", f"{folder.parent.name}: {error.message}"))
            continue
        except OSError as error:
            raise ArtifactError("no scores of `tutelage evaluate`", file=folder, found=str(error)) from error
        model = _model_of(folder, scores, story, every=wanted) if scores else None
        if model is not None and scores is not None:
            samples = _quiet_json(folder / "samples.json")
            model.add(scores, samples if isinstance(samples, dict) else None)
        elif wanted:
            story.left_out.append(("Scores", f"{folder.parent.name} does not tell which model it measured"))


def _model_of(folder: Path, scores: Mapping[str, Any], story: Story, *, every: bool) -> Measured | None:
    """The model that an evaluation measured, by its run.json or the digest in its scores. Of one that is not in the chain, None,
    unless `every` model is wanted."""
    known = [*([story.model] if story.model else []), *story.parents, *story.others]
    facts = scores.get("model") or {}
    path = measured_path(folder)
    by_digest = [n for n in story.chain if n.kind in MODELS and n.facts["artifact"].get("digest") == facts.get("digest")]
    if path is None and by_digest:
        path = by_digest[-1].path
    for model in known:
        if path == model.path or (path is None and facts.get("digest") and facts["digest"] == model.facts.get("digest")):
            return model
    node = next((n for n in story.chain if n.path == path), None)
    if path is None or (node is None and not every):
        return None
    story.others.append(Measured(_title(node, story) if node else str(facts.get("name") or path.name), path))
    return story.others[-1]


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
    """Watt-hours of a run: as recorded (`energy` in run.json, from `plan.energy`), else estimated from its seconds alike."""
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
    """Figures of a training run: tokens, tokens/s, share of the machine's product rate, FLOPs, final losses."""
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
    """Planned and measured values, where the run recorded both: `plan` in run.json and the fact of the same name."""
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
