"""The effect of training: bits per byte of the same held-out documents before and after.

Bits per byte do not depend on the tokenizer, so the models may have different ones. The change is measured document by document:
its interval is that of the difference, far narrower than the intervals of the two numbers suggest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from tutelage.errors import ArtifactError, DataError
from tutelage.evaluate import bits
from tutelage.evaluate.bits import DocumentSums
from tutelage.evaluate.intervals import number, ratio, relative_saving
from tutelage.models.adapters.virtual_tokens import max_text_tokens
from tutelage.records import Document, read_records, spread
from tutelage.tokenizer.load import TokenizerFolder

WINDOW = 2048  # tokens read at once, at most

DEFINITION = "bits for the held-out documents after training minus those before, divided by the UTF-8 bytes of their text"


def held_out(records: Path, most: int, what: str) -> list[Document]:
    """The held-out documents of a records artifact, at most `most` of them (0: all). Raises `DataError` where there is none."""
    found: list[Document] = spread(list(read_records(records / "validation.jsonl", Document)), most)
    if not found:
        raise DataError(
            f"{what} has no held-out document, so the effect of training can't be measured", file=records / "validation.jsonl",
            fix="make it with a larger validation_share, or with validation_sources",
        )  # fmt: skip
    return found


def measure(model: Any, words: TokenizerFolder, documents: Sequence[Document], device: str) -> DocumentSums:
    """The nats that `model`, with the tokenizer `words`, needs for each document. Raises `ArtifactError` where the tokenizer has
    no end token."""
    if words.eos_id is None:
        raise ArtifactError(
            "the tokenizer has no end token, so the end of a document has no cost", file=words.folder,
            fix="add eos_token to tokenizer_config.json",
        )  # fmt: skip
    marks = words.start_id, words.eos_id
    encoded = (
        bits.Encoded(np.array([marks[0], *words.encode_text(d.text), marks[1]], np.int64), len(d.text.encode()), d.id)
        for d in documents
    )
    return bits.measure(model, encoded, row_length=min(max_text_tokens(model), WINDOW), device=device)


def to_sums(rows: Sequence[Mapping[str, Any]]) -> DocumentSums:
    """The inverse of `DocumentSums.to_json`."""
    return DocumentSums(*([row[key] for row in rows] for key in ("nats", "tokens", "bytes", "document")))


def effect(before: DocumentSums, after: DocumentSums, seed: int = 0) -> dict[str, Any]:
    """Bits per byte before and after, the change, and the change as a share, each with a bootstrap over documents."""
    assert before.names == after.names and before.bytes == after.bytes
    saved = relative_saving(after.bits, before.bits, seed=seed)
    return {
        "documents": len(before.names),
        "bytes": sum(before.bytes),
        "before": before.bits_per_byte(seed).to_json(),
        "after": after.bits_per_byte(seed).to_json(),
        "change": number(ratio(after.bits - before.bits, before.bytes, seed=seed), "bits per byte, per document", DEFINITION),
        "share": {"value": -saved.value, "low": -saved.high, "high": -saved.low},
        "bytes_per_token": [before.bytes_per_token(), after.bytes_per_token()],
    }


def verdict(name: str, found: Mapping[str, Any]) -> str:
    """One sentence. Example: `domain: 3.210 to 2.480 bits per byte, -22.7% (-23.5% to -21.9%)`."""
    s = found["share"]
    interval = f" ({s['low']:+.1%} to {s['high']:+.1%})" if found["documents"] > 1 else " (one document: no interval)"
    sure = found["documents"] > 1 and not s["low"] <= 0 <= s["high"]
    before, after = (found[k]["value"] for k in ("before", "after"))
    return f"{name}: {before:.3f} to {after:.3f} bits per byte, {s['value']:+.1%}{interval}{'' if sure else ', no clear change'}"


def table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """A line for each kind of text."""
    out = Table(title="held-out text, bits per byte: less is better", title_justify="left")
    for name in ("", "documents", "before", "after", "change", "95% interval", "bytes per token"):
        out.add_column(name, justify="left" if not name else "right")
    for name, found in rows.items():
        c, (old, new) = found["change"], found["bytes_per_token"]
        numbers = (f"{found[k]['value']:.3f}" for k in ("before", "after"))
        interval = f"{c['low']:+.3f} to {c['high']:+.3f}" if c["n"] > 1 else "one document"
        tokens = f"{old:.2f}" if old == new else f"{old:.2f} to {new:.2f}"
        out.add_row(name, f"{found['documents']:,}", *numbers, f"{c['value']:+.3f}", interval, tokens)
    return out
