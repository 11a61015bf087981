"""The whole evaluation of one model: scores.json, predictions.jsonl, gallery.json, and a table for people.

Layers above hand in the model, its tokenizer as functions and a `Generate`; nothing here loads or serves anything.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from tutelage import log
from tutelage.errors import DataError
from tutelage.evaluate import adaptation_effect, bits, comparison, questions, samples
from tutelage.evaluate.baselines import Baseline, measure
from tutelage.evaluate.intervals import Estimate, number, relative_saving
from tutelage.files import whole_file, write_json
from tutelage.records import Conversation, Document, read_records, spread

DEFINITIONS = {
    "bits_per_byte": "bits for the held-out documents, their ends included, divided by the UTF-8 bytes of their text",
    "perplexity": "exp of the mean nats per predicted token; depends on the tokenizer",
    "saving": "1 - bits of the model / bits of the better yardstick, on the same documents",
    "correct": "share of answers that the task's scorer calls right; answer: states an accepted answer, numbers equal by value, "
    "case, order and units counted; numeric: ends with the number that the expected answer ends with",
    "recognisable": "share of answers whose words overlap with an accepted one by F1 >= 0.5",
    "overlap": "mean word F1 with the accepted answer",
}
DERIVED = (
    "graded by the scorer that a question's meta names; else by `numeric` where the expected answer is a worked solution that "
    "ends in a number, by `answer` otherwise; free text (over six words on average) by `recognisable`; --scorer chooses another"
)


@dataclass(slots=True, frozen=True)
class Subject:
    """The model under test, as the functions that evaluation needs."""

    name: str
    model: Any  # models.interface.Model
    encode: Callable[[str], Sequence[int]]  # plain text to ids, without marks
    begin: tuple[int, ...]  # ids before a document: its begin mark, or nothing
    end: tuple[int, ...]  # ids after it
    vocabulary: int
    context: int  # tokens it can read
    generate: questions.Generate | None = None
    prompt: questions.Prompt | None = None  # needed for questions
    decode: Callable[[Sequence[int]], str] | None = None  # with it, documents that do not survive encoding are counted
    device: str = "cpu"
    facts: dict[str, Any] = field(default_factory=dict)  # parameters, path, digest: copied into scores.json


def evaluate(
    subject: Subject,
    out: Path,
    *,
    documents: Path | None = None,
    conversations: Path | None = None,
    yardsticks: bool = True,
    stride: float = 0.5,
    max_documents: int = 0,
    max_questions: int = 500,
    max_tokens: int = 64,
    scorer: str | None = None,
    chance: Mapping[str, float] | None = None,
    batch_tokens: int = 8192,
    seed: int = 0,
    before: Path | None = None,
) -> dict[str, Any]:
    """Measures, writes `out`, prints the table, and returns what scores.json holds.

    `documents` and `conversations` are records folders (train.jsonl, validation.jsonl); the yardsticks learn from
    the train part. `stride` is the share of the context that a window keeps. `before` is the folder of an earlier evaluation, to
    say what changed since. Raises `DataError` with nothing to measure.
    """
    if documents is None and conversations is None:
        raise DataError("nothing to measure", expected="documents, questions, or both", fix="set documents or questions")
    started = time.monotonic()
    result: dict[str, Any] = {"version": 1, "model": {"name": subject.name, **subject.facts}, "definitions": DEFINITIONS}
    held_out: list[Document] = []
    if documents is not None:
        held_out = spread(list(read_records(documents / "validation.jsonl", Document)), max_documents)
        if not held_out:
            raise DataError("no held-out document", file=documents / "validation.jsonl", fix="use a larger validation_share")
    asked: list[Conversation] = []
    if conversations is not None and subject.generate is not None and subject.prompt is not None:
        asked = spread(list(read_records(conversations / "validation.jsonl", Conversation)), max_questions)
        if not asked:
            raise DataError("no held-out question", file=conversations / "validation.jsonl", fix="use a larger validation_share")
    result["how"] = ({"max_tokens": max_tokens, "scorer": scorer or "derived"} if asked else {}) | (
        {"stride": stride} if held_out else {}
    )
    earlier = None if before is None else comparison.Earlier.read(before)
    if earlier is not None:
        earlier.check([c.id for c in asked], [d.id for d in held_out], result["how"])
    if documents is not None:
        result["documents"] = _documents(subject, documents, held_out, yardsticks, stride, batch_tokens, seed)
        log.console.print(documents_table(result["documents"]))
        log.say(result["documents"]["verdict"]["text"])
    predictions: list[questions.Prediction] = []
    if asked:
        assert subject.generate is not None and subject.prompt is not None
        predictions = questions.ask(
            asked, subject.prompt, subject.generate, context=subject.context, max_tokens=max_tokens, scorer=scorer
        )  # fmt: skip
        tasks = [_task(t) for t in questions.scores(predictions, chance)]
        too_long = sum(p.too_long is not None for p in predictions)
        result["questions"] = {"count": len(predictions), "too_long": too_long, "tasks": tasks}
        log.console.print(questions_table(result["questions"]))
        log.say(f"graded by {scorer}" if scorer else DERIVED)
        if too_long:
            log.say(f"{too_long} of {len(predictions)} questions are longer than the context: not asked, counted as wrong")
    if earlier is not None:
        result["gains"] = _gains(earlier, result, predictions, seed)
    shown = _gallery(subject, [d.text for d in held_out], predictions, seed)
    result["seconds"] = round(time.monotonic() - started, 2)
    _write(out, result, predictions, shown)
    return result


def _gains(
    earlier: comparison.Earlier, result: dict[str, Any], predictions: list[questions.Prediction], seed: int
) -> dict[str, Any]:
    judged_by = {row["task"]: row["judged_by"] for row in result.get("questions", {}).get("tasks", [])}
    documents = adaptation_effect.to_sums(result["documents"]["per_document"]) if "documents" in result else None
    found = earlier.gains(predictions, judged_by, documents, seed)
    if "questions" in found:
        log.console.print(comparison.table(found["questions"], found["model"]))
        log.say(comparison.verdict(found["questions"][-1]))
    if "documents" in found:
        log.say(adaptation_effect.verdict(f"against {found['model']}", found["documents"]))
    return found


def _documents(
    subject: Subject, folder: Path, held_out: list[Document], yardsticks: bool, stride: float, batch_tokens: int, seed: int
) -> dict[str, Any]:
    row_length = subject.context
    step = max(1, min(row_length - 1, round(row_length * (1 - stride))))
    started = time.monotonic()
    sums = bits.measure(
        subject.model,
        _encoded(subject, held_out),
        row_length=row_length,
        stride=step,
        batch_tokens=batch_tokens,
        device=subject.device,
    )
    model_seconds = time.monotonic() - started
    ours = sums.bits_per_byte(seed)
    rows = [_row("model", subject.name, ours, "document", {"window_tokens": row_length, "stride_tokens": step})]
    measured: list[Baseline] = []
    if yardsticks:
        train = [d.text for d in read_records(folder / "train.jsonl", Document)]
        measured = measure(train, [d.text for d in held_out], encode=subject.encode, vocabulary=subject.vocabulary)
        rows += [_row(y.name, y.label, y.bits_per_byte(seed), y.unit, y.details) for y in measured]
    changed = 0 if subject.decode is None else sum(subject.decode(subject.encode(d.text)) != d.text for d in held_out)
    return {
        "count": len(held_out),
        "bytes": sum(sums.bytes),
        "tokens": sum(sums.tokens),
        "bytes_per_token": sums.bytes_per_token(),
        "documents_changed_by_tokenizer": changed,
        "rows": rows,
        "perplexity": number(sums.perplexity(seed), "per token", DEFINITIONS["perplexity"]),
        "verdict": verdict(sums, measured, seed),
        "per_document": sums.to_json(),
        "seconds": {"model": round(model_seconds, 2), "all": round(time.monotonic() - started, 2)},
    }


def verdict(sums: bits.DocumentSums, measured: Sequence[Baseline], seed: int = 0) -> dict[str, Any]:
    """The model against the better yardstick, on the same documents, in numbers and in one sentence."""
    ours = sums.bits_per_byte(seed)
    if not measured:
        return {"text": f"{ours.value:.3f} bits per byte; no yardstick was measured."}
    best = min(measured, key=lambda y: y.bits.sum() / y.bytes.sum())
    paid = np.bincount(best.members, weights=sums.bits)
    saving = relative_saving(paid, best.bits, seed=seed)
    size, low, high = abs(saving.value), min(abs(saving.low), abs(saving.high)), max(abs(saving.low), abs(saving.high))
    theirs = best.bits.sum() / best.bytes.sum()
    interval = f" ({low:.1%} to {high:.1%})" if saving.n > 1 else " (one document: no interval)"
    numbers = f"{ours.value:.3f} against {theirs:.3f} bits per byte"
    if saving.low > 0:
        text = f"{size:.1%} fewer bits than the better yardstick{interval}: {best.label}, {numbers}."
    elif saving.high < 0:
        text = f"Worse than a yardstick: {size:.1%} more bits{interval} than {best.label}, {numbers}."
    else:
        span = f"saving {saving.low:+.1%} to {saving.high:+.1%}"
        text = f"No clear difference from the better yardstick: {best.label}, {numbers} ({span})."
    return {
        "text": text, "better_yardstick": best.name, "yardstick_label": best.label,
        "saving": number(saving, f"share of bits, per {best.unit}", DEFINITIONS["saving"]),
    }  # fmt: skip


def _encoded(subject: Subject, held_out: Sequence[Document]) -> Iterator[bits.Encoded]:
    first_nats = 0.0 if subject.begin else math.log(subject.vocabulary)
    for d in held_out:
        ids = np.array([*subject.begin, *subject.encode(d.text), *subject.end], np.int64)
        yield bits.Encoded(ids, len(d.text.encode()), d.id, first_nats)


def _row(name: str, label: str, estimate: Estimate, unit: str, details: dict[str, Any]) -> dict[str, Any]:
    value = number(estimate, f"bits per byte, interval over each {unit}", DEFINITIONS["bits_per_byte"])
    return {"name": name, "label": label, "bits_per_byte": value, "details": details}


def _task(score: questions.TaskScore) -> dict[str, Any]:
    measures = {k: number(getattr(score, k), "share", DEFINITIONS[k]) for k in ("correct", "recognisable", "overlap")}
    return {
        "task": score.task, "judged_by": score.judged_by, "scorer": score.scored_by, **measures, "guess": score.guess,
        "guess_from": score.guess_from, "above_guess": score.above_guess,
        "guess_interval": None if score.guess_interval is None else score.guess_interval.to_json(),
    }  # fmt: skip


def _gallery(subject: Subject, texts: Sequence[str], predictions: Sequence[questions.Prediction], seed: int) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    if subject.generate is not None and texts:
        rows = samples.continuations(subject.generate, subject.encode, subject.begin, documents=texts, seed=seed)
    return {"continuations": rows, "answers": samples.answers(predictions)}


def _write(out: Path, result: dict[str, Any], predictions: Sequence[questions.Prediction], shown: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with whole_file(out / "predictions.jsonl") as f:
        for p in predictions:
            f.write(json.dumps(p.to_json(), ensure_ascii=False) + "\n")
    write_json(out / "gallery.json", shown)
    write_json(out / "scores.json", result)  # last: its presence says that the others are there


def documents_table(documents: dict[str, Any]) -> Table:
    """Bits per byte of the model and the yardsticks, best first."""
    table = Table(title=f"{documents['count']:,} held-out documents, {documents['bytes']:,} bytes", title_justify="left")
    for name, justify in (("", "left"), ("bits per byte", "right"), ("95% interval", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in sorted(documents["rows"], key=lambda r: float(r["bits_per_byte"]["value"])):
        b = row["bits_per_byte"]
        style = "bold" if row["name"] == "model" else None
        interval = f"{b['low']:.3f} to {b['high']:.3f}" if b["n"] > 1 else "one document"
        table.add_row(row["label"], f"{b['value']:.3f}", interval, style=style)
    return table


def questions_table(asked: dict[str, Any]) -> Table:
    """Share of right answers per task, beside what guessing reaches."""
    table = Table(title=f"{asked['count']:,} held-out questions", title_justify="left")
    for name, justify in (
        ("task", "left"),
        ("n", "right"),
        ("judged by", "left"),
        ("share", "right"),
        ("95% interval", "right"),
        ("guessing", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for t in asked["tasks"]:
        m = t[t["judged_by"]]
        interval = f"{m['low']:.1%} to {m['high']:.1%}"
        guess = t.get("guess_interval")
        guessing = f"{t['guess']:.1%}" + (f" ({guess['low']:.1%} to {guess['high']:.1%})" if guess else "")
        cells = (t["task"], str(m["n"]), t.get("scorer", t["judged_by"]), f"{m['value']:.1%}", interval, guessing)
        table.add_row(*cells, style=None if t["above_guess"] else "dim")
    return table
