"""Cleaning and filters of text. Cleaning changes a text where a setting asks for it; a filter gives a reason or None.

The repetition and symbol rules follow Gopher (Rae et al. 2021, appendix A1.1), on units that cost little in Python:
lines and paragraphs over the whole text, word n-grams over its first 1,000 words.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tutelage.data.clean.dedup import UNSPACED
from tutelage.errors import ConfigError

NORMAL_FORMS = ("NFC", "NFKC", "none")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\u200b\u2060\ufeff\ufffe\uffff]")
C1_CONTROLS = re.compile("[\x80-\x9f]")  # what Windows quotation marks and dashes become in a file read as latin-1
TRAILING = re.compile(r"[ \t\u00a0]+(?=\n)")
MANY_BLANK_LINES = re.compile(r"\n{4,}")
LETTERS_AND_SPACE = bytes(b for b in range(256) if b >= 0x80 or chr(b).isalnum() or chr(b).isspace())
SAMPLE_WORDS = 1000
STRETCH = 12  # characters of a stretch that is looked for again, in scripts without spaces
NGRAM_SHARES = ((2, 0.20), (3, 0.18), (4, 0.16))  # top n-gram's share of the characters
BOILERPLATE_CHARS = (20, 300)  # shorter lines repeat in honest text; longer ones are paragraphs: deduplication's work
COUNTED_LINES = 2_000_000  # distinct lines held at once
COUNTED_WHOLE = 2000  # documents of which each one's lines are counted; of the later ones every eighth


@dataclass(slots=True, frozen=True, kw_only=True)
class FilterOptions:
    """Limits of the filters. A limit of None is not applied."""

    min_chars: int = 20  # shorter documents are left out
    max_chars: int | None = 10_000_000  # longer ones too: one that long is usually a dump
    normalise: str = "none"  # NFC | NFKC (also folds ligatures, full-width forms) | none
    repetition: bool = True  # documents that mostly repeat themselves are left out
    max_symbol_share: float | None = 0.5  # characters that are neither letters, digits nor space

    def __post_init__(self) -> None:
        if self.normalise not in NORMAL_FORMS:
            expected = " | ".join(NORMAL_FORMS)
            raise ConfigError("unknown normal form", field="normalise", found=self.normalise, expected=expected)


def clean(text: str, form: str = "NFC") -> str:
    """`text` in one Unicode normal form, with \\n line ends, no control characters, no trailing spaces.

    Idempotent: cleaning a cleaned text changes nothing, so ids are stable.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = normal(text, form)
    if CONTROL.search(text):
        text = CONTROL.sub("", text)
    if " \n" in text or "\t\n" in text or "\u00a0\n" in text:
        text = TRAILING.sub("", text)
    if "\n\n\n\n" in text:
        text = MANY_BLANK_LINES.sub("\n\n\n", text)
    return text.rstrip().lstrip("\n")


def tidied(text: str, form: str, *, clean_layout: bool) -> tuple[str, list[str]]:
    """(the text as the settings want it, what was done to it). Nothing is done that was not asked for."""
    done = []
    if clean_layout:
        cleaned = clean(text, "none")
        if cleaned != text:
            done.append("cleaned")
        text = cleaned
    wanted = normal(text, form)
    if wanted != text:
        done.append(f"to {form}")
    return wanted, done


def normal(text: str, form: str) -> str:
    """`text` in the Unicode normal form NFC or NFKC; as it is for `none`."""
    if form == "none" or text.isascii() or unicodedata.is_normalized(form, text):  # type: ignore[arg-type]
        return text
    return unicodedata.normalize(form, text)  # type: ignore[arg-type]


def reason_against(text: str, options: FilterOptions) -> str | None:
    """Why a document is left out, or None. The reason is a fixed name, fit for counting."""
    body = text.strip()
    if not body:
        return "empty"
    if len(body) < options.min_chars:
        return "too_short"
    if options.max_chars is not None and len(text) > options.max_chars:
        return "too_long"
    if options.max_symbol_share is not None and symbol_share(text) > options.max_symbol_share:
        return "symbols"
    return repetition(text) if options.repetition else None


def symbol_share(text: str) -> float:
    """Share of the bytes that are ASCII and neither letter, digit nor white space."""
    data = text.encode("utf-8", "surrogatepass")
    return len(data.translate(None, LETTERS_AND_SPACE)) / max(len(data), 1)


