"""Stage `tokenizer`: records -> tokenizer artifact and its compression report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tutelage import log
from tutelage.config.stages import Tokenizer
from tutelage.files import write_json
from tutelage.records import TURNS, TYPES, read_records
from tutelage.rundir import RunDir
from tutelage.setup.inputs import record_type
from tutelage.tokenizer import measure as fit
from tutelage.tokenizer.train import describe, train


def texts(records: Path, split: str) -> Iterator[str]:
    """The texts of one split of a records artifact; of what has turns, each message."""
    record: Any
    for record in read_records(records / f"{split}.jsonl", TYPES[record_type(records)]):
        yield from (text for name in ("text", "pair") if (text := getattr(record, name, None)))
        for name in TURNS:
            turns = getattr(record, name, None)
            said = (text for m in turns for text in (m.reasoning_content, m.content)) if isinstance(turns, tuple) else ()
            yield from (text for text in said if text)


def run(config: Tokenizer, run: RunDir) -> dict[str, Any]:
    records = run.input("data")
    out = run.folder("tokenizer")
    facts = train(
        texts(records, "train"), vocab_size=config.vocab_size, pattern=config.pattern, template=config.template, out=out
    )
    log.say(describe(facts))
    report = fit.measure(out, texts(records, "validation"))
    log.say(fit.describe(report, f"the held-out texts of {run.inputs['data'].name}"))
    write_json(run.folder("compression.json"), report)
    return {**facts, **{k: v for k, v in report.items() if isinstance(v, int | float)}}
