"""Held-out questions: greedy answers, how they are graded, intervals, and what guessing would reach.

An answer is *correct* where its scorer says so: a kind of reward (`tutelage.rewards`), so that a model is measured as it is
rewarded: the evaluation's choice, or else what the question's own facts name (`meta["scorer"]`; skills are `exact`). Without
either the expected answer decides, question by question: the final number where the expected answer is a
worked solution (`#### 18`, a box, an equation at its end), else the stated answer. It is *recognisable* when its words overlap
with an accepted one by F1 >= 0.5 (the harmonic mean of the share of its words that are expected and of expected words that it
has). A task whose expected answers are free text, more than six words on average, is judged by recognisable, others by correct.

The level to beat is the best of three that know nothing about the question: the task's stated chance, the answer that is most
common among the other questions, and the answer of another question.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from tutelage.config.base import nearest
from tutelage.config.rewards import terms_of
from tutelage.data.sources.answers import others_of
from tutelage.errors import DataError
from tutelage.evaluate.intervals import Estimate, accuracy, mean, paired_shares
from tutelage.records import Conversation
from tutelage.records import Prompt as Record
from tutelage.rewards.answers import bare, measure, right, same_number, same_text
from tutelage.rewards.build import build
from tutelage.rewards.check import judge_texts
from tutelage.rewards.forms import folded
from tutelage.rewards.numbers import final_number, final_part

RECOGNISABLE = 0.5
FREE_TEXT_WORDS = 6.0
SCORERS = ("answer", "exact", "numeric", "maths", "regex", "json_schema", "recognisable")
"""Kinds of rewards that need no more than the answer and the question's record; and overlap of words."""
_EQUATION_LAST = re.compile(r"=\s*[^\s=].{0,80}$", re.DOTALL)


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
    correct: bool  # by its scorer
    score: float  # word F1 with the best accepted answer, 0..1
    meta: Mapping[str, Any] | None = None
    too_long: bool | None = None  # longer than the context: never asked, and counted as wrong
    scorer: str | None = None  # of `correct`: one of SCORERS

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
    guess_interval: Estimate | None  # of a level that was measured on these questions; None for a stated chance
    above_guess: bool  # surely: the interval lies above the chance, or question by question above what was guessed
    scorers: tuple[str, ...]  # of `correct`

    @property
    def main(self) -> Estimate:
        return self.correct if self.judged_by == "correct" else self.recognisable

    @property
    def scored_by(self) -> str:
        """Example: `numeric`; `answer, numeric` where questions of a task differ."""
        return "recognisable" if self.judged_by == "recognisable" else ", ".join(self.scorers)


