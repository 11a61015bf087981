"""What verifiers in workers share: which texts are asked about, and the score of those that take too much."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from tutelage import log
from tutelage.errors import RewardError
from tutelage.records import Rollout
from tutelage.rewards import TermScore
from tutelage.rewards.texts import inside, place
from tutelage.workers import Answer, Workers

MAX_CHARS = 200_000  # longest text that is parsed

Question = Callable[[Rollout, str], dict[str, Any]]


def workers(function: str, seconds: float) -> Workers:
    """Processes for a verifier, "module:function" of this folder."""
    return Workers(
        "tutelage.rewards.user_code:verifier", function, seconds=seconds, most=min(os.cpu_count() or 1, 4), bounded=True
    )


def judge(asked: Workers, rollouts: Sequence[Rollout], tag: str | None, question: Question, expected: str) -> list[TermScore]:
    """The score of each text. `expected`: what to report of a prompt whose own facts can't be read.

    A text without the tag, past the limits or longer than `MAX_CHARS` scores 0; the latter two are marked `past_limit`.
    """
    out: list[TermScore | None] = []
    questions = []
    for rollout in rollouts:
        text = inside(rollout.text, tag)
        if text is None:
            out.append(TermScore(0.0, f"no <{tag}>"))
            continue
        put = question(rollout, text)
        long = len(put["text"]) > MAX_CHARS
        out.append(TermScore(0.0, f"longer than {MAX_CHARS:,} characters", past_limit=True) if long else None)
        questions += [] if long else [put]
    answers = iter(list(asked.ask_all(questions)))
    return [one or _judgement(next(answers), r, expected) for r, one in zip(rollouts, out, strict=True)]


def _judgement(answer: Answer, rollout: Rollout, expected: str) -> TermScore:
    if answer.lost:
        return TermScore(0.0, answer.lost, past_limit=True)
    if answer.error:
        log.say(answer.trace.rstrip())
        raise RewardError(f"a verifier failed on rollout {rollout.id}: {answer.error}", found=rollout.text)
    if "unreadable" in answer.value:
        raise RewardError(
            f"rollout {rollout.id}: {expected}", **place(rollout), found=answer.value["unreadable"], fix="mend the prompt's row"
        )
    return TermScore(**answer.value)
