"""Command `predict`: a classifier's labels for every row of a file. Its result is one file, so it is no run."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tutelage import log
from tutelage.config.stages import Predict
from tutelage.data.groups.examples import Task
from tutelage.data.sources.labelled import texts_of
from tutelage.errors import ConfigError, DataError
from tutelage.files import storage_errors, whole_file
from tutelage.inference.batch import Meter
from tutelage.inference.classifier import Classifier
from tutelage.inference.input_file import InputFile, InputRow, opened
from tutelage.inference.output_file import check_output
from tutelage.inference.prompts import check_text
from tutelage.references import find
from tutelage.setup.trainer import choose_device
from tutelage.train.hooks import duration

AT_A_TIME = 512  # rows, of which those of like length run together
SAID = {"class": "label", "many": "labels", "tag": "spans"}


@dataclass(slots=True, frozen=True)
class TextRow:
    """One row of the input."""

    entry: InputRow
    text: str
    pair: str | None


def run(config: Predict, runs: Path = Path("runs"), *, force: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Predicts the labels of every row of `config.input` into `config.output`, whole or not at all. Returns rows, how many were
    cut, how often each label was predicted, and seconds.

    Raises `DataError` for a row without a text, with file and line, `ArtifactError` for a model that does not classify,
    `ConfigError` for an output that is in the way, and `StorageError` where it cannot be written.
    """
    output = Path(config.output).expanduser()
    model = find(config.model, "model", runs)
    check_output(output, force)
    with storage_errors(output, "--output"), opened(config.input, output, "text", blank_lines=True) as archive:
        if archive.path.resolve() == output.resolve():
            raise ConfigError("the output would replace the input", field="output", found=str(output), expected="another file")
        rows = sum(1 for _ in asked(archive, config))  # errors in the last row are reported before a model is read
        if not rows:
            raise DataError("no rows in this file", file=archive.path, expected='a row a line, such as {"text": "…"}')
        log.say(f"{rows:,} rows")
        if dry_run:
            return {"rows": rows}
        classifier = Classifier(model.path, device=str(choose_device(config)), too_long=config.too_long)
        with whole_file(output, option="--output") as f, Meter(rows, 0) as meter:
            cut, counts = _label(classifier, archive, config, f, meter)
    if cut:
        log.say(f"{cut:,} of {rows:,} texts were cut at the {config.too_long}, to {classifier.encode.max_length} tokens")
    often = ", ".join(f"{name} {count:,}" for name, count in counts.most_common(8)) or "no label"
    log.say(f"{rows:,} rows in {duration(meter.seconds)}: {often}{', …' if len(counts) > 8 else ''}")
    return {"output": config.output, "rows": rows, "cut": cut, "labels": dict(counts), "seconds": round(meter.seconds, 2)}


def asked(archive: InputFile, config: Predict) -> Iterator[TextRow]:
    """The rows with their texts. Raises `DataError` with the place of one that has none."""
    for entry in archive.entries():
        with placed(archive, entry):
            if entry.error is not None:
                raise entry.error
            text, pair = texts_of(entry.fields, config.fields)
            for name, value in (("text", text), ("pair", pair)):
                check_text(value or "", name)
        yield TextRow(entry, text, pair)


@contextlib.contextmanager
def placed(archive: InputFile, entry: InputRow) -> Iterator[None]:
    """Adds file and line to the errors of a row."""
    try:
        yield
    except DataError as error:
        raise error.but(file=archive.path, line=entry.line, fix=error.fix or "mend the row, or leave it out") from None


def _label(classifier: Classifier, archive: InputFile, config: Predict, f: Any, meter: Meter) -> tuple[int, Counter[str]]:
    """Writes all rows. Returns how many were cut, and how often each label was predicted."""
    cut, counts, rows = 0, Counter[str](), asked(archive, config)
    while group := list(islice(rows, AT_A_TIME)):
        read = []
        for row in group:
            with placed(archive, row.entry):
                read.append(classifier.read(row.text if row.pair is None else (row.text, row.pair)))
        found = classifier.judge(read)
        cut += found.cut
        for row, encoded, said, odds in zip(group, read, found.labels, found.probabilities, strict=True):
            counts.update(_names(said, classifier.task))
            f.write(json.dumps(_row(row, said, odds, classifier), ensure_ascii=False, default=str) + "\n")
            meter.add(len(encoded.ids))
    return cut, counts


def _row(row: TextRow, said: Any, odds: np.ndarray, classifier: Classifier) -> dict[str, Any]:
    """One row of the output, with its own id or its line number."""
    fields = row.entry.fields
    out: dict[str, Any] = {"id": fields["id"]} if fields.get("id") is not None else {"number": row.entry.line}
    out["text"] = row.text
    if row.pair is not None:
        out["pair"] = row.pair
    if classifier.task == "tag":
        said = [{"start": s.start, "end": s.end, "label": s.label} for s in said]
    chances = {name: round(float(p), 5) for name, p in zip(classifier.labels, odds, strict=True)}
    return out | {SAID[classifier.task]: said, "probabilities": chances}


def _names(said: Any, task: Task) -> list[str]:
    if task == "tag":
        return [span.label for span in said]
    return [said] if task == "class" else list(said)
