"""What verifiers in workers share: which texts are asked about, and what becomes of those that take too much."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from tutelage import log
from tutelage.errors import RewardError
from tutelage.records import Rollout
from tutelage.rewards import TermScore
from tutelage.rewards.texts import inside, place
from tutelage.rewards.worker import Answer, Workers

MAX_CHARS = 200_000  # of a text that is parsed whole

Question = Callable[[Rollout, str], dict[str, Any]]


def workers(function: str, seconds: float) -> Workers:
    """Processes for a function, "module:name" of this folder."""
    return Workers(f"tutelage.rewards.{function}", seconds=seconds, most=min(os.cpu_count() or 1, 4))


def judge(asked: Workers, rollouts: Sequence[Rollout], tag: str | None, question: Question, expected: str) -> list[TermScore]:
    """What the workers say of each text. `expected` says what is wrong with a prompt whose own facts can't be read.

    A text without the tag, past the limits or longer than `MAX_CHARS` has 0; the latter two are marked.
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
    answers = iter(asked.ask_all(questions))
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
