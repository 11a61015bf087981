"""Held-out questions: greedy answers, their grades with intervals, and the share that guessing would get right.

One scorer grades each answer, and its verdict is the only one reported. A scorer is a kind of reward (`tutelage.rewards`), so
that a model is measured as it is rewarded. The evaluation may choose it; else the question's metadata may name it
(`meta["scorer"]`; skills use `exact`); else the expected answer decides, question by question: `numeric` compares the final
number of a worked solution (`#### 18`, a box, an equation at its end), and `answer` the stated answer. Only free text (expected
answers of more than six words on average, none of them a worked solution) is graded by `word_overlap`: word F1 of at least 0.5
with an accepted answer (the harmonic mean of precision and recall of words) and the same numbers in both, because a wrong number
hardly changes the overlap.

Guessing is the best of three strategies that do not look at the question: the task's stated chance, the most common answer of
the other questions, and the answer of another question.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
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
from tutelage.rewards.forms import folded, plain_maths
from tutelage.rewards.numbers import NUMBER, NUMBER_WORDS, Number, final_number, final_part, number_at

OVERLAP = "word_overlap"
LEAST_F1 = 0.5  # word F1 from which `word_overlap` calls an answer right
FREE_TEXT_WORDS = 6.0
SCORERS = ("answer", "exact", "numeric", "maths", "regex", "json_schema", OVERLAP)
"""Kinds of rewards that need only the answer and the question's record; and overlap of words."""
_EQUATION_LAST = re.compile(r"=\s*[^\s=].{0,80}$", re.DOTALL)


class Generate(Protocol):
    """Texts for prompts. `sampling` has the fields of the engine's `Sampling`."""

    def __call__(self, prompts: list[list[int]], sampling: dict[str, Any]) -> list[str]: ...


Prompt = Callable[[Conversation], Sequence[int]]  # ids of everything before the last assistant turn, ready to be answered


@dataclass(slots=True, frozen=True)
class Prediction:
    """One question asked.

    Example:
        Prediction("9f…", "arithmetic", "What is 2+2?", "4", "4", True, "exact")
    """

    id: str  # of the conversation
    task: str
    prompt: str  # the last user turn
    expected: str
    answer: str
    correct: bool  # the scorer's verdict
    scorer: str = "answer"  # one of SCORERS
    word_f1: float | None = None  # with the best accepted answer, 0..1; only where the scorer is `word_overlap`
    meta: Mapping[str, Any] | None = None
    too_long: bool | None = None  # longer than the context: never asked, and counted as wrong

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass(slots=True, frozen=True)
class TaskScore:
    """The result of one task."""

    task: str
    scorers: tuple[str, ...]  # that graded its answers; several where its questions differ
    correct: Estimate  # share of answers that their scorers call right
    word_f1: Estimate | None  # mean word F1, where all answers were graded by `word_overlap`
    guess: float  # share that guessing gets right
    guess_from: str  # stated chance | most common answer | answer of another question
    guess_interval: Estimate | None  # where guessing was measured on these questions; None for a stated chance
    above_guess: bool  # clearly: the interval lies above the stated chance, or the paired difference from guessing above 0


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
    grade_all(conversations, [""] * len(conversations), scorer)  # raises before the model is asked where grading is impossible
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
    """The scorer of a question for which none was chosen, unless its task is free text: `numeric` where the expected answer is
    a worked solution that ends in a number, else `answer`.

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
    """The grade of each answer; an answer is None where the question was too long to be asked. `meta["accepted"]` may list
    other right answers.

    Raises `RewardError` for an expected answer that the scorer cannot read, `MissingExtra` for a scorer that is not installed.
    """
    records = [_record(c) for c in conversations]
    scorers = _scorers(conversations, records, scorer)
    correct = [False] * len(records)
    for kind in dict.fromkeys(scorers):
        rows = [i for i, one in enumerate(scorers) if one == kind and given[i] is not None]
        for i, value in zip(rows, _judge(kind, [records[i] for i in rows], [given[i] or "" for i in rows]), strict=True):
            correct[i] = value
    return [_prediction(*row) for row in zip(conversations, records, given, scorers, correct, strict=True)]


def _scorers(conversations: Sequence[Conversation], records: Sequence[Record], scorer: str | None) -> list[str]:
    """The scorer of each question. Of those that neither the evaluation nor a question names, a task of free text gets
    `word_overlap`: exact comparison would call every paraphrase wrong."""
    if scorer is not None:
        return [scorer] * len(records)
    out: list[str] = []
    derived: dict[str, list[int]] = {}  # questions of a task whose scorer the expected answers decide
    for i, (conversation, record) in enumerate(zip(conversations, records, strict=True)):
        named = _named(conversation)
        out.append(named or scorer_for(_accepted(record)[0]))
        if named is None:
            derived.setdefault(_task(conversation), []).append(i)
    for rows in derived.values():
        words = sum(len(_accepted(records[i])[0].split()) for i in rows) / len(rows)
        if words > FREE_TEXT_WORDS and all(out[i] == "answer" for i in rows):
            for i in rows:
                out[i] = OVERLAP
    return out


def _judge(kind: str, records: Sequence[Record], texts: Sequence[str]) -> list[bool]:
    if kind == OVERLAP:
        return [any(words_overlap(t, x) for x in _accepted(r)) for r, t in zip(records, texts, strict=True)]
    asked = {r.id: _question(r.messages) for r in records}
    with build(terms_of({kind: 1.0}), asked=lambda rollout: asked[rollout.prompt]) as rubric:
        _, verdicts = judge_texts(rubric, zip(records, texts, strict=True))
    return [v.reward == 1.0 for v in verdicts]


def _named(conversation: Conversation) -> str | None:
    """The scorer that the question's metadata names, in meta["scorer"]."""
    name = conversation.meta.get("scorer")
    if name is not None and name not in SCORERS:
        near = nearest(str(name), list(SCORERS))
        raise DataError(
            "no such scorer", file=conversation.source, field="meta.scorer", found=name, expected=f"one of: {', '.join(SCORERS)}",
            fix=f"did you mean `{near}`?" if near else "use one of them, or remove the key: the expected answer then decides",
        )  # fmt: skip
    return name


