"""Metrics of a classifier: accuracy, F1, confusion matrix, calibration. numpy only; every share has its interval.

Shapes: n texts, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from tutelage import log
from tutelage.evaluate.intervals import Estimate, mean, wilson
from tutelage.evaluate.intervals import said as with_interval
from tutelage.records import Span

BINS = 15  # of confidence, as in Guo et al. 2017
DRAWS = 1000
NAME = 22  # characters of a class name next to its row of the confusion matrix


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """[K,K] counts: rows are the truth, columns the predictions."""
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (truth, predicted), 1)
    return table


def f1(right: np.ndarray, predicted: np.ndarray, there: np.ndarray) -> np.ndarray:
    """F1 of each class; 0 for one that is neither true nor predicted anywhere."""
    return 2 * right / np.maximum(predicted + there, 1)  # type: ignore[no-any-return]


def measures(truth: np.ndarray, odds: np.ndarray, names: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Metrics for texts with one class each: `truth` [n] class numbers, `odds` [n,K] probabilities."""
    predicted, n = odds.argmax(1), len(truth)
    table = confusion(truth, predicted, len(names))
    right = predicted == truth
    each = np.stack([_one_hot(x, len(names)) for x in (predicted, truth)])
    facts = {
        "texts": n,
        "accuracy": wilson(int(right.sum()), n).to_json(),
        "macro_f1": _macro(each, seed).to_json(),
        "majority": round(float(table.sum(1).max() / n), 4),  # accuracy of always saying the most frequent class
        "ece": calibration(odds.max(1), right),
        "classes": _rows(np.diag(table), table.sum(0), table.sum(1), names),
        "confusion": table.tolist(),
    }
    return facts


