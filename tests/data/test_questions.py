"""Questions from the docs and skills: right answers, honest splits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import date, datetime

import pytest

from tutelage.data.demo import python_docs, questions, skills
from tutelage.data.sources.readers import ReadOptions, read
from tutelage.errors import ConfigError
from tutelage.records import Conversation


@pytest.fixture(scope="module")
def asked() -> list[Conversation]:
    return list(questions.conversations())


def turn(conversation: Conversation) -> tuple[str, str]:
    question, answer = conversation.messages
    assert (question.role, answer.role) == ("user", "assistant")
    return question.content, answer.content


def test_there_are_some_thousands_and_answers_are_short(asked: list[Conversation]) -> None:
    """Too few or too long answers cannot be learnt by a small model in a minute."""
    assert 3000 < len(asked) < 7000
    assert all(len(turn(c)[1]) <= 160 and turn(c)[1] == c.meta["answer"] for c in asked)
    assert len({c.id for c in asked}) == len(asked)


def test_answers_stand_in_the_document_they_name(asked: list[Conversation]) -> None:
    """An answer that its source does not contain was invented here."""
    pages = {d.id: " ".join(d.text.split()) for d in python_docs.documents()}
    for c in asked:
        page = pages[c.parents[0]]
        assert c.meta["task"] == "signature" or c.meta["answer"].rstrip(".") in page, c
    expected = "Join two or more pathname components, inserting '/' as needed."
    assert {c.meta["answer"] for c in asked if c.meta["family"] == "os.path.join" and c.meta["task"] == "what_does"} == {expected}


def test_the_two_held_out_parts_are_what_they_say(asked: list[Conversation]) -> None:
    """A held-out question that was trained on, or a wording that was, measures memory of the question."""
    kinds = Counter(c.meta["split_kind"] for c in asked)
    assert kinds["train"] > 3000 and kinds["seen_function_new_phrasing"] > 200 and kinds["unseen_function"] > 50
    trained = [c for c in asked if c.meta["split"] == "train"]
    families = {c.meta["family"] for c in trained}
    questions_trained = {turn(c)[0] for c in trained}
    for c in asked:
        if c.meta["split"] == "validation":
            assert turn(c)[0] not in questions_trained
            assert (c.meta["family"] in families) == (c.meta["split_kind"] == "seen_function_new_phrasing")


def test_one_question_has_one_answer(asked: list[Conversation]) -> None:
    """`Which module has shutdown?` with three true answers teaches guessing and scores at random."""
    answers: defaultdict[str, set[str]] = defaultdict(set)
    for c in asked:
        answers[turn(c)[0]].add(turn(c)[1])
    assert all(len(a) == 1 for a in answers.values())
    assert "Which module has open?" not in answers


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("Return the sum. More text.", "Return the sum."),
        ("Return a (possibly empty)\nlist\n\nSecond paragraph.", "Return a (possibly empty) list."),
        ("foo(x) -> y\n\nReturn it.", ""),
        ("Short.", ""),
        ("Does these things:", ""),
        ("Word " * 60, ""),
    ],
)
def test_first_sentence(doc: str, sentence: str) -> None:
    """Half sentences and signatures are not answers."""
    assert questions.first_sentence(doc) == sentence


SOLVE: dict[str, Callable[[list[str]], str]] = {
    "add": lambda q: str(sum(map(int, q))), "subtract": lambda q: str(int(q[0]) - int(q[1])),
    "larger": lambda q: str(max(map(int, q))), "even": lambda q: ("even", "odd")[int(q[0]) % 2],
    "sort_numbers": lambda q: " ".join(sorted(q)), "largest": max, "reverse": lambda q: " ".join(q[::-1]),
    "upper": lambda q: " ".join(q).upper(), "count_letter": lambda q: str(q[1:].count(q[0])),
    "first_letter": lambda q: q[0], "last_letter": lambda q: q[-1], "first_word": lambda q: q[0], "last_word": lambda q: q[-1],
    "alphabetical": min, "in_digits": lambda q: str(value_of(q)), "iso_date": lambda q: day_of(q).isoformat(),
}  # fmt: skip


def value_of(words: list[str]) -> int:
    """A number in words, read from its beginning: each word adds, hundred and thousand multiply."""
    small = {w: i for i, w in enumerate(skills.ONES) if w} | {w: 10 * i for i, w in enumerate(skills.TENS) if w}
    total = part = 0
    for word in words:
        if word == "thousand":
            total, part = total + 1000 * part, 0
        else:
            part = 100 * part if word == "hundred" else part + small[word]
    return total + part


def day_of(words: list[str]) -> date:
    form = "%d %B %Y" if words[0].isdigit() else "%B %d %Y"
    return datetime.strptime(" ".join(words), form).date()


@pytest.fixture(scope="module")
def problems() -> list[Conversation]:
    return list(skills.read("all", {"count": "400", "held_out": "40"}))


def test_every_skill_has_right_answers(problems: list[Conversation]) -> None:
    """A wrong key teaches a wrong skill, and the evaluation confirms it."""
    assert set(SOLVE) == set(skills.CHANCE) == {c.meta["task"] for c in problems}
    for c in problems:
        given = c.meta["family"].split()[1:]
        assert SOLVE[c.meta["task"]](given) == turn(c)[1] == c.meta["answer"]
        letters = set(turn(c)[0].replace("?", " ").replace(",", " ").replace(".", " ").split())
        assert set(given) <= letters, "the question does not name what it asks about"


def test_held_out_problems_are_never_trained_on_whatever_the_seed(problems: list[Conversation]) -> None:
    """With a split by seed, a second run's training problems are the first one's test."""
    held = {c.meta["family"] for c in problems if c.meta["split"] == "validation"}
    other = list(skills.read("all", {"count": "1500", "seed": "7", "max": "50"}))
    assert len(held) == 40 * len(SOLVE) and not held & {c.meta["family"] for c in other if c.meta["split"] == "train"}


def test_chance_is_what_guessing_scores() -> None:
    """A chance level set too low makes any model look as if it had learnt something."""
    drawn: defaultdict[str, list[str]] = defaultdict(list)
    for c in skills.read("add,subtract,even,count_letter", {"count": "3000", "held_out": "0"}):
        drawn[c.meta["task"]].append(c.meta["answer"])
    for task, answers in drawn.items():
        best = Counter(answers).most_common(1)[0][1] / len(answers)
        assert best < 1.6 * skills.CHANCE[task] + 0.01, (task, best)


def test_the_same_spec_gives_the_same_problems() -> None:
    """Data that change between runs make a cached run a lie."""
    spec, options = "skill:add,reverse?count=20&seed=3", ReadOptions(kind="conversations")
    assert list(read(spec, options)) == list(read(spec, options))
    assert list(read("skill:add?count=20", ReadOptions(kind="conversations", seed=1))) != list(
        read("skill:add?count=20", options)
    )


@pytest.mark.parametrize("spec", ["skill:divide", "skill:add?cout=3", "skill:add?count=x", "skill:", "python-questions:?n=3"])
def test_a_wrong_spec_says_what_there_is(spec: str) -> None:
    """A misspelt parameter must not be ignored."""
    with pytest.raises(ConfigError, match="expected"):
        list(read(spec, ReadOptions(kind="conversations")))
    with pytest.raises(ConfigError, match="kind=conversations"):
        list(read(spec))
