"""Terms that need no parser: equality, numbers, length."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache

from tutelage.config import rewards as config
from tutelage.errors import RewardError, Setting
from tutelage.records import Rollout
from tutelage.rewards import TermScore
from tutelage.rewards.answers import right, same_number
from tutelage.rewards.forms import folded
from tutelage.rewards.numbers import final_number
from tutelage.rewards.texts import accepted, inside, place

LAST_CHARS = 20_000  # of a text, in which its number is looked for
BLOCK = 4096  # characters that are normalised at a time
SHRINK = 4  # characters at most that NFKC makes one of
_SIGN = re.compile(r"(?<!\w)-(?=\.?\d)")  # of a number, which punctuation is not
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


class Exact:
    """1 where the text is an expected answer, but for space and typography. It is read up to the first word that is another."""

    def __init__(self, settings: config.Exact) -> None:
        self.settings = settings

    def __call__(self, rollouts: Sequence[Rollout]) -> list[TermScore]:
        out = []
        for rollout in rollouts:
            wanted, text = accepted(rollout), inside(rollout.text, self.settings.tag)
            out.append(TermScore(float(text is not None and any(self.same(text, one) for one in wanted))))
        return out

    def same(self, text: str, answer: str) -> bool:
        ignore = self.settings.ignore_punctuation
        wanted = self._words(answer, ignore)
        if ignore and not wanted:  # an answer that is nothing else
            ignore, wanted = False, self._words(answer, False)
        at = 0
        for block in _blocks(text, SHRINK * sum(map(len, wanted)), ignore):
            if block is None or (words := self._words(block, ignore)) != wanted[at : at + len(words)]:
                return False
            at += len(words)
        return at == len(wanted)

    def _words(self, text: str, ignore_punctuation: bool) -> list[str]:
        text = folded(text)
        if self.settings.ignore_case:
            text = text.casefold()
        if ignore_punctuation:
            text = _SIGN.sub("−", text)
            for mark in {c for c in text if unicodedata.category(c)[0] == "P"}:
                text = text.replace(mark, " ")
            text = _ARTICLES.sub(" ", text)
        return text.split()

    def close(self) -> None: ...


class Answer:
    """1 where the text states an expected answer: alone, marked as the answer, or with the question's words around it."""

    def __init__(self, settings: config.Answer, *, asked: Callable[[Rollout], str] | None = None) -> None:
        self.settings, self._asked = settings, asked

    def __call__(self, rollouts: Sequence[Rollout]) -> list[TermScore]:
        return [self._one(rollout) for rollout in rollouts]

    def _one(self, rollout: Rollout) -> TermScore:
        text = inside(rollout.text, self.settings.tag)
        question = self._asked(rollout) if self._asked else None
        return TermScore(float(text is not None and right(accepted(rollout), text, question)))

    def close(self) -> None: ...


class Numeric:
    """1 where the last number of the text is an expected one, within the tolerance."""

    def __init__(self, settings: config.Numeric) -> None:
        self.settings = settings

    def __call__(self, rollouts: Sequence[Rollout]) -> list[TermScore]:
        return [self._one(rollout) for rollout in rollouts]

    def _one(self, rollout: Rollout) -> TermScore:
        wanted = [number for one in accepted(rollout) if (number := final_number(one)) is not None]
        if not wanted:
            raise no_number(rollout)
        text = inside(rollout.text, self.settings.tag)
        found = None if text is None else final_number(text[-LAST_CHARS:])
        if found is None:
            return TermScore(0.0, "no number")
        note = f"read {float(found.value):g}" + ("%" if found.percent else "")
        return TermScore(float(any(same_number(one, found, near=self._near) for one in wanted)), note)

    def _near(self, wanted: Fraction, found: Fraction) -> bool:
        return abs(float(found - wanted)) <= max(self.settings.tolerance, self.settings.relative * abs(float(wanted)))

    def close(self) -> None: ...


class Length:
    """How long the text is; "Soft overlong punishment" of DAPO, https://arxiv.org/abs/2503.14476."""

    def __init__(self, settings: config.Length) -> None:
        self.settings = settings

    def __call__(self, rollouts: Sequence[Rollout]) -> list[TermScore]:
        lengths = [self.length(rollout) for rollout in rollouts]
        most = self._most if self.settings.unit == "words" else None
        said = [f"{n} {self.settings.unit}" if most is None or n <= most else f"more than {most} words" for n in lengths]
        return [TermScore(self.value(n), note) for n, note in zip(lengths, said, strict=True)]

    @property
    def _most(self) -> int:
        """All that are longer have one value."""
        return 2 * self.settings.target if self.settings.target is not None else self.settings.maximum or 0

    def length(self, rollout: Rollout) -> int:
        """Of what the model itself wrote, in the unit; words are counted until there are too many by one."""
        if self.settings.unit == "tokens":
            return sum(rollout.mask)
        return len(rollout.text) if self.settings.unit == "characters" else len(rollout.text.split(None, self._most))

    def value(self, length: int) -> float:
        if self.settings.target is not None:
            return 1.0 - min(abs(length - self.settings.target) / self.settings.target, 1.0)
        assert self.settings.maximum is not None
        over, margin = length - (self.settings.maximum - self.settings.margin), self.settings.margin
        return -min(over / margin, 1.0) if 0 < over <= margin else -1.0 if over > 0 else 0.0

    def close(self) -> None: ...


def _blocks(text: str, most: int, punctuation: bool) -> Iterator[str | None]:
    """The text in parts that begin where a word does, `punctuation` ending one too: normalised they are what the whole would
    be. None, as the last, for a word longer than `most`."""
    start = 0
    while len(text) - start > BLOCK:
        stop = _breaks(punctuation).search(text, start + BLOCK, start + 2 * BLOCK + most)
        if stop is None and len(text) - start > 2 * BLOCK + most:
            yield None
            return
        end = stop.start() if stop else len(text)
        yield text[start:end]
        start = end
    yield text[start:]


@lru_cache
def _breaks(punctuation: bool) -> re.Pattern[str]:
    """Space, and all marks: nothing before them is composed with them."""
    marks = (
        [c for c in map(chr, range(sys.maxunicode + 1)) if c != "-" and unicodedata.category(c)[0] == "P"] if punctuation else []
    )
    return re.compile(rf"[\s{re.escape(''.join(marks))}]")


def no_number(rollout: Rollout) -> RewardError:
    return RewardError(
        f"the expected answer of rollout {rollout.id} holds no number", **place(rollout), found=rollout.answer,
        expected="such as 42 or #### 42",
        fix="mend the prompt's answer, or compare as text with `exact`",
    )  # fmt: skip


class Environment:
    """The environment's own score, which stands in the rollout."""

    def __init__(self, settings: config.Environment) -> None:
        self.settings = settings

    def __call__(self, rollouts: Sequence[Rollout]) -> list[TermScore]:
        missing = next((r for r in rollouts if "environment" not in r.meta), None)
        if missing is not None:
            fix = f"set {Setting('environment', 'module:Class')}"
            raise RewardError("no environment took part in this answer", found=missing.id, fix=fix)
        return [TermScore(float(r.meta["environment"])) for r in rollouts]

    def close(self) -> None: ...
