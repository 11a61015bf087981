"""Stage `classify`: examples -> a classifier, and what it gets right."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tutelage import log
from tutelage.config.tasks import Classify
from tutelage.data.clean.split import position
from tutelage.data.groups.examples import Labels, labels_of, named
from tutelage.errors import ConfigError, DataError, Setting
from tutelage.evaluate.classified import ClassifiedTexts, add_baseline, joined, judge, write
from tutelage.files import whole_folder, write_json
from tutelage.records import Example, read_records
from tutelage.rundir import RunDir
from tutelage.setup import classifier
from tutelage.setup.classifier import Start
from tutelage.setup.trainer import choose_device


def run(config: Classify, run: RunDir) -> dict[str, Any]:
    train, held = read(run.input("data"))
    labels = weighted(config, labels_of(train, held))
    log.say(
        f"{len(train):,} examples to learn from, {len(held):,} held out, {len(labels.names)} classes: {', '.join(labels.names)}"
    )
    start = Start.of(config, run, labels, choose_device(config))
    if config.class_weights == "balanced":
        start.labels = labels = replace(labels, weights=start.prompt_groups(train).balanced())
        log.say(f"weights in the loss: {', '.join(f'{name} {weight:.3g}' for name, weight in labels.weights.items())}")
    judged: dict[str, ClassifiedTexts] = {}
    short = start.short_enough(train) or train  # where none is, training says so
    if config.folds:
        judged["cross_validation"] = cross_validate(start, short)
    if held and not start.short_enough(held):
        log.say(
            f"none of the {len(held):,} held-out examples fits in {start.max_length} tokens: no validation, no held-out scores"
        )
        held = []
    part, facts = classifier.train(start, run, train, held, keep=True)
    if log.rank() != 0:
        return facts
    if held:
        judged["held_out"] = seen(start, part, short, held)
    with whole_folder(run.folder("scores")) as out:
        scores = {name: write(found, labels, out, name) for name, found in judged.items()}
        write_json(out / "scores.json", {"labels": list(labels.names), "task": labels.task, **scores})
    for old in run.folder("folds").glob("fold_*/checkpoints"):  # kept until here, so that a killed run need not repeat a fold
        shutil.rmtree(old)
    return facts | {"task": labels.task, "classes": len(labels.names), **headline(scores)}


def read(folder: Path) -> tuple[list[Example], list[Example]]:
    """Both parts of the records."""
    return tuple(list(read_records(folder / f"{part}.jsonl", Example)) for part in ("train", "validation"))  # type: ignore[return-value]


def weighted(config: Classify, labels: Labels) -> Labels:
    """The classes with the weights in the loss that the settings give them. Raises `ConfigError` for names that are none."""
    if config.class_weights == "none":
        return labels
    if labels.task == "many":
        raise ConfigError("weights are of texts that have one class each", field="class_weights", found=config.class_weights,
                          expected="none")  # fmt: skip
    if config.class_weights == "balanced":
        return labels
    labels.check(list(config.class_weights))
    return replace(labels, weights=dict(config.class_weights))


def seen(start: Start, part: Any, train: Sequence[Example], held: Sequence[Example]) -> ClassifiedTexts:
    """What a classifier and the baseline say of texts that neither has learnt from."""
    prompt_groups = start.prompt_groups(held)
    classifier.say_report(prompt_groups)
    found = judge(part, start.labels, prompt_groups)
    add_baseline(found, train, start.labels, wanted=start.config.baseline)
    return found


def cross_validate(start: Start, examples: Sequence[Example]) -> ClassifiedTexts:
    """Out-of-fold predictions. A fold that is done stays done when the run is resumed."""
    folds, number = start.config.folds, fold_numbers(examples, start)
    all_odds: list[ClassifiedTexts] = []
    for fold in range(folds):
        log.say(f"fold {fold + 1} of {folds}")
        inside = [e for e, f in zip(examples, number, strict=True) if f != fold]
        outside = [e for e, f in zip(examples, number, strict=True) if f == fold]
        own = RunDir(
            start.run.folder("folds") / f"fold_{fold + 1}", start.run.stage, start.run.digest, start.run.inputs, start.run.seed
        )
        own.path.mkdir(parents=True, exist_ok=True)
        part, _ = classifier.train(start, own, inside, [], keep=False)
        found = seen(start, part, inside, outside)
        found.fold[:] = fold
        all_odds.append(found)
    return joined(all_odds)


def fold_numbers(examples: Sequence[Example], start: Start) -> list[int]:
    """The fold of each example: by the hash of its id, evenly within each class."""
    folds, labels = start.config.folds, start.labels
    if folds < 2 or folds > len(examples):
        raise ConfigError("not a number of folds", field="folds", found=folds, expected=f"0, or 2 to {len(examples)}")
    order = sorted(
        range(len(examples)), key=lambda i: (named(examples[i], labels.task), position(examples[i].id, start.config.seed))
    )
    out = [0] * len(examples)
    for place, i in enumerate(order):
        out[i] = place % folds
    if labels.task == "class":
        for fold in range(folds):
            learnt = {e.label for e, f in zip(examples, out, strict=True) if f != fold}
            if rare := sorted(set(labels.names) - {str(name) for name in learnt}):
                raise DataError(
                    "too few examples of a class for cross-validation", found=", ".join(rare[:5]),
                    expected="two or more of each", fix=f"give more of them, leave them out, or set {Setting('folds', '0')}",
                )  # fmt: skip
    return out


def headline(scores: dict[str, Any]) -> dict[str, Any]:
    """The numbers of run.json: of the held-out part where there is one, else of cross-validation."""
    first = scores.get("held_out") or scores.get("cross_validation") or {}
    out = {key: first[key]["value"] for key in ("accuracy", "macro_f1", "span_f1", "character_f1") if key in first}
    theirs = first.get("baseline", {})
    return out | {f"baseline_{key}": theirs[key]["value"] for key in ("accuracy", "macro_f1") if key in theirs}