def repetition(text: str) -> str | None:
    """Why the text counts as repetitive, or None. Texts under 200 characters never do."""
    if len(text) < 200:
        return None
    lines = text.split("\n")
    if len(lines) >= 8:
        reason = _repeated(lines, "repeated_lines")
        if reason is None and "\n\n" in text:
            paragraphs = text.split("\n\n")
            reason = _repeated(paragraphs, "repeated_paragraphs") if len(paragraphs) >= 8 else None
        if reason:
            return reason
    if _repeated_stretches(text[: SAMPLE_WORDS * 8]):
        return "repeated_words"
    words = text[: SAMPLE_WORDS * 8].split()[:SAMPLE_WORDS]
    if len(words) < 20 or len(set(words)) > 0.3 * len(words):
        return None
    return _repeated_ngrams(words)


def _repeated(units: list[str], name: str) -> str | None:
    """`name` where over 30% of the units, or of their characters, are repeats of an earlier one (blank ones aside)."""
    distinct = set(units)
    if len(distinct) > 0.7 * len(units):
        return None
    full = [u for u in units if u and not u.isspace()]
    distinct.discard("")
    repeated_chars = sum(map(len, full)) - sum(map(len, distinct))
    few_units = len(full) - len(distinct) > 0.3 * len(full)
    return name if few_units and repeated_chars > 0.2 * sum(map(len, full)) else None


def _repeated_stretches(text: str) -> bool:
    """Whether a text in a script without spaces says few things again and again: under 30% of its stretches are distinct."""
    if text.isascii():
        return False
    letters = "".join(text.split())
    stretches = len(letters) - STRETCH + 1
    if stretches < 100 or len(UNSPACED.findall(letters)) < 0.5 * len(letters):
        return False
    return len({letters[i : i + STRETCH] for i in range(stretches)}) <= 0.3 * stretches


def _repeated_ngrams(words: list[str]) -> str | None:
    total = sum(map(len, words))
    for n, limit in NGRAM_SHARES:
        top, count = Counter(zip(*(words[i:] for i in range(n)), strict=False)).most_common(1)[0]
        if count > 1 and count * sum(map(len, top)) > limit * total:
            return "repeated_words"
    return None


class LineCounter:
    """Finds lines that many documents share: navigation, page headers, licence notices; but in code and tables also `else:` and
    heads of columns, so that only a setting takes them out.

    A line counts once a document; of a large collection every eighth document is looked at. At most `COUNTED_LINES`
    distinct lines are held: the ones seen once are forgotten when there are more (lossy counting, Manku and Motwani
    2002), which never forgets a frequent line for long.
    """

    def __init__(self, min_documents: int = 10, min_share: float = 0.1) -> None:
        self.counts: Counter[str] = Counter()
        self.documents = 0  # looked at
        self.offered = 0
        self.min_documents, self.min_share = min_documents, min_share

    def add(self, text: str) -> None:
        self.offered += 1
        if self.offered > COUNTED_WHOLE and self.offered % 8:
            return
        low, high = BOILERPLATE_CHARS
        self.documents += 1
        self.counts.update({line for line in text.split("\n") if low <= len(line) <= high})
        if len(self.counts) > COUNTED_LINES:
            self.counts = Counter({line: n for line, n in self.counts.items() if n > 1})

    def boilerplate(self) -> frozenset[str]:
        """Lines in at least `min_documents` documents and `min_share` of those looked at."""
        least = max(self.min_documents, self.min_share * self.documents)
        return frozenset(line for line, n in self.counts.items() if n >= least)

    def most_shared(self, count: int) -> list[tuple[str, int]]:
        """The lines of `boilerplate` that most of the documents looked at have, with the number of those."""
        lines = sorted(self.boilerplate(), key=lambda line: (-self.counts[line], line))[:count]
        return [(line, self.counts[line]) for line in lines]


def without_lines(text: str, unwanted: Iterable[str]) -> tuple[str, int]:
    """(text without the unwanted lines, how many lines went)."""
    unwanted = unwanted if isinstance(unwanted, frozenset) else frozenset(unwanted)
    lines = text.split("\n")
    kept = [line for line in lines if line not in unwanted]
    gone = len(lines) - len(kept)
    return ("\n".join(kept).strip("\n"), gone) if gone else (text, 0)
