"""The models of a report: each figure under the model that it was measured on, and the verdict on the one that is delivered.

The delivered model is the one that the reported run made. The models that it was trained from have figures of their own, which
say nothing about it: fine-tuning may lose what pretraining had learnt.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tutelage.errors import ArtifactError
from tutelage.evaluate.intervals import relative_saving
from tutelage.files import read_json

VERSION = 2  # of scores.json; version 1 had other names (`gains`, `judged_by`, `better_yardstick`)
MODELS = ("model", "adapter")  # kinds of artifact that can be evaluated
NATS_PER_BIT = 0.6931471805599453


@dataclass(slots=True)
class Measured:
    """A model with every evaluation of it that was found: one set of figures for each data, explicit and new ones first."""

    name: str
    path: Path  # its run directory, or its folder
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)  # by the name of the records
    questions: dict[str, dict[str, Any]] = field(default_factory=dict)
    comparisons: list[dict[str, Any]] = field(default_factory=list)  # with other models
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # continuations, answers
    facts: dict[str, Any] = field(default_factory=dict)  # parameters, path, digest
    definitions: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """What commands take as the model."""
        made = [self.path / kind for kind in MODELS if (self.path / kind).is_dir()]
        return made[0] if made else self.path

    def add(self, scores: Mapping[str, Any], samples: Mapping[str, Any] | None) -> None:
        """Figures of an evaluation; where there are some of the same data, those stay."""
        for kind, known in (("documents", self.documents), ("questions", self.questions)):
            found = scores.get(kind)
            if isinstance(found, dict):
                known.setdefault(str(found.get("data") or kind), found)
        found = scores.get("comparison")
        if isinstance(found, dict) and all(found.get("reference") != c.get("reference") for c in self.comparisons):
            self.comparisons.append(found)
        for kind, rows in (samples or {}).items():
            if rows:
                self.samples.setdefault(kind, rows)
        self.facts, self.definitions = (
            self.facts or dict(scores.get("model") or {}),
            {**scores["definitions"], **self.definitions},
        )


@dataclass(slots=True, frozen=True)
class Finding:
    """A sentence of the verdict."""

    text: str
    tone: str = ""  # bad | good | ""


def read_scores(folder: Path) -> dict[str, Any] | None:
    """scores.json of `tutelage evaluate`; None for that of another stage. Raises `ArtifactError` for a file that cannot be read,
    and for one whose names have changed since."""
    found = read_json(folder / "scores.json")
    if not isinstance(found, dict) or "definitions" not in found:
        return None
    if found.get("version") != VERSION:
        raise ArtifactError(
            "these scores were written by another version of tutelage", file=folder / "scores.json", field="version",
            found=str(found.get("version")), expected=str(VERSION), fix="measure the model again: `tutelage evaluate --force`",
        )  # fmt: skip
    return found


def measured_path(scores: Path) -> Path | None:
    """The run directory or folder of the model that an evaluation measured, as its run.json says."""
    run = scores.resolve().parent
    try:
        parents = read_json(run / "run.json")["parents"]
        return next(Path(os.path.normpath(run / str(p["path"]))) for p in parents if p.get("name") == "model")
    except (OSError, ArtifactError, LookupError, TypeError, AttributeError, StopIteration):
        return None


def findings(model: Measured, parents: Sequence[Measured]) -> list[Finding]:
    """The verdict on a model: what it is worse at first, then what was not measured, then the rest. `parents`: the models that it
    was trained from."""
    names = {m.path.name: m.name for m in (model, *parents)}  # scores name run directories
    out = [
        Finding(_renamed(found["verdict"]["text"], names), _tone(found["verdict"].get("saving")))
        for found in model.documents.values()
    ]
    out += [_against(model, data, parents) for data in model.documents if any(data in p.documents for p in parents)]
    out += _of_questions(model)
    for found in model.comparisons:
        if found.get("questions"):
            row = found["questions"][-1]
            theirs, ours, difference = row["reference"]["value"], row["model"]["value"], row["difference"]
            points = "{:+.1f} points, {:+.1f} to {:+.1f}".format(*(100 * difference[k] for k in ("value", "low", "high")))
            unclear = "" if _tone(difference) else ", no clear difference"
            reference = _renamed(found["reference"], names)
            text = f"{model.name} answers {ours:.1%} of {row['task']} right, {reference} {theirs:.1%} ({points}{unclear})."
            out.append(Finding(text, _tone(difference)))
    out += _not_measured(model, parents)
    return sorted(out, key=lambda finding: finding.tone != "bad")


def _renamed(text: str, names: Mapping[str, str]) -> str:
    for long, short in names.items():
        text = text.replace(long, short)
    return text


def _tone(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return ""
    return "good" if difference["low"] > 0 else "bad" if difference["high"] < 0 else ""


def _against(model: Measured, data: str, parents: Sequence[Measured]) -> Finding:
    """The model against the best of those that it was trained from, on the same documents."""
    best = min((p for p in parents if data in p.documents), key=lambda p: bits_per_byte(p.documents[data])["value"])
    ours, theirs = (m.documents[data] for m in (model, best))
    a, b = (bits_per_byte(found)["value"] for found in (ours, theirs))
    numbers = f"{a:.3f} against {b:.3f} bits per byte for {data}"
    rows = [found.get("per_document") or [] for found in (ours, theirs)]
    if not rows[0] or [r["document"] for r in rows[0]] != [r["document"] for r in rows[1]]:
        return Finding(f"{model.name} and {best.name}, which it was trained from, were measured on other documents: {numbers}.")
    saving = relative_saving(*([r["nats"] / NATS_PER_BIT for r in found] for found in rows))
    low, high = sorted((abs(saving.low), abs(saving.high)))
    interval = f" ({low:.1%} to {high:.1%})" if saving.n > 1 else ""
    if saving.low <= 0 <= saving.high:
        return Finding(f"{model.name} shows no clear difference from {best.name}, which it was trained from: {numbers}.")
    more = "more" if saving.value < 0 else "fewer"
    size = f"{abs(saving.value):.1%} {more} bits{interval}"
    text = f"{model.name} needs {size} than {best.name}, which it was trained from: {numbers}."
    return Finding(text, "bad" if saving.value < 0 else "good")


def _of_questions(model: Measured) -> list[Finding]:
    tasks = [task for found in model.questions.values() for task in found.get("tasks") or []]
    if not tasks:
        return []
    unclear = [str(task["task"]).replace("_", " ") for task in tasks if not task["above_guess"]]
    beaten = len(tasks) - len(unclear)
    if len(tasks) == 1:
        text = f"{model.name} is {'clearly' if beaten else 'not clearly'} better than guessing at its held-out questions."
    else:
        rest = f", not at {', '.join(unclear)}" if beaten and unclear else ""
        kinds = f"{beaten} of {len(tasks)} kinds" if beaten else f"none of {len(tasks)} kinds"
        text = f"{model.name} is clearly better than guessing at {kinds} of held-out questions{rest}."
    return [Finding(text, "good" if not unclear else "" if beaten else "bad")]


def _not_measured(model: Measured, parents: Sequence[Measured]) -> list[Finding]:
    """What a parent was measured on, and the model was not: the parent's figures must not be taken for the model's."""
    out = []
    for kind in ("documents", "questions"):
        mine: dict[str, Any] = getattr(model, kind)
        for parent in parents:
            for data in (d for d in getattr(parent, kind) if d not in mine):
                mine = mine | {data: None}
                text = f"{model.name} was not measured on the {kind} of {data}, as {parent.name} was, which it was trained from."
                out.append(Finding(f"{text} `tutelage evaluate --model {model.name} --{kind} …` does it.", "bad"))
    if not out and not model.documents and not model.questions:
        out.append(Finding(f"{model.name} has not been measured: no finished evaluation of it was found."))
    return out


def bits_per_byte(documents: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own among the rows of an evaluation."""
    return next(row["bits_per_byte"] for row in documents["rows"] if row["name"] == "model")


def bars(model: Measured, parents: Sequence[Measured], data: str) -> list[dict[str, Any]]:
    """Bits per byte of the model, of the models that it was trained from and of the baselines, best first, on one scale from 0 to
    a little above the longest interval."""
    rows = [{"label": model.name, "kind": "ours", **bits_per_byte(model.documents[data])}]
    for parent in (p for p in parents if data in p.documents):
        rows.append(
            {"label": f"{parent.name}, which it was trained from", "kind": "parent", **bits_per_byte(parent.documents[data])}
        )
    baselines: dict[str, dict[str, Any]] = {}
    for found in (m.documents[data] for m in (model, *parents) if data in m.documents):
        for row in found["rows"]:
            if row["name"] != "model":
                baselines.setdefault(row["name"], {"label": row["label"], "kind": "baseline", **row["bits_per_byte"]})
    rows = sorted([*rows, *baselines.values()], key=lambda row: float(row["value"]))
    top = max(float(row["high"]) for row in rows) * 1.04
    return [row | {f"{key}_share": 100 * float(row[key]) / top for key in ("value", "low", "high")} for row in rows]
