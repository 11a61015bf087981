"""What changed between two evaluations of the same held-out records, question by question and document by document.

Both models are asked the same, so each question is its own control: the interval is that of the difference, narrower than what
the intervals of the two shares would suggest (Newcombe's for pairs; for documents see `change`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tutelage.errors import ArtifactError, DataError
from tutelage.evaluate import adaptation_effect
from tutelage.evaluate.bits import DocumentSums
from tutelage.evaluate.intervals import accuracy, number, paired_shares
from tutelage.evaluate.questions import RECOGNISABLE, Prediction
from tutelage.files import read_json

ALL = "all questions"
DEFINITION = "share of right answers after training minus that before, to the same questions"


@dataclass(slots=True, frozen=True)
class Earlier:
    """An evaluation that was made before."""

    folder: Path
    model: str
    predictions: list[Prediction]
    documents: DocumentSums | None
    how: Mapping[str, Any]  # settings that change what is measured

    @classmethod
    def read(cls, folder: Path) -> Earlier:
        """Raises `ArtifactError` for a folder that `evaluate` did not write."""
        try:
            found = read_json(folder / "scores.json")
            with (folder / "predictions.jsonl").open(encoding="utf-8") as f:
                predictions = [Prediction(**json.loads(line)) for line in f]
            documents = adaptation_effect.to_sums(found["documents"]["per_document"]) if found.get("documents") else None
            return cls(folder, found["model"]["name"], predictions, documents, found.get("how") or {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                "these are no scores of `tutelage evaluate`", file=folder, field="before", found=repr(error),
                expected="scores.json and predictions.jsonl, as it writes them", fix="make them: tutelage evaluate --model MODEL",
            ) from error  # fmt: skip

    def check(self, questions: Sequence[str], documents: Sequence[str], how: Mapping[str, Any]) -> None:
        """Raises `DataError` where it measured nothing of what is to be measured now, others (ids, in their order), or with other
        settings: `how`, of what it measured."""
        pairs = {
            "questions": ([p.id for p in self.predictions], list(questions)),
            "documents": (self.documents.names if self.documents else [], list(documents)),
        }
        if not any(then and now for then, now in pairs.values()):
            raise DataError(
                "the evaluation from before measured nothing that this one measures", file=self.folder / "scores.json",
                field="before", fix="give both the same documents or questions",
            )  # fmt: skip
        for what, (then, now) in pairs.items():
            if then and now and then != now:
                raise DataError(
                    f"the evaluation from before measured other {what}, so there is nothing to pair", field="before",
                    file=self.folder / "scores.json",
                    found=f"{len(set(then) & set(now)):,} in both, of {len(then):,} then and {len(now):,} now",
                    fix=f"measure both models with the same {what} and the same max_{what}",
                )  # fmt: skip
        for name, now in how.items():
            if self.how.get(name, now) != now:
                raise DataError(
                    "the evaluation from before was measured otherwise", file=self.folder / "scores.json", field=name,
                    found=f"{now}, then {self.how[name]}", fix=f"measure both with the same {name}",
                )  # fmt: skip

    def gains(
        self, predictions: Sequence[Prediction], judged_by: Mapping[str, str], documents: DocumentSums | None, seed: int = 0
    ) -> dict[str, Any]:
        """What was gained since: {"model", "questions": a row a task, "documents"}, of what both measured. `judged_by`: each
        task's measure. With several tasks their questions together come last, each judged as its task is."""
        out: dict[str, Any] = {"model": self.model}
        pairs: dict[str, list[tuple[bool, bool]]] = {}
        for then, now in zip(self.predictions, predictions, strict=False):  # strict but for one that asked nothing
            pairs.setdefault(now.task, []).append((_right(then, judged_by[now.task]), _right(now, judged_by[now.task])))
        if pairs:
            out["questions"] = [_row(task, judged_by[task], found) for task, found in pairs.items()]
        if len(pairs) > 1:
            together = [pair for found in pairs.values() for pair in found]
            out["questions"].append(_row(ALL, "its task's measure", together))
        if documents and self.documents:
            out["documents"] = adaptation_effect.change(self.documents, documents, seed=seed)
        return out


def _right(prediction: Prediction, judged_by: str) -> bool:
    return prediction.correct if judged_by == "correct" else prediction.score >= RECOGNISABLE


def _row(task: str, judged_by: str, pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    before, after = ([pair[i] for pair in pairs] for i in (0, 1))
    return {
        "task": task, "judged_by": judged_by, "before": accuracy(before).to_json(), "after": accuracy(after).to_json(),
        "gain": number(paired_shares(after, before), "share, per question", DEFINITION),
    }  # fmt: skip


def verdict(row: Mapping[str, Any]) -> str:
    """One sentence. Example: `add: 14.0% to 25.5% right, gain 11.5 points (4.6 to 18.2)`."""
    gain = row["gain"]
    sure = gain["low"] > 0 or gain["high"] < 0
    shares = f"{row['before']['value']:.1%} to {row['after']['value']:.1%} right"
    points = [100 * gain[key] for key in ("value", "low", "high")]
    told = "gain {:.1f} points ({:.1f} to {:.1f})".format(*points)
    return f"{row['task']}: {shares}, {told}{'' if sure else ', no clear change'}"


def table(rows: Sequence[Mapping[str, Any]], name: str) -> Table:
    """A line a task."""
    out = Table(title=f"against {name}, on the same questions", title_justify="left")
    for column in ("task", "n", "before", "after", "points", "95% interval"):
        out.add_column(column, justify="left" if column == "task" else "right")
    for row in rows:
        gain = row["gain"]
        shares = (f"{row[when]['value']:.1%}" for when in ("before", "after"))
        interval = f"{100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}"
        sure = gain["low"] > 0 or gain["high"] < 0
        out.add_row(row["task"], str(gain["n"]), *shares, f"{100 * gain['value']:+.1f}", interval, style=None if sure else "dim")
    return out
