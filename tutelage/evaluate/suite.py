"""The whole evaluation of one model: scores.json, predictions.jsonl, samples.json, and tables on the terminal.

The caller provides the model, its tokenizer as functions and a `Generate`; nothing here loads or serves anything.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.table import Table

from tutelage import log
from tutelage.errors import DataError
from tutelage.evaluate import adaptation_effect, bits, comparison, questions, samples
from tutelage.evaluate.baselines import Baseline, measure
from tutelage.evaluate.intervals import Estimate, number, relative_saving
from tutelage.evaluate.report_models import VERSION
from tutelage.files import whole_file, write_json
from tutelage.records import Conversation, Document, read_records, spread

Held = TypeVar("Held", Document, Conversation)

DEFINITIONS = {
    "bits_per_byte": "bits for the held-out documents, their ends included, divided by the UTF-8 bytes of their text",
    "perplexity": "exp of the mean nats per predicted token; depends on the tokenizer",
    "saving": "1 - bits of the model / bits of the best baseline, on the same documents",
    "correct": "share of answers that the task's scorer calls right; answer: states an accepted answer, with numbers compared by "
    "value, and case, order and units significant; numeric: ends with the number that the expected answer ends with; "
    "word_overlap, for free text: word F1 of at least 0.5 with an accepted answer, and the same numbers",
    "word_f1": "mean word F1 with the best accepted answer, for tasks graded by word_overlap",
}
DERIVED = (
    "each question is graded by the scorer that its meta names; without one, by `numeric` where the expected answer is a worked "
    "solution that ends in a number, else by `answer`, and free text (over six words on average) by `word_overlap`; --scorer "
    "chooses another"
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
    decode: Callable[[Sequence[int]], str] | None = None  # counts documents that encoding changes
    device: str = "cpu"
    facts: dict[str, Any] = field(default_factory=dict)  # parameters, path, digest: copied into scores.json


def evaluate(
    subject: Subject,
    out: Path,
    *,
    documents: Path | None = None,
    conversations: Path | None = None,
    baselines: bool = True,
    stride: float = 0.5,
    max_documents: int = 0,
    max_questions: int = 500,
    max_tokens: int = 64,
    scorer: str | None = None,
    chance: Mapping[str, float] | None = None,
    batch_tokens: int = 8192,
    seed: int = 0,
    compare_with: Path | None = None,
) -> dict[str, Any]:
    """Measures, writes `out`, prints the table, and returns what scores.json holds.

    `documents` and `conversations` are records folders (train.jsonl, validation.jsonl); the baselines learn from
    the train part. `stride` is the share of the context that a window keeps. `compare_with` is the folder of another model's
    evaluation, compared question by question and document by document. Raises `DataError` with nothing to measure.
    """
    if documents is None and conversations is None:
        raise DataError("nothing to measure", expected="documents, questions, or both", fix="set documents or questions")
    started = time.monotonic()
    result: dict[str, Any] = {"version": VERSION, "model": {"name": subject.name, **subject.facts}, "definitions": DEFINITIONS}
    held_out = [] if documents is None else _held_out(documents, Document, max_documents)
    can_answer = subject.generate is not None and subject.prompt is not None
    asked = _held_out(conversations, Conversation, max_questions) if conversations is not None and can_answer else []
    result["how"] = ({"max_tokens": max_tokens, "scorer": scorer or "derived"} if asked else {}) | (
        {"stride": stride} if held_out else {}
    )
    reference = None if compare_with is None else comparison.Reference.read(compare_with)
    if reference is not None:  # its answers are graded again, so another scorer is no obstacle
        paired = {name: value for name, value in result["how"].items() if name != "scorer"}
        reference.check([c.id for c in asked], [d.id for d in held_out], paired)
    if documents is not None:
        result["documents"] = _documents(subject, documents, held_out, baselines, stride, batch_tokens, seed)
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
        name = _name(conversations) if conversations else ""
        result["questions"] = {"data": name, "count": len(predictions), "too_long": too_long, "tasks": tasks}
        log.console.print(questions_table(subject.name, result["questions"]))
        log.say(f"graded by {scorer}" if scorer else DERIVED)
        if too_long:
            log.say(f"{too_long} of {len(predictions)} questions are longer than the context: they count as wrong")
    if reference is not None:
        theirs = reference.graded(asked, scorer)
        result["comparison"] = _comparison(subject.name, predictions, result, reference, theirs, seed)
    shown = _samples(subject, [d.text for d in held_out], predictions, seed)
    result["seconds"] = round(time.monotonic() - started, 2)
    _write(out, result, predictions, shown)
    return result


def _comparison(
    name: str,
    predictions: Sequence[questions.Prediction],
    result: Mapping[str, Any],
    reference: comparison.Reference,
    theirs: Sequence[questions.Prediction],
    seed: int,
) -> dict[str, Any]:
    documents = adaptation_effect.to_sums(result["documents"]["per_document"]) if "documents" in result else None
    found = comparison.compare(name, predictions, documents, reference, theirs, seed)
    if "questions" in found:
        log.console.print(comparison.table(found))
        log.say(comparison.verdict(found))
    if "documents" in found:
        log.say(adaptation_effect.verdict(f"{reference.model} to {name}", found["documents"]))
    return found


def _held_out(records: Path, kind: type[Held], most: int) -> list[Held]:
    """At most `most` records of the validation part, evenly spread (0: all). Raises `DataError` where there is none."""
    file = records / "validation.jsonl"
    found = spread(list(read_records(file, kind)), most)
    if not found:
        what = "document" if issubclass(kind, Document) else "question"
        raise DataError(f"no held-out {what}", file=file, fix="use a larger validation_share")
    return found


def _name(records: Path) -> str:
    """What people call a records artifact: its run directory, or its folder."""
    folder = records.resolve()
    return folder.parent.name if folder.name == "records" else folder.name


def _documents(
    subject: Subject, folder: Path, held_out: list[Document], baselines: bool, stride: float, batch_tokens: int, seed: int
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
    if baselines:
        train = [d.text for d in read_records(folder / "train.jsonl", Document)]
        measured = measure(train, [d.text for d in held_out], encode=subject.encode, vocabulary=subject.vocabulary)
        rows += [_row(y.name, y.label, y.bits_per_byte(seed), y.unit, y.details) for y in measured]
    changed = 0 if subject.decode is None else sum(subject.decode(subject.encode(d.text)) != d.text for d in held_out)
    return {
        "data": _name(folder),
        "count": len(held_out),
        "bytes": sum(sums.bytes),
        "tokens": sum(sums.tokens),
        "bytes_per_token": sums.bytes_per_token(),
        "documents_changed_by_tokenizer": changed,
        "rows": rows,
        "perplexity": number(sums.perplexity(seed), "per token", DEFINITIONS["perplexity"]),
        "verdict": verdict(sums, measured, seed, model=subject.name, data=_name(folder)),
        "per_document": sums.to_json(),
        "seconds": {"model": round(model_seconds, 2), "all": round(time.monotonic() - started, 2)},
    }


def verdict(
    sums: bits.DocumentSums, measured: Sequence[Baseline], seed: int = 0, *, model: str = "the model", data: str = ""
) -> dict[str, Any]:
    """The model against the best baseline, on the same documents, in numbers and in one sentence."""
    ours = sums.bits_per_byte(seed)
    where = f"{len(sums.bytes):,} held-out documents{' of ' if data else ''}{data}"
    if not measured:
        return {"text": f"{model} needs {ours.value:.3f} bits per byte for {where}; no baseline was measured."}
    best = min(measured, key=lambda y: y.bits.sum() / y.bytes.sum())
    paid = np.bincount(best.members, weights=sums.bits)
    saving = relative_saving(paid, best.bits, seed=seed)
    size, low, high = abs(saving.value), min(abs(saving.low), abs(saving.high)), max(abs(saving.low), abs(saving.high))
    interval = f" ({low:.1%} to {high:.1%})" if saving.n > 1 else " (one document: no interval)"
    numbers = f"{where}: {ours.value:.3f} against {best.bits.sum() / best.bytes.sum():.3f} bits per byte"
    if saving.low > 0:
        text = f"{model} needs {size:.1%} fewer bits{interval} than the best baseline ({best.label}) for {numbers}."
    elif saving.high < 0:
        text = f"{model} is worse than a baseline: it needs {size:.1%} more bits{interval} than {best.label} for {numbers}."
    else:
        span = f"saving {saving.low:+.1%} to {saving.high:+.1%}"
        text = f"{model} shows no clear difference from the best baseline ({best.label}) for {numbers} ({span})."
    return {
        "text": text, "best_baseline": best.name, "baseline_label": best.label,
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
    f1 = {} if score.word_f1 is None else {"word_f1": number(score.word_f1, "word F1, per question", DEFINITIONS["word_f1"])}
    return {
        "task": score.task, "scorer": ", ".join(score.scorers),
        "correct": number(score.correct, "share, per question", DEFINITIONS["correct"]), **f1,
        "guess": score.guess, "guess_from": score.guess_from, "above_guess": score.above_guess,
        "guess_interval": None if score.guess_interval is None else score.guess_interval.to_json(),
    }  # fmt: skip


def _samples(subject: Subject, texts: Sequence[str], predictions: Sequence[questions.Prediction], seed: int) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    if subject.generate is not None and texts:
        rows = samples.continuations(subject.generate, subject.encode, subject.begin, documents=texts, seed=seed)
    return {"continuations": rows, "answers": samples.answers(predictions)}


def _write(out: Path, result: dict[str, Any], predictions: Sequence[questions.Prediction], shown: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with whole_file(out / "predictions.jsonl") as f:
        for p in predictions:
            f.write(json.dumps(p.to_json(), ensure_ascii=False) + "\n")
    write_json(out / "samples.json", shown)
    write_json(out / "scores.json", result)  # last: where it exists, so do the others


def documents_table(documents: dict[str, Any]) -> Table:
    """Bits per byte of the model and the baselines, best first; the model's perplexity next to it."""
    title = f"{documents['count']:,} held-out documents of {documents['data']}, {documents['bytes']:,} bytes"
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    table.add_column("bits per byte (95% interval)", justify="right", no_wrap=True)
    table.add_column("perplexity (95% interval)", justify="right", no_wrap=True)
    for row in sorted(documents["rows"], key=lambda r: float(r["bits_per_byte"]["value"])):
        ours = row["name"] == "model"
        perplexity = _cell(documents["perplexity"], ".1f") if ours else ""
        table.add_row(row["label"], _cell(row["bits_per_byte"], ".3f"), perplexity, style="bold" if ours else None)
    return table


def _cell(value: Mapping[str, Any], form: str) -> str:
    interval = f"{value['low']:{form}} to {value['high']:{form}}" if value["n"] > 1 else "one document"
    return f"{value['value']:{form}} ({interval})"


def questions_table(model: str, asked: dict[str, Any]) -> Table:
    """The model's share of right answers per task, and that of guessing."""
    table = Table(title=f"{asked['count']:,} held-out questions of {asked['data']}, answered by {model}", title_justify="left")
    for name in ("task", "n", "scorer", "right", "95% interval", "guessing"):
        table.add_column(name, justify="left" if name in ("task", "scorer") else "right")
    for t in asked["tasks"]:
        m, guess = t["correct"], t["guess_interval"]
        interval = f"{m['low']:.1%} to {m['high']:.1%}"
        guessing = f"{t['guess']:.1%}" + (f" ({guess['low']:.1%} to {guess['high']:.1%})" if guess else "")
        cells = (t["task"], str(m["n"]), t["scorer"], f"{m['value']:.1%}", interval, guessing)
        table.add_row(*cells, style=None if t["above_guess"] else "dim")
    return table
