"""Texts that must match a regular expression, or have a form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tutelage.config import rewards as config
from tutelage.errors import ConfigError
from tutelage.records import Rollout
from tutelage.rewards import TermScore, verify
from tutelage.rewards.texts import told


class Regex:
    """1 where the text matches. Patterns can take for ever on some texts, so they run in workers."""

    def __init__(self, settings: config.Regex) -> None:
        self.settings = settings
        if settings.pattern is not None:
            check_pattern(settings.pattern)
        self._workers = verify.workers("parsers:regex", settings.seconds)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[TermScore]:
        return verify.judge(self._workers, rollouts, self.settings.tag, self._question, "its pattern is no regular expression")

    def _question(self, rollout: Rollout, text: str) -> dict[str, Any]:
        own = self.settings.pattern
        pattern = told(rollout, "pattern", "regular expression") if own is None else own
        return {"pattern": pattern, "text": text, "full": self.settings.match == "full"}

    def close(self) -> None:
        self._workers.close()


class Format:
    """1 where the text is the tags in their order, or matches the pattern as a whole."""

    def __init__(self, settings: config.Format) -> None:
        self.settings = settings
        same = config.Regex(pattern=settings.pattern, match="full", seconds=settings.seconds) if settings.pattern else None
        self._regex = Regex(same) if same else None

    def __call__(self, rollouts: Sequence[Rollout]) -> list[TermScore]:
        if self._regex is not None:
            return self._regex(rollouts)
        return [TermScore(float(not why), why) for why in (self._wrong(r.text) for r in rollouts)]

    def _wrong(self, text: str) -> str:
        """What the form lacks, found by searching for fixed words only."""
        at = 0
        for tag in self.settings.tags:
            for mark in (f"<{tag}>", f"</{tag}>"):
                if text.count(mark) != 1:
                    return f"{text.count(mark)} times {mark}"
            start, end = text.find(f"<{tag}>"), text.find(f"</{tag}>")
            if text[at:start].strip() or not at <= start < end:
                return f"<{tag}> is not where it belongs"
            at = end + len(tag) + 3
        return "text after the last tag" if text[at:].strip() else ""

    def close(self) -> None:
        if self._regex is not None:
            self._regex.close()


def check_pattern(pattern: str) -> None:
    """Raises `ConfigError` for what is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"not a regular expression: {error}", field="pattern", found=pattern) from error
