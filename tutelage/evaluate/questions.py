"""Held-out questions: greedy answers, exact match, word overlap, intervals, and what guessing would reach.

An answer is *correct* when it equals an accepted answer after `normalised`, and *recognisable* when its words overlap with one
by F1 >= 0.5 (the harmonic mean of the share of its words that are expected and of expected words that it has).
A task whose expected answers have more than six words on average is judged by recognisable, others by correct.

The level to beat is the best of three that know nothing about the question: the task's stated chance, always giving the most
common answer, and giving the answer of another question.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from tutelage.data.answers import others_of
from tutelage.errors import DataError
from tutelage.evaluate.intervals import Estimate, accuracy, mean
from tutelage.records import Conversation

RECOGNISABLE = 0.5
FREE_TEXT_WORDS = 6.0


class Generate(Protocol):
    """Texts for prompts. `sampling` has the fields of the engine's `Sampling`."""

    def __call__(self, prompts: list[list[int]], sampling: dict[str, Any]) -> list[str]: ...


Prompt = Callable[[Conversation], Sequence[int]]  # ids of everything before the last assistant turn, ready to be answered


@dataclass(slots=True, frozen=True)
class Prediction:
    """One question asked.

    Example:
        Prediction("9f…", "arithmetic", "What is 2+2?", "4", "4", True, 1.0)
    """

    id: str  # of the conversation
    task: str
    prompt: str  # the last user turn
    expected: str
    answer: str
    correct: bool  # exact match after `normalised`
    score: float  # word F1 with the best accepted answer, 0..1
    meta: Mapping[str, Any] | None = None
    too_long: bool | None = None  # longer than the context: never asked, and counted as wrong

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass(slots=True, frozen=True)
class TaskScore:
    """What came out for the questions of one task."""

    task: str
    judged_by: str  # correct | recognisable
    correct: Estimate
    recognisable: Estimate
    overlap: Estimate  # mean F1
    guess: float  # the level to beat, for the measure that it is judged by
    guess_from: str  # stated chance | most common answer | answer of another question

    @property
    def main(self) -> Estimate:
        return self.correct if self.judged_by == "correct" else self.recognisable

    @property
    def above_guess(self) -> bool:
        """The whole interval lies above guessing."""
        return self.main.low > self.guess


def ask(
    conversations: Sequence[Conversation],
    prompt: Prompt,
    generate: Generate,
    *,
    context: int | None = None,
    max_tokens: int = 64,
    batch: int = 64,
) -> list[Prediction]:
    """Asks each conversation's last question greedily. Raises `DataError` for one that does not end with an answer.

    A question that leaves no room for an answer in `context` tokens is not asked, and counts as wrong.
    """
    for conversation in conversations:
        if len(conversation.messages) < 2 or conversation.messages[-1].role != "assistant":
            raise DataError(
                "a question without its answer",
                field="messages",
                found=conversation.id,
                expected="a conversation that ends with an assistant turn",
            )
    order = sorted(range(len(conversations)), key=lambda i: -sum(len(m.content) for m in conversations[i].messages))
    prompts = {i: list(prompt(conversations[i])) for i in order}
    fitting = [i for i in order if context is None or len(prompts[i]) < context]
    answers: list[str | None] = [None] * len(conversations)
    for start in range(0, len(fitting), batch):
        part = fitting[start : start + batch]
        texts = generate([prompts[i] for i in part], {"temperature": 0.0, "max_tokens": max_tokens})
        assert len(texts) == len(part)
        for i, text in zip(part, texts, strict=True):
            answers[i] = text
    return [grade(c, a) for c, a in zip(conversations, answers, strict=True)]


def grade(conversation: Conversation, given: str | None) -> Prediction:
    """The verdict on one answer; None for a question too long to be asked. `meta["accepted"]` may list other right answers."""
    answer = given or ""
    expected = conversation.messages[-1].content
    accepted = [expected, *others_of(conversation.meta)]
    last = next((m.content for m in reversed(conversation.messages[:-1]) if m.role == "user"), conversation.messages[0].content)
    return Prediction(
        id=conversation.id,
        task=str(conversation.meta.get("task", "questions")),
        prompt=last,
        expected=expected,
        answer=answer,
        correct=given is not None and any(normalised(answer) == normalised(x) for x in accepted),
        score=max(word_f1(answer, x) for x in accepted),
        meta={k: v for k, v in conversation.meta.items() if k in ("family", "seen", "split", "level")} or None,
        too_long=True if given is None else None,
    )


def scores(predictions: Sequence[Prediction], chance: Mapping[str, float] | None = None) -> list[TaskScore]:
    """Per task, in order of first appearance."""
    tasks: dict[str, list[Prediction]] = {}
    for p in predictions:
        tasks.setdefault(p.task, []).append(p)
    return [_score(task, rows, (chance or {}).get(task, 0.0)) for task, rows in tasks.items()]


def _score(task: str, rows: list[Prediction], chance: float) -> TaskScore:
    free = sum(len(x.expected.split()) for x in rows) / len(rows) > FREE_TEXT_WORDS
    hit: Callable[[str, str], bool] = recognised if free else (lambda a, b: normalised(a) == normalised(b))
    common = Counter(x.expected for x in rows).most_common(1)[0][0]
    levels = {
        "stated chance": chance,
        "most common answer": sum(hit(common, x.expected) for x in rows) / len(rows),
        "answer of another question": sum(hit(rows[i - 1].expected, x.expected) for i, x in enumerate(rows)) / len(rows),
    }
    if len(rows) == 1:  # one question has no other answers to guess from
        levels = {"stated chance": chance}
    best = max(levels, key=lambda k: levels[k])
    return TaskScore(
        task, "recognisable" if free else "correct", accuracy([x.correct for x in rows]),
        accuracy([x.score >= RECOGNISABLE for x in rows]), mean([x.score for x in rows]), levels[best], best,
    )  # fmt: skip


def normalised(text: str) -> str:
    """Compatibility form, lower case, single spaces, without enclosing quotes or backticks and a final full stop."""
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip().lower()
    text = text.rstrip(".").strip()
    while len(text) > 1 and text[0] == text[-1] and text[0] in "\"'`":
        text = text[1:-1].strip()
    return text


def word_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall of words, as in SQuAD (Rajpurkar et al., 2016) but keeping articles."""
    a, b = _words(answer), _words(expected)
    if not a or not b:
        return float(normalised(answer) == normalised(expected))
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b))


def recognised(answer: str, expected: str) -> bool:
    return word_f1(answer, expected) >= RECOGNISABLE


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower())