def _record(conversation: Conversation) -> Record:
    """The question as rewards see it. Right answers are `answer` in its metadata, the assistant's turn, and those that the
    metadata lists as `accepted`."""
    said, meta = conversation.messages[-1].content, conversation.meta
    right = [meta["answer"]] if isinstance(meta.get("answer"), str | int | float) else list(meta.get("answer") or [])
    first, *others = dict.fromkeys([*map(str, right), said, *others_of(meta)])
    return replace(Record.of(conversation), answer=first, meta={**meta, "accepted": others})


def _accepted(record: Record) -> list[str]:
    assert record.answer is not None
    return [record.answer, *record.meta["accepted"]]


def _question(messages: Sequence[Any]) -> str:
    return next((m.content for m in reversed(messages) if m.role == "user"), messages[0].content)


def _task(conversation: Conversation) -> str:
    return str(conversation.meta.get("task", "questions"))


def _prediction(conversation: Conversation, record: Record, given: str | None, scorer: str, correct: bool) -> Prediction:
    answer = given or ""
    return Prediction(
        id=conversation.id,
        task=_task(conversation),
        prompt=_question(conversation.messages[:-1]),
        expected=conversation.messages[-1].content,
        answer=answer,
        correct=correct,
        scorer=scorer,
        word_f1=max(word_f1(answer, x) for x in _accepted(record)) if scorer == OVERLAP else None,
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
    scorers = tuple(dict.fromkeys(x.scorer for x in rows))
    hits = [x.correct for x in rows]
    overlaps = [x.word_f1 for x in rows if x.word_f1 is not None]
    blind: dict[str, list[bool]] = {}
    if len(rows) > 1:  # one question has no other answers to guess from
        blind = {
            "most common answer": [_same(x, guess) for x, guess in zip(rows, _commonest(rows), strict=True)],
            "answer of another question": [_same(x, rows[i - 1].expected) for i, x in enumerate(rows)],
        }
    levels = {"stated chance": chance} | {name: sum(found) / len(rows) for name, found in blind.items()}
    best = max(levels, key=lambda k: levels[k])
    correct, guessed = accuracy(hits), blind.get(best)
    return TaskScore(
        task,
        scorers,
        correct,
        word_f1=mean(overlaps, bounds=(0.0, 1.0)) if len(overlaps) == len(rows) else None,
        guess=levels[best],
        guess_from=best,
        guess_interval=accuracy(guessed) if guessed else None,
        above_guess=paired_shares(hits, guessed).low > 0 if guessed else correct.low > chance,
    )


def _commonest(rows: Sequence[Prediction]) -> list[str]:
    """For each question the commonest expected answer of the others: its own answer must not tell what to guess."""
    ranked = Counter(x.expected for x in rows).most_common(2)
    if len(ranked) == 1:
        return [ranked[0][0]] * len(rows)
    (first, most), (second, less) = ranked
    return [second if x.expected == first and most - 1 < less else first for x in rows]


def _same(row: Prediction, guess: str) -> bool:
    """Whether a guess would have been right, as far as the expected answer tells."""
    if row.scorer == OVERLAP:
        return words_overlap(guess, row.expected)
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


def words_overlap(answer: str, expected: str) -> bool:
    """Whether two free texts have enough words in common and the same numbers, in digits or words.

    Example:
        >>> [words_overlap(text, "He has 18 eggs left") for text in ("18 eggs are what he has left", "He has 19 eggs left")]
        [True, False]
    """
    return word_f1(answer, expected) >= LEAST_F1 and _numbers(answer) == _numbers(expected)


def _numbers(text: str) -> set[Number | str]:
    """All numbers in a text; one that cannot be read as its spelling. `one` is more often a pronoun, and is left out."""
    text = plain_maths(folded(text))
    digits: set[Number | str] = {number_at(text, found) or found[0].strip() for found in NUMBER.finditer(text)}
    return digits | {Number(Fraction(NUMBER_WORDS[word])) for word in _words(text) if word in NUMBER_WORDS and word != "one"}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", folded(text).lower())
