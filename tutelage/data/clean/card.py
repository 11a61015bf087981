"""The data card: what is in a records artifact, where it came from, what was left out and why."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from tutelage import log
from tutelage.errors import Setting

NOTABLE = 0.05  # from this share of the records on, dropped ones are a coloured warning with samples
REASONS = {  # in words, with what keeps such records
    "duplicate": ("equal to an earlier one", f"{Setting('dedup', 'none')} keeps them"),
    "near_duplicate": ("nearly the same as an earlier one", f"{Setting('dedup', 'exact')} keeps them"),
    "found_in_train": (
        "held out, but more than half of the text is in the training part",
        f"{Setting('dedup', 'exact')} keeps them",
    ),
    "prompt_in_train": ("held out, but the same prompt is in the training part", f"{Setting('dedup', 'none')} keeps them"),
    "too_short": ("shorter than min_chars", "lower min_chars to keep them"),
    "too_long": ("longer than max_chars", "raise max_chars to keep them, or cut documents with chunk_chars"),
    "empty": ("nothing but white space", "give the field that holds the text (text_field)"),
    "symbols": ("mostly signs, neither letters nor digits", "look at them in rejected.jsonl"),
    "repeated_lines": ("mostly lines that repeat", "look at them in rejected.jsonl"),
    "repeated_paragraphs": ("mostly paragraphs that repeat", "look at them in rejected.jsonl"),
    "repeated_words": ("mostly words that repeat", "look at them in rejected.jsonl"),
    "no_difference": ("answers that differ in white space only", "give answers that differ"),
}
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
class CardCounts:
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
            "ascii_share": _rounded_down(sum(p.ascii_bytes for p in self.parts.values()) / max(total, 1)),
            "languages_guessed": dict(self.languages.most_common(8)),
            "sources": [{"source": s, "records": n, "characters": self.source_bytes[s]} for s, n in top],
            "sources_total": len(self.sources),
            "licences": dict(self.licences.most_common()),
            "tasks": dict(sorted(self.tasks.items())),
            "samples": [{"id": i, "source": s, "text": t} for i, s, t in self.samples],
            **rest,
        }


def _rounded_down(share: float) -> float:
    """To four digits, so that only a share of all is 1."""
    return math.floor(share * 10_000) / 10_000


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
    share = math.floor(card["ascii_share"] * 1000) / 10
    languages = ", ".join(f"{'not recognised' if k == '?' else k} {v}" for k, v in card["languages_guessed"].items())
    said = "ASCII" if card["settings"]["kind"] == "documents" else "ASCII, labels and tools not counted"
    notes = [f"sources: {card['sources_total']}", f"licences: {', '.join(card['licences'])}", f"{said}: {share}%",
             f"languages (guessed): {languages}"]  # fmt: skip
    log.say("; ".join(notes))
    if kept := card.get("kept_in_meta"):
        log.say(f"kept in meta, not learnt from: {', '.join(f'{key} ({count:,} rows)' for key, count in kept.items())}")
    for suffix, count in card["unknown_suffixes"].items():
        way = "convert them to text, Markdown or HTML" if suffix in DOCUMENTS else "name them one by one to read them as text"
        log.say(f"{count} files with the ending {suffix} were not read: {way}")
    _show_left_out(card)
    _show_changes(card)


def _show_left_out(card: dict[str, Any]) -> None:
    """A warning for each reason that a notable share was left out for, with samples."""
    for reason, found in card["left_out"].items():
        if found["share"] < NOTABLE:
            continue
        words, fix = REASONS.get(reason, ("", "look at them in rejected.jsonl"))
        why = f"{reason} ({words})" if words else reason
        offered = f"{found['records']:,} of {card['offered']:,} records ({found['share']:.0%})"
        log.say(f"warning: {offered} left out: {why}; {fix}", style="yellow")
        for sample in found["samples"]:
            log.say(f"  {sample['source']}: {sample['text']!r}")


def _show_changes(card: dict[str, Any]) -> None:
    """What the settings had changed, always, since it is what a model learns."""
    for what, found in card["changed"].items():
        log.say(f"{what}: {found['texts']:,} texts changed, all in changed.jsonl", style="yellow")
        for sample in found["samples"]:
            log.say(f"  {sample['source']}: {sample['before']!r} -> {sample['after']!r}")
    if card["boilerplate_lines_removed"]:
        how = Setting("boilerplate", "drop")
        log.say(f"{card['boilerplate_lines_removed']:,} shared lines taken out ({how}), the most frequent:")
        for row in card["boilerplate_lines"]:
            log.say(f"  in {row['documents']:,} documents: {row['line']!r}")
    if card["texts_with_c1_controls"]:
        log.say(
            f"warning: {card['texts_with_c1_controls']:,} texts hold control characters U+0080 to U+009F, the sign of a Windows "
            f"file read as latin-1; read it with {Setting('encoding', 'cp1252')}", style="yellow",
        )  # fmt: skip
