"""A model compared with another that answered the same held-out questions and read the same held-out documents.

Each question is its own control: the interval is that of the difference, narrower than the intervals of the two shares suggest
(Newcombe's for pairs; for documents see `adaptation_effect`). The answers of both models are graded by the same scorers: those
of the reference are graded again, because its scores may have been written under another scorer or older rules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tutelage import log
from tutelage.errors import ArtifactError, DataError
from tutelage.evaluate import adaptation_effect
from tutelage.evaluate.bits import DocumentSums
from tutelage.evaluate.intervals import accuracy, number, paired_shares
from tutelage.evaluate.questions import Prediction, grade_all
from tutelage.files import read_json
from tutelage.records import Conversation

ALL = "all questions"
DEFINITION = "share of right answers of the model minus that of the reference, to the same questions"


@dataclass(slots=True, frozen=True)
class Reference:
    """The evaluation of another model."""

    folder: Path
    model: str
    rows: Sequence[Mapping[str, Any]]  # of predictions.jsonl
    documents: DocumentSums | None
    how: Mapping[str, Any]  # settings that change what is measured

    @classmethod
    def read(cls, folder: Path) -> Reference:
        """Raises `ArtifactError` for a folder that `evaluate` did not write."""
        try:
            found = read_json(folder / "scores.json")
            with (folder / "predictions.jsonl").open(encoding="utf-8") as f:
                rows = [dict(json.loads(line)) for line in f]
            if any(not isinstance(row[key], str) for row in rows for key in ("id", "answer")):
                raise ValueError("an answer that is no text")
            documents = adaptation_effect.to_sums(found["documents"]["per_document"]) if found.get("documents") else None
            return cls(folder, found["model"]["name"], rows, documents, found.get("how") or {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                "these are not scores of `tutelage evaluate`", file=folder, field="compare_with", found=repr(error),
                expected="scores.json and predictions.jsonl, as it writes them", fix="make them: tutelage evaluate --model MODEL",
            ) from error  # fmt: skip

    def check(self, questions: Sequence[str], documents: Sequence[str], how: Mapping[str, Any]) -> None:
        """Raises `DataError` where the reference was measured on nothing, or on other records (ids, in their order), than
        the model will be, or with other settings (`how`)."""
        pairs = {
            "questions": ([row["id"] for row in self.rows], list(questions)),
            "documents": (self.documents.names if self.documents else [], list(documents)),
        }
        if not any(theirs and ours for theirs, ours in pairs.values()):
            raise DataError(
                "the evaluation to compare with measured nothing that this one measures", file=self.folder / "scores.json",
                field="compare_with", fix="give both the same documents or questions",
            )  # fmt: skip
        for what, (theirs, ours) in pairs.items():
            if theirs and ours and theirs != ours:
                raise DataError(
                    f"the evaluation to compare with used other {what}, so they cannot be paired", field="compare_with",
                    file=self.folder / "scores.json",
                    found=f"{len(set(theirs) & set(ours)):,} in both, of {len(theirs):,} there and {len(ours):,} here",
                    fix=f"measure both models with the same {what} and the same max_{what}",
                )  # fmt: skip
        for name, ours in how.items():
            if self.how.get(name, ours) != ours:
                raise DataError(
                    "the evaluation to compare with used another setting", file=self.folder / "scores.json", field=name,
                    found=f"{self.how[name]} there, {ours} here", fix=f"measure both with the same {name}",
                )  # fmt: skip

    def graded(self, conversations: Sequence[Conversation], scorer: str | None) -> list[Prediction]:
        """The reference's answers with the grades that the present scorers give; warns where its own scores say otherwise."""
        if not self.rows or not conversations:
            return []
        answers = [None if row.get("too_long") else row["answer"] for row in self.rows]
        found = grade_all(conversations, answers, scorer)
        then, now = ({str(row.get("scorer")) for row in self.rows}, {p.scorer for p in found})
        changed = sum(bool(row.get("correct")) != p.correct for row, p in zip(self.rows, found, strict=True))
        if changed or then != now:
            log.say(
                f"warning: the scores of {self.model} in {self.folder} were graded by {', '.join(sorted(then))}, these by "
                f"{', '.join(sorted(now))}: {changed} of its {len(found)} grades differ. The comparison uses the present grades "
                f"for both models; evaluate {self.model} again to bring its own scores up to date", style="yellow",
            )  # fmt: skip
        return found


def compare(
    model: str,
    predictions: Sequence[Prediction],
    documents: DocumentSums | None,
    reference: Reference,
    reference_predictions: Sequence[Prediction],
    seed: int = 0,
) -> dict[str, Any]:
    """{"model", "reference", "questions": a row a task, "documents"}, of what both measured. With several tasks, the last row
    is of all questions together."""
    out: dict[str, Any] = {"model": model, "reference": reference.model}
    pairs: dict[str, list[tuple[bool, bool]]] = {}
    scorers: dict[str, dict[str, None]] = {}
    for theirs, ours in zip(reference_predictions, predictions, strict=False):  # strict but for one that asked nothing
        pairs.setdefault(ours.task, []).append((theirs.correct, ours.correct))
        scorers.setdefault(ours.task, {})[ours.scorer] = None
    if pairs:
        out["questions"] = [_row(task, ", ".join(scorers[task]), found) for task, found in pairs.items()]
    if len(pairs) > 1:
        together = [pair for found in pairs.values() for pair in found]
        out["questions"].append(_row(ALL, "the scorers of the tasks", together))
    if documents and reference.documents:
        out["documents"] = adaptation_effect.effect(reference.documents, documents, seed=seed)
    return out


def _row(task: str, scorer: str, pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    theirs, ours = ([pair[i] for pair in pairs] for i in (0, 1))
    return {
        "task": task, "scorer": scorer, "reference": accuracy(theirs).to_json(), "model": accuracy(ours).to_json(),
        "difference": number(paired_shares(ours, theirs), "share, per question", DEFINITION),
    }  # fmt: skip


def verdict(found: Mapping[str, Any]) -> str:
    """One sentence about all questions of a comparison.

    Example: `rl against chat, add: 25.5% right against 14.0%, difference +11.5 points (+4.6 to +18.2)`.
    """
    row = found["questions"][-1]
    difference = row["difference"]
    points = "{:+.1f} points ({:+.1f} to {:+.1f})".format(*(100 * difference[key] for key in ("value", "low", "high")))
    shares = f"{row['model']['value']:.1%} right against {row['reference']['value']:.1%}"
    unclear = "" if _clear(difference) else ", no clear difference"
    return f"{found['model']} against {found['reference']}, {row['task']}: {shares}, difference {points}{unclear}"


def table(found: Mapping[str, Any]) -> Table:
    """A line a task."""
    title = f"{found['model']} against {found['reference']}, share of right answers to the same questions"
    out = Table(title=title, title_justify="left")
    for column in ("task", "n", "reference", "model", "points", "95% interval"):
        out.add_column(column, justify="left" if column == "task" else "right")
    for row in found["questions"]:
        points = {key: 100 * row["difference"][key] for key in ("value", "low", "high")}
        shares = (f"{row[whose]['value']:.1%}" for whose in ("reference", "model"))
        cells = (f"{points['value']:+.1f}", f"{points['low']:+.1f} to {points['high']:+.1f}")
        style = None if _clear(row["difference"]) else "dim"
        out.add_row(row["task"], str(row["difference"]["n"]), *shares, *cells, style=style)
    return out


def _clear(difference: Mapping[str, Any]) -> bool:
    return bool(difference["low"] > 0 or difference["high"] < 0)