def ask(
    conversations: Sequence[Conversation],
    prompt: Prompt,
    generate: Generate,
    *,
    context: int | None = None,
    max_tokens: int = 64,
    batch: int = 64,
    scorer: str | None = None,
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
    grade_all(conversations, [""] * len(conversations), scorer)  # what cannot be graded is said before the model is asked
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
    return grade_all(conversations, answers, scorer)


def scorer_for(expected: str) -> str:
    """The scorer of a question for which none was chosen: `numeric` where the expected answer is a worked solution that ends in
    a number, else `answer`.

    Example:
        >>> scorer_for("He has 2 + 2 = 4 eggs.\\n#### 4"), scorer_for("4 eggs")
        ('numeric', 'answer')
    """
    if final_number(expected) is None:
        return "answer"
    marked = final_part(expected) is not expected and measure(bare(final_part(expected))) is not None
    worked = len(expected.split()) > FREE_TEXT_WORDS and _EQUATION_LAST.search(folded(expected)) is not None
    return "numeric" if marked or worked else "answer"


def grade(conversation: Conversation, given: str | None, scorer: str | None = None) -> Prediction:
    """`grade_all` of one answer."""
    return grade_all([conversation], [given], scorer)[0]


def grade_all(conversations: Sequence[Conversation], given: Sequence[str | None], scorer: str | None = None) -> list[Prediction]:
    """The verdict on each answer; None for a question too long to be asked. `meta["accepted"]` may list other right answers.

    Raises `RewardError` for an expected answer that the scorer cannot read, `MissingExtra` for a scorer that is not installed.
    """
    records = [_record(c) for c in conversations]
    scorers = [scorer or _named(c) or scorer_for(_accepted(r)[0]) for c, r in zip(conversations, records, strict=True)]
    correct = [False] * len(records)
    for kind in dict.fromkeys(scorers):
        rows = [i for i, one in enumerate(scorers) if one == kind and given[i] is not None]
        for i, value in zip(rows, _judge(kind, [records[i] for i in rows], [given[i] or "" for i in rows]), strict=True):
            correct[i] = value
    return [_prediction(*row) for row in zip(conversations, records, given, scorers, correct, strict=True)]


def _judge(kind: str, records: Sequence[Record], texts: Sequence[str]) -> list[bool]:
    if kind == "recognisable":
        return [any(recognised(t, x) for x in _accepted(r)) for r, t in zip(records, texts, strict=True)]
    asked = {r.id: _question(r.messages) for r in records}
    with build(terms_of({kind: 1.0}), asked=lambda rollout: asked[rollout.prompt]) as rubric:
        _, verdicts = judge_texts(rubric, zip(records, texts, strict=True))
    return [v.reward == 1.0 for v in verdicts]


def _named(conversation: Conversation) -> str | None:
    """The scorer that the question's own facts name, in meta["scorer"]."""
    name = conversation.meta.get("scorer")
    if name is not None and name not in SCORERS:
        near = nearest(str(name), list(SCORERS))
        raise DataError(
            "no such scorer", file=conversation.source, field="meta.scorer", found=name, expected=f"one of: {', '.join(SCORERS)}",
            fix=f"did you mean `{near}`?" if near else "leave it out: the expected answer decides then",
        )  # fmt: skip
    return name


def _record(conversation: Conversation) -> Record:
    """What is asked, as rewards know it: right are the expected answer of the facts (`answer`), what the assistant says, and what
    the facts list as `accepted`."""
    said, meta = conversation.messages[-1].content, conversation.meta
    right = [meta["answer"]] if isinstance(meta.get("answer"), str | int | float) else list(meta.get("answer") or [])
    first, *others = dict.fromkeys([*map(str, right), said, *others_of(meta)])
    return replace(Record.of(conversation), answer=first, meta={**meta, "accepted": others})


def _accepted(record: Record) -> list[str]:
    assert record.answer is not None
    return [record.answer, *record.meta["accepted"]]


def _question(messages: Sequence[Any]) -> str:
    return next((m.content for m in reversed(messages) if m.role == "user"), messages[0].content)


def _prediction(conversation: Conversation, record: Record, given: str | None, scorer: str, correct: bool) -> Prediction:
    answer = given or ""
    return Prediction(
        id=conversation.id,
        task=str(conversation.meta.get("task", "questions")),
        prompt=_question(conversation.messages[:-1]),
        expected=conversation.messages[-1].content,
        answer=answer,
        correct=correct,
        score=max(word_f1(answer, x) for x in _accepted(record)),
        meta={k: v for k, v in conversation.meta.items() if k in ("family", "seen", "split", "level")} or None,
        too_long=True if given is None else None,
        scorer=scorer,
    )


def scores(predictions: Sequence[Prediction], chance: Mapping[str, float] | None = None) -> list[TaskScore]:
    """Per task, in order of first appearance."""
    tasks: dict[str, list[Prediction]] = {}
    for p in predictions:
        tasks.setdefault(p.task, []).append(p)
    return [_score(task, rows, (chance or {}).get(task, 0.0)) for task, rows in tasks.items()]


def _score(task: str, rows: list[Prediction], chance: float) -> TaskScore:
    scorers = tuple(dict.fromkeys(x.scorer or "answer" for x in rows))
    words = sum(len(x.expected.split()) for x in rows) / len(rows)
    free = set(scorers) == {"recognisable"} or (scorers == ("answer",) and words > FREE_TEXT_WORDS)
    hits = [x.score >= RECOGNISABLE if free else x.correct for x in rows]
    blind: dict[str, list[bool]] = {}
    if len(rows) > 1:  # one question has no other answers to guess from
        blind = {
            "most common answer": [_same(x, guess, free) for x, guess in zip(rows, _commonest(rows), strict=True)],
            "answer of another question": [_same(x, rows[i - 1].expected, free) for i, x in enumerate(rows)],
        }
    levels = {"stated chance": chance} | {name: sum(found) / len(rows) for name, found in blind.items()}
    best = max(levels, key=lambda k: levels[k])
    main = accuracy(hits)
    measured = blind.get(best)
    return TaskScore(
        task, "recognisable" if free else "correct", accuracy([x.correct for x in rows]),
        accuracy([x.score >= RECOGNISABLE for x in rows]), mean([x.score for x in rows], bounds=(0.0, 1.0)), levels[best], best,
        accuracy(measured) if measured else None,
        paired_shares(hits, measured).low > 0 if measured else main.low > chance, scorers,
    )  # fmt: skip


def _commonest(rows: Sequence[Prediction]) -> list[str]:
    """For each question the commonest expected answer of the others: its own answer must not tell what to guess."""
    ranked = Counter(x.expected for x in rows).most_common(2)
    if len(ranked) == 1:
        return [ranked[0][0]] * len(rows)
    (first, most), (second, less) = ranked
    return [second if x.expected == first and most - 1 < less else first for x in rows]


def _same(row: Prediction, guess: str, free: bool) -> bool:
    """Whether a guess would have been right, as far as the expected answer tells."""
    if free:
        return recognised(guess, row.expected)
    if row.scorer in ("numeric", "maths"):
        wanted, found = final_number(row.expected), final_number(guess)
        if wanted is not None and found is not None:
            return same_number(wanted, found)
    return right(row.expected, guess, row.prompt)


def normalised(text: str) -> str:
    """Plain typography, single spaces, without enclosing quotes or marks and a final full stop. Case stays."""
    return bare(text)


def word_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall of words, as in SQuAD (Rajpurkar et al., 2016) but keeping articles."""
    a, b = _words(answer), _words(expected)
    if not a or not b:
        return float(same_text(expected, answer))
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b))


def recognised(answer: str, expected: str) -> bool:
    return word_f1(answer, expected) >= RECOGNISABLE


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", folded(text).lower())
