"""The data card: what is in a records artifact, where it came from, what was left out and why."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from tutelage import log

QUANTILES = (0, 5, 25, 50, 75, 95, 100)
NOT_ASCII = bytes(range(128, 256))
LANGUAGE_SAMPLE = 500  # documents whose language is guessed
# Frequent words that tell languages apart: a guess for a summary, not a classifier.
STOP_WORDS = {
    "en": "the and of to is that with for this are was which from", "de": "der die und das ist nicht mit den ein sich auf für",
    "fr": "le les des est une dans que pour qui pas sur avec", "es": "el los las una que por con para del se como más",
    "it": "il che di gli una per con della sono non nel anche", "pt": "o os uma que não com para do da em mais foi",
    "nl": "de het een van en niet dat zijn met voor op ook",
}  # fmt: skip
SCRIPTS = (("zh/ja", "[\u3040-\u30ff\u4e00-\u9fff]"), ("ko", "[\uac00-\ud7af]"), ("Cyrillic", "[\u0400-\u04ff]"),
           ("Arabic", "[\u0600-\u06ff]"), ("Devanagari", "[\u0900-\u097f]"), ("Greek", "[\u0370-\u03ff]"))  # fmt: skip
# Formats of documents that are no text: naming such a file would not read it
DOCUMENTS = {
    ".doc", ".docx", ".odt", ".rtf", ".epub", ".mobi", ".azw3", ".xls", ".xlsx", ".ods", ".ppt", ".pptx", ".odp",
    ".pages", ".ps", ".djvu", ".mbox", ".mbx", ".eml", ".msg", ".mht", ".mhtml", 
    ".zip", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".tar",
}  # fmt: skip


@dataclass(slots=True)
class Part:
    """Sizes of one side of the split."""

    lengths: array[int] = field(default_factory=lambda: array("Q"))  # characters
    bytes: int = 0
    ascii_bytes: int = 0

    def add(self, text: str) -> None:
        self.lengths.append(len(text))
        if text.isascii():
            self.bytes += len(text)
            self.ascii_bytes += len(text)
        else:
            data = text.encode("utf-8", "surrogatepass")
            self.bytes += len(data)
            self.ascii_bytes += len(data.translate(None, NOT_ASCII))

    def summary(self) -> dict[str, Any]:
        values = np.percentile(np.asarray(self.lengths), QUANTILES).round().astype(int).tolist() if self.lengths else []
        return {
            "records": len(self.lengths), "bytes": self.bytes, "characters": sum(self.lengths),
            "length_quantiles": {f"p{q}": v for q, v in zip(QUANTILES, values, strict=False)},
        }  # fmt: skip


@dataclass(slots=True)
class Tally:
    """Counts gathered while the records are written."""

    parts: dict[str, Part] = field(default_factory=lambda: {"train": Part(), "validation": Part()})
    sources: Counter[str] = field(default_factory=Counter)
    source_bytes: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[str, str, str]] = field(default_factory=list)  # (id, source, text) of the smallest ids

    def add(self, row: dict[str, Any], text: str, part: str) -> None:
        self.parts[part].add(text)
        source = _group(row["source"])
        self.sources[source] += 1
        self.source_bytes[source] += len(text)
        self.licences[row.get("licence") or "unknown"] += 1
        task = row.get("meta", {}).get("task")
        if task:
            self.tasks[f"{task} ({part})"] += 1
        if sum(self.languages.values()) < LANGUAGE_SAMPLE:
            self.languages[guess_language(text)] += 1
        if part == "train" and (len(self.samples) < 3 or row["id"] < self.samples[-1][0]):
            self.samples = sorted([*self.samples, (row["id"], row["source"], text[:400])])[:3]

    def card(self, **rest: Any) -> dict[str, Any]:
        """card.json. `rest` adds what the caller counted: reasons, duplicates, settings."""
        total = sum(p.bytes for p in self.parts.values())
        top = self.sources.most_common(50)
        return {
            "records": sum(len(p.lengths) for p in self.parts.values()),
            "bytes": total,
            "parts": {name: part.summary() for name, part in self.parts.items()},
            "ascii_share": round(sum(p.ascii_bytes for p in self.parts.values()) / max(total, 1), 4),
            "languages_guessed": dict(self.languages.most_common(8)),
            "sources": [{"source": s, "records": n, "characters": self.source_bytes[s]} for s, n in top],
            "sources_total": len(self.sources),
            "licences": dict(self.licences.most_common()),
            "tasks": dict(sorted(self.tasks.items())),
            "samples": [{"id": i, "source": s, "text": t} for i, s, t in self.samples],
            **rest,
        }


def _group(source: str) -> str:
    """The file or reader a record came from, without the position inside it."""
    head = source.split("#", 1)[0]
    return re.sub(r"^(python-docs|python-code|python-questions):.*", r"\1:", head)


def guess_language(text: str) -> str:
    """ISO code of a European language by stop words, the script's name for others, `?` where nothing speaks for any."""
    sample = text[:2000]
    if not sample.isascii():
        for name, pattern in SCRIPTS:
            if len(re.findall(pattern, sample)) > 0.2 * len(sample):
                return name
    words = set(sample.lower().split())
    scores = {code: len(words & set(listed.split())) for code, listed in STOP_WORDS.items()}
    best = max(scores, key=lambda code: scores[code])
    return best if scores[best] >= 2 else "?"


def show(card: dict[str, Any]) -> None:
    """Prints the card as a table for people."""
    table = Table(title="Data card", show_header=True, header_style="bold", title_justify="left")
    for column in ("", "records", "bytes", "median characters"):
        table.add_column(column, justify="left" if not column else "right")
    for name, part in card["parts"].items():
        median = part["length_quantiles"].get("p50", 0)
        table.add_row(name, f"{part['records']:,}", f"{part['bytes']:,}", f"{median:,}")
    table.add_section()
    for reason, count in card["rejected"].items():
        table.add_row(Text(f"left out: {reason}"), f"{count:,}", "", "")
    log.console.print(table)
    notes = [f"sources: {card['sources_total']}", f"licences: {', '.join(card['licences'])}", f"ASCII: {card['ascii_share']:.1%}",
             f"languages (guessed): {', '.join(f'{k} {v}' for k, v in card['languages_guessed'].items())}"]  # fmt: skip
    log.say("; ".join(notes))
    if kept := card.get("kept_in_meta"):
        log.say(f"kept in meta, not learnt from: {', '.join(f'{key} ({count:,} rows)' for key, count in kept.items())}")
    for suffix, count in card["unknown_suffixes"].items():
        way = "convert them to text, Markdown or HTML" if suffix in DOCUMENTS else "name them one by one to read them as text"
        log.say(f"{count} files with the ending {suffix} were not read: {way}")
