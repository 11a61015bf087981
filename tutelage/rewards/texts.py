"""Which part of a rollout's text a verifier compares, and with what."""

from __future__ import annotations

from typing import Any

from tutelage.data.sources import answers
from tutelage.errors import DataError, RewardError
from tutelage.records import Rollout


def inside(text: str, tag: str | None) -> str | None:
    """What stands in the last <tag>…</tag>, or all of it without a tag; None where there is no such pair."""
    if tag is None:
        return text
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return text[start + len(tag) + 2 : end].strip() if start >= 0 else None


def place(rollout: Rollout) -> dict[str, Any]:
    """Where the rollout's prompt was read: `file` and `line` of an error about it."""
    file, _, line = (rollout.source or "").rpartition("#")
    if file and line.isdigit():
        return {"file": file, "line": int(line)}
    return {"file": rollout.source}


def expected(rollout: Rollout) -> str:
    """The expected answer. Raises `RewardError` where the prompt has none."""
    if rollout.answer is None:
        raise RewardError(
            "this prompt has no expected answer", **place(rollout), field="answer", found=f"none, for rollout {rollout.id}",
            fix="give each prompt an `answer`, or use rewards that need none",
        )  # fmt: skip
    return rollout.answer


def accepted(rollout: Rollout) -> list[str]:
    """All expected answers, of which any is right: the prompt's own, and `meta.accepted`. Raises `RewardError` for none."""
    first = expected(rollout)
    try:
        return [first, *answers.others_of(rollout.meta)]
    except DataError as error:
        raise RewardError(
            error.message, **place(rollout), field=error.field, found=error.found, expected=error.expected, fix="mend the row"
        ) from error


def told(rollout: Rollout, key: str, what: str) -> object:
    """A fact of the rollout's prompt. Raises `RewardError` where it is missing."""
    if key not in rollout.meta:
        raise RewardError(
            f"this prompt has no {what}", **place(rollout), field=f"meta.{key}", found=f"none, for rollout {rollout.id}",
            expected=f"one of its facts to be `{key}`", fix="put it in the prompts' rows, or in the reward's own settings",
        )  # fmt: skip
    return rollout.meta[key]
