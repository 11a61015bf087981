"""Predictions of a classifier and of its baseline on the same texts, compared and written to files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tutelage import log
from tutelage.data.groups.examples import ExampleGroups, Labels
from tutelage.errors import DataError, MissingExtra
from tutelage.evaluate import classification, confusion
from tutelage.evaluate.intervals import mcnemar, paired_shares
from tutelage.evaluate.word_counts import WordCounts
from tutelage.files import whole_file
from tutelage.inference.classifier import chosen, probabilities, tagged
from tutelage.records import Example, Span


class ClassifiedTexts:
    """Texts with the predictions of the classifier and of the baseline."""

    def __init__(self, examples: Sequence[Example], odds: list[np.ndarray], spans: list[tuple[Span, ...]]) -> None:
        self.examples, self.odds, self.spans = list(examples), odds, spans
        self.fold = np.zeros(len(self.examples), int)
        self.baseline: np.ndarray | None = None
        self.why_not = ""


def judge(part: Any, labels: Labels, prompt_groups: ExampleGroups) -> ClassifiedTexts:
    """The predictions of a trained classifier."""
    odds = probabilities(part, prompt_groups.encoded, labels.task)
    spans = [tagged(e, p, labels.names) for e, p in zip(prompt_groups.encoded, odds, strict=True)] if labels.task == "tag" else []
    return ClassifiedTexts(prompt_groups.examples, odds, spans)


def add_baseline(found: ClassifiedTexts, train: Sequence[Example], labels: Labels, *, wanted: bool) -> None:
    """Adds the baseline's predictions for the same texts, or the reason why there are none."""
    if labels.task == "tag":
        found.why_not = "word counts cannot tag spans"
    elif not wanted:
        found.why_not = "baseline=false"
    else:
        try:
            counts = WordCounts([text_of(e) for e in train], truth_of(train, labels), len(labels.names))
            found.baseline = counts.probabilities([text_of(e) for e in found.examples])
        except (MissingExtra, DataError) as error:
            found.why_not = error.render().replace("\n", ";")


def joined(parts: Sequence[ClassifiedTexts]) -> ClassifiedTexts:
    out = ClassifiedTexts(
        [e for p in parts for e in p.examples], [o for p in parts for o in p.odds], [s for p in parts for s in p.spans]
    )
    out.fold = np.concatenate([p.fold for p in parts])
    out.why_not = next((p.why_not for p in parts if p.why_not), "")
    if not out.why_not:
        out.baseline = np.concatenate([p.baseline for p in parts if p.baseline is not None])
    return out


def text_of(example: Example) -> str:
    return example.text if example.pair is None else f"{example.text}\n{example.pair}"


def truth_of(examples: Sequence[Example], labels: Labels) -> np.ndarray:
    """Class numbers [n], or 0 and 1 [n,K] where a text may have several."""
    if labels.task == "class":
        return np.array([labels.names.index(str(e.label)) for e in examples])
    return np.array([[name in e.labels for name in labels.names] for e in examples], int)


def write(found: ClassifiedTexts, labels: Labels, out: Path, name: str) -> dict[str, Any]:
    """Prints and writes the metrics, the predictions and the picture; returns the metrics for scores.json."""
    title = name.replace("_", " ")
    with whole_file(out / f"{name}.jsonl") as f:
        for row in rows(found, labels):
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    if labels.task == "tag":
        facts = classification.tag_measures([e.spans for e in found.examples], found.spans)
        classification.show(facts, title)
        return facts
    truth, odds = truth_of(found.examples, labels), np.stack(found.odds)
    measure = classification.measures if labels.task == "class" else classification.many_measures
    facts = measure(truth, odds, labels.names)
    if found.fold.any():
        of_fold = [measure(truth[found.fold == f], odds[found.fold == f], labels.names) for f in np.unique(found.fold)]
        facts["folds"] = {k: classification.over_folds([m[k]["value"] for m in of_fold]) for k in ("accuracy", "macro_f1")}
    classification.show(facts, title)
    if found.baseline is None:
        log.say(f"TF-IDF + logistic regression: not computed ({found.why_not})")
        facts["baseline"] = {"not_computed": found.why_not}
    else:
        facts["baseline"] = compared(found, truth, odds, measure(truth, found.baseline, labels.names), labels)
    if "confusion" in facts:
        try:
            with whole_file(out / f"{name}.svg") as f:
                f.write(confusion.picture(facts["confusion"], labels.names))
        except ImportError:
            log.say('the confusion matrix is not drawn: pip install "tutelage[report]"')
    return facts


def compared(
    found: ClassifiedTexts, truth: np.ndarray, odds: np.ndarray, theirs: dict[str, Any], labels: Labels
) -> dict[str, Any]:
    """The baseline's metrics, and whether the classifier is better on the same texts."""
    assert found.baseline is not None
    if labels.task == "class":
        a, b = odds.argmax(1) == truth, found.baseline.argmax(1) == truth
    else:
        a, b = (((p > 0.5) == (truth > 0)).all(1) for p in (odds, found.baseline))
    gain = paired_shares(a, b)
    p = mcnemar(int((a & ~b).sum()), int((b & ~a).sum()))
    log.say(f"TF-IDF + logistic regression: {classification.summary(theirs)}")
    more = f"{abs(100 * gain.value):.1f} points {'more' if gain.value >= 0 else 'less'} often than the baseline"
    log.say(f"the classifier is right {more}, difference of shares {gain.said('+.3f')}, McNemar p = {p:.2g}")
    return {**{k: theirs[k] for k in ("accuracy", "macro_f1", "ece", "classes")}, "gain": gain.to_json(), "mcnemar_p": p}


def rows(found: ClassifiedTexts, labels: Labels) -> list[dict[str, Any]]:
    """One object per text: its id, the truth, and the prediction."""
    out: list[dict[str, Any]] = []
    for i, example in enumerate(found.examples):
        row: dict[str, Any] = {"id": example.id, "source": example.source, "fold": int(found.fold[i])}
        if labels.task == "tag":
            spans = [
                [{"start": s.start, "end": s.end, "label": s.label} for s in side] for side in (example.spans, found.spans[i])
            ]
            out.append(row | {"truth": spans[0], "said": spans[1]})
            continue
        said = chosen(found.odds[i][None], labels.names, labels.task)[0]
        odds = {name: round(float(p), 5) for name, p in zip(labels.names, found.odds[i], strict=True)}
        truth: Any = example.label if labels.task == "class" else list(example.labels)
        out.append(row | {"truth": truth, "said": said if isinstance(said, str) else list(said), "probabilities": odds})
    return out
