"""The account of what `data` left out and what it changed: counts, samples for people, and a line for each text changed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

from tutelage.data.sources.readers_base import EXCERPT_CHARS, Rejections
from tutelage.unicode import printable

SAMPLES = 3  # of each reason
SHOWN_CHARS = 120


class Account(Rejections):
    """`Rejections` that also keeps the first texts left out for each reason."""

    def __init__(self, path: Path | None, on_error: str, max_share: float) -> None:
        super().__init__(path, on_error, max_share)
        self.samples: dict[str, list[dict[str, str]]] = {}

    def add(self, reason: str, *, source: str, excerpt: str = "", **rest: Any) -> None:
        Rejections.add(self, reason, source=source, excerpt=excerpt, **rest)
        kept = self.samples.setdefault(reason, [])
        if len(kept) < SAMPLES:
            kept.append({"source": source, "text": printable(excerpt[:SHOWN_CHARS], lines=True)})

    def summary(self) -> dict[str, dict[str, Any]]:
        """By reason, the most frequent first: how many records, their share of those offered, and samples."""
        total = max(self.seen, 1)
        return {
            reason: {"records": n, "share": round(n / total, 6), "samples": self.samples.get(reason, [])}
            for reason, n in self.reasons.most_common()
        }


class Changes:
    """Texts that were changed because a setting asked for it: counted by what was done, and written to changed.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()  # texts
        self.samples: dict[str, list[dict[str, str]]] = {}
        self._file: TextIO | None = None

    def add(self, what: str, *, source: str, before: str, after: str) -> None:
        """One text changed. The excerpts begin a little before the first difference."""
        same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
        at = max(same - 20, 0)
        self.counts[what] += 1
        kept = self.samples.setdefault(what, [])
        if len(kept) < SAMPLES:
            kept.append({"source": source, "before": before[at : at + SHOWN_CHARS], "after": after[at : at + SHOWN_CHARS]})
        if self._file is None:
            self._file = self.path.open("w", encoding="utf-8")
        cut = slice(at, at + EXCERPT_CHARS)
        row = {"change": what, "source": source, "at": same, "before": before[cut], "after": after[cut]}
        self._file.write(json.dumps(row) + "\n")

    def summary(self) -> dict[str, dict[str, Any]]:
        return {what: {"texts": n, "samples": self.samples[what]} for what, n in self.counts.most_common()}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