def many_measures(truth: np.ndarray, odds: np.ndarray, names: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Metrics for texts with any number of classes: `truth` [n,K] of 0 and 1. Accuracy is the share with all classes right."""
    predicted, there = odds > 0.5, truth > 0
    each = np.stack([predicted, there])
    right = (predicted & there).sum(0)
    return {
        "texts": len(truth),
        "accuracy": wilson(int((predicted == there).all(1).sum()), len(truth)).to_json(),
        "macro_f1": _macro(each, seed).to_json(),
        "ece": calibration(np.maximum(odds, 1 - odds).ravel(), (predicted == there).ravel()),
        "classes": _rows(right, predicted.sum(0), there.sum(0), names),
    }


def tag_measures(truth: Sequence[Sequence[Span]], predicted: Sequence[Sequence[Span]]) -> dict[str, Any]:
    """Metrics for tagged texts: a span is right where both ends and its label are; characters are counted one by one."""
    names = sorted({s.label for spans in (*truth, *predicted) for s in spans})
    number = {name: i for i, name in enumerate(names)}
    counts = np.zeros((3, len(names)), np.int64)  # right, predicted, there
    per_text, shares = np.zeros((len(truth), 3), np.int64), []
    for i, (wanted, found) in enumerate(zip(truth, predicted, strict=True)):
        common = set(wanted) & set(found)
        for row, spans in enumerate((common, set(found), set(wanted))):
            for span in spans:
                counts[row, number[span.label]] += 1
            per_text[i, row] = len(spans)
        shares.append(_characters(wanted, found))
    total = counts.sum(1)
    rng = np.random.default_rng(seed=0)
    drawn = [per_text[rng.integers(0, len(per_text), len(per_text))].sum(0) for _ in range(DRAWS)]
    value = float(f1(*total))
    low, high = np.quantile([f1(*row) for row in drawn], [0.025, 0.975])
    return {
        "texts": len(truth),
        "span_f1": Estimate(value, min(value, float(low)), max(value, float(high)), len(truth), float("nan"),
                            f"bootstrap over texts, {DRAWS} draws, 95%").to_json(),
        "character_f1": mean(shares, bounds=(0.0, 1.0)).to_json(),
        "classes": _rows(counts[0], counts[1], counts[2], names),
    }  # fmt: skip


def _characters(truth: Sequence[Span], predicted: Sequence[Span]) -> float:
    """F1 of the characters of one text, as in SemEval 2021's task 5; 1 where neither has any."""
    a, b = ({(c, s.label) for s in spans for c in range(s.start, s.end)} for spans in (truth, predicted))
    return 1.0 if not a and not b else 2 * len(a & b) / (len(a) + len(b))


def calibration(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599): mean gap between confidence and accuracy in 15 bins."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(float(confidence[bins == b].mean() - right[bins == b].mean())) * (bins == b).sum() for b in np.unique(bins)]
    return round(float(sum(gaps) / len(confidence)), 4)


def over_folds(values: Sequence[float]) -> dict[str, Any]:
    """Mean over folds, with Student's t interval. Folds share training texts: the interval is a little too narrow."""
    found = mean(values, bounds=(0.0, 1.0))
    row = found.to_json()
    return {"mean": found.value, "low": row["low"], "high": row["high"], "folds": [round(v, 4) for v in values]}


def _macro(each: np.ndarray, seed: int) -> Estimate:
    """Mean F1 of the classes that occur, with a bootstrap over texts. `each` [2,n,K]: predicted, true."""
    predicted, there = each.astype(np.float64)
    known = there.sum(0) > 0

    def value(weights: np.ndarray) -> float:
        counts = [weights @ (predicted * there), weights @ predicted, weights @ there]
        return float(f1(*counts)[known].mean())

    n = len(predicted)
    rng = np.random.default_rng(seed)
    drawn = [value(rng.multinomial(n, np.full(n, 1 / n)).astype(np.float64)) for _ in range(DRAWS)]
    found = value(np.ones(n))
    low, high = np.quantile(drawn, [0.025, 0.975])
    method = f"bootstrap over {n} texts, {DRAWS} draws, 95%"
    return Estimate(found, min(found, float(low)), max(found, float(high)), n, float(np.std(drawn, ddof=1)), method)


def _rows(right: np.ndarray, predicted: np.ndarray, there: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    scores = f1(right, predicted, there)
    return [
        {"class": name, "texts": int(there[i]), "precision": round(float(right[i] / max(predicted[i], 1)), 4),
         "recall": round(float(right[i] / max(there[i], 1)), 4), "f1": round(float(scores[i]), 4)}
        for i, name in enumerate(names)
    ]  # fmt: skip


def _one_hot(x: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes, dtype=bool)[x]


def show(facts: dict[str, Any], title: str) -> None:
    """Prints the classes, and the confusion matrix where there is one and it is not too wide."""
    table = Table("class", *("texts", "precision", "recall", "F1"), title=title, title_justify="left")
    for row in facts["classes"]:
        table.add_row(Text(row["class"]), f"{row['texts']:,}", *(f"{row[k]:.3f}" for k in ("precision", "recall", "f1")))
    log.console.print(table)
    if len(facts.get("confusion", ())) > 1:
        show_confusion([row["class"] for row in facts["classes"]], facts["confusion"])
    log.say(summary(facts))


def show_confusion(names: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    """Prints the matrix where it fits the terminal: columns are predictions, numbered as the rows. The picture always has it."""
    digits = max(len(str(len(names))), *(len(str(c)) for row in counts for c in row))
    label = min(NAME, max(map(len, names))) + len(str(len(names))) + 1
    if label + len(names) * (digits + 1) > log.console.width:
        log.say(f"confusion matrix: {len(names)} classes are too many for this terminal; scores/ has it as a picture")
        return
    log.say("confusion matrix (rows: truth, columns: predictions)")
    across = "".join(f" {i + 1:>{digits}}" for i in range(len(names)))
    log.console.print(Text(" " * label + across, style="dim"))
    for i, (name, row) in enumerate(zip(names, counts, strict=True)):
        line = Text(f"{i + 1:>{len(str(len(names)))}} {name[:NAME]}".ljust(label))
        for j, count in enumerate(row):
            line.append(f" {count or '.':>{digits}}", style="bold" if i == j else "")
        log.console.print(line)


def summary(facts: dict[str, Any]) -> str:
    """One line: the numbers with their intervals."""
    names = ("accuracy", "macro_f1", "span_f1", "character_f1")
    parts = [f"{name.replace('_', ' ')} {with_interval(facts[name])}" for name in names if name in facts]
    if "majority" in facts:
        parts.append(f"always the most frequent class: {facts['majority']:.3f}")
    if "ece" in facts:
        parts.append(f"calibration error {facts['ece']:.3f}")
    return ", ".join(parts)
