"""Terms that need no parser: equality, numbers, length."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from tutelage.config import rewards as config
from tutelage.errors import RewardError
from tutelage.records import Rollout
from tutelage.rewards import Judgement
from tutelage.rewards.numbers import last_number
from tutelage.rewards.texts import expected, inside

LAST_CHARS = 20_000  # of a text, in which its number is looked for
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


class Exact:
    """1 where the text, normalised, is the expected answer."""

    def __init__(self, settings: config.Exact) -> None:
        self.settings = settings

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Judgement]:
        out = []
        for rollout in rollouts:
            wanted, text = self.normal(expected(rollout)), inside(rollout.text, self.settings.tag)
            out.append(Judgement(float(text is not None and self.normal(text) == wanted)))
        return out

    def normal(self, text: str) -> str:
        text = unicodedata.normalize("NFKC", text)
        if self.settings.ignore_case:
            text = text.casefold()
        if self.settings.ignore_punctuation:
            kept = "".join(c if unicodedata.category(c)[0] != "P" else " " for c in text)
            without = _ARTICLES.sub(" ", kept)
            text = without if without.strip() else text  # an answer that is nothing else
        return " ".join(text.split())

    def close(self) -> None: ...


class Numeric:
    """1 where the last number of the text is the expected one, within the tolerance."""

    def __init__(self, settings: config.Numeric) -> None:
        self.settings = settings

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Judgement]:
        return [self._one(rollout) for rollout in rollouts]

    def _one(self, rollout: Rollout) -> Judgement:
        wanted = last_number(expected(rollout))
        if wanted is None:
            raise no_number(rollout)
        text = inside(rollout.text, self.settings.tag)
        found = None if text is None else last_number(text[-LAST_CHARS:])
        if found is None:
            return Judgement(0.0, "no number")
        near = max(self.settings.tolerance, self.settings.relative * abs(float(wanted)))
        return Judgement(float(abs(float(found - wanted)) <= near), f"read {float(found):g}")

    def close(self) -> None: ...


class Length:
    """How long the text is; "Soft overlong punishment" of DAPO, https://arxiv.org/abs/2503.14476."""

    def __init__(self, settings: config.Length) -> None:
        self.settings = settings

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Judgement]:
        lengths = [self.length(rollout) for rollout in rollouts]
        return [Judgement(self.value(n), f"{n} {self.settings.unit}") for n in lengths]

    def length(self, rollout: Rollout) -> int:
        """Of what the model itself wrote, in the unit."""
        if self.settings.unit == "tokens":
            return sum(rollout.mask)
        return len(rollout.text) if self.settings.unit == "characters" else len(rollout.text.split())

    def value(self, length: int) -> float:
        if self.settings.target is not None:
            return 1.0 - min(abs(length - self.settings.target) / self.settings.target, 1.0)
        assert self.settings.maximum is not None
        over, margin = length - (self.settings.maximum - self.settings.margin), self.settings.margin
        return -min(over / margin, 1.0) if 0 < over <= margin else -1.0 if over > 0 else 0.0

    def close(self) -> None: ...


def no_number(rollout: Rollout) -> RewardError:
    return RewardError(
        f"the expected answer of rollout {rollout.id} holds no number", found=rollout.answer, expected="such as 42 or #### 42",
        fix="mend the prompt's answer, or compare as text with `exact`",
    )  # fmt: skip


class Environment:
    """The environment's own score, which stands in the rollout."""

    def __init__(self, settings: config.Environment) -> None:
        self.settings = settings

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Judgement]:
        missing = next((r for r in rollouts if "environment" not in r.meta), None)
        if missing is not None:
            raise RewardError("no environment took part in this answer", found=missing.id, fix="set environment=module:Class")
        return [Judgement(float(r.meta["environment"])) for r in rollouts]

    def close(self) -> None: ...
