"""Questions: what counts as right, and what guessing reaches."""

from __future__ import annotations

from typing import Any

import pytest

from tutelage.errors import DataError
from tutelage.evaluate import questions as qs
from tutelage.evaluate import samples
from tutelage.records import Conversation, Message


def conversation(question: str, answer: str, **meta: Any) -> Conversation:
    turns = [Message(role="user", content=question), Message(role="assistant", content=answer)]
    return Conversation.make(turns, source="test", meta=meta)


def prompt(c: Conversation) -> list[int]:
    return [len(m.content) for m in c.messages[:-1]]


def test_answers_return_to_their_questions() -> None:
    """Batches are sorted by length for speed; answers must not stay in that order."""
    asked = [conversation("q" * n, f"a{n}", task="t") for n in (5, 90, 1, 40, 17, 3)]
    calls: list[int] = []

    def generate(prompts: list[list[int]], sampling: dict[str, Any]) -> list[str]:
        assert sampling["temperature"] == 0.0
        calls.append(len(prompts))
        return [f"a{p[0]}" for p in prompts]

    predictions = qs.ask(asked, prompt, generate, batch=4)
    assert [p.id for p in predictions] == [c.id for c in asked]
    assert all(p.correct for p in predictions)
    assert calls == [4, 2]


def test_a_question_longer_than_the_context_is_wrong_not_fatal() -> None:
    """One long question among hundreds must not end an evaluation, nor count as right for saying nothing."""
    asked = [conversation("q" * n, "", task="t") for n in (5, 90)]

    def one_token_a_letter(c: Conversation) -> list[int]:
        return [0] * len(c.messages[0].content)

    short, long = qs.ask(asked, one_token_a_letter, lambda p, s: [""] * len(p), context=90)
    assert short.correct and short.too_long is None
    assert long.too_long and not long.correct


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("42.", "42", True),
        (" `Foo`\n", "Foo", True),
        ("Foo", "foo", False),
        ("4 2", "42", False),
        ("-3", "3", False),
        ("", "", True),
        ("a  b", "a b", True),
        ("10³", "103", False),
    ],
)
def test_normalised_exact_match(answer: str, expected: str, same: bool) -> None:
    """Too lax a rule (dropping signs, spaces) would call wrong answers right."""
    assert (qs.normalised(answer) == qs.normalised(expected)) is same


def test_word_f1_published_example() -> None:
    """F1 counts each word as often as it occurs: repeating a right word must not help."""
    assert qs.word_f1("the cat sat", "the cat sat on the mat") == pytest.approx(2 * 3 / 9)
    assert qs.word_f1("cat cat cat cat", "cat") == pytest.approx(2 / 5)
    assert qs.word_f1("", "cat") == 0 and qs.word_f1("!", "!") == 1


def test_accepted_answers_count() -> None:
    """`meta["accepted"]` holds other right answers."""
    assert qs.grade(conversation("q", "os.path", accepted=["posixpath"]), "posixpath").correct


def test_guessing_is_the_strongest_blind_strategy() -> None:
    """80% "yes" makes 80% right answers worthless: stated chance of 50% would hide that."""
    asked = [conversation(f"q{i}", "yes" if i % 5 else "no", task="yesno") for i in range(50)]
    always = [qs.grade(c, "yes") for c in asked]
    score = qs.scores(always, {"yesno": 0.5})[0]
    assert score.correct.value == score.guess == 0.8
    assert score.guess_from == "most common answer"
    assert not score.above_guess
    perfect = qs.scores([qs.grade(c, c.messages[-1].content) for c in asked], {"yesno": 0.5})[0]
    assert perfect.above_guess and perfect.correct.low > 0.9


def test_free_text_is_judged_by_overlap() -> None:
    """Exact match says 0 for every paraphrase of a long answer."""
    asked = [
        conversation(f"what does f{i} do", f"return the sum of items in the {c} list of names", task="docs")
        for i, c in enumerate("abcdefghijklmnopqrst")
    ]
    near = qs.grade_all(asked, [c.messages[-1].content.replace("items", "things") for c in asked])
    score = qs.scores(near)[0]
    assert score.scorers == ("word_overlap",) and score.correct.value == 1
    assert score.word_f1 is not None and 0.8 < score.word_f1.value < 1
    assert score.guess == 1.0 and not score.above_guess  # another question's answer overlaps just as well, and the score says so


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ("he has 18 eggs left in his basket today", True),
        ("he has eighteen eggs left in the basket today", True),
        ("he has 99 eggs left in the basket today", False),
        ("he has eggs left in the basket today", False),
        ("he has 18 or 19 eggs left in the basket today", False),
        ("he has 18% eggs left in the basket today", False),
    ],
)
def test_free_text_with_another_number_is_wrong(given: str, same: bool) -> None:
    """A sentence with a wrong number shares nearly all its words with the right one, and was called right for them."""
    graded = qs.grade(conversation("q", "he has 18 eggs left in the basket today"), given)
    assert graded.scorer == "word_overlap" and graded.correct is same


def test_overlap_is_reported_for_free_text_only() -> None:
    """Overlap of words next to `4` or to a worked solution looks like a second, kinder grade of the same answers."""
    asked = [
        conversation("q", text, task=task) for task, text in (("sum", "4"), ("solved", "He has 2 + 2 = 4 eggs in all.\n#### 4"))
    ]
    predictions = qs.grade_all(asked, ["5", "He has 2 + 2 = 4 eggs in all.\n#### 5"])
    assert [(p.scorer, p.correct, p.word_f1) for p in predictions] == [("answer", False, None), ("numeric", False, None)]
    assert all(score.word_f1 is None for score in qs.scores(predictions))


def test_a_question_without_an_answer_is_named() -> None:
    """It could only be graded wrong."""
    lonely = Conversation.make([Message(role="user", content="q")], source="test")
    with pytest.raises(DataError, match="without its answer"):
        qs.ask([lonely], prompt, lambda p, s: [""])


def test_samples_show_what_really_follows_and_does_not_pick() -> None:
    """A collection of chosen successes says nothing; a continuation without the truth cannot be judged."""
    text = " ".join(f"word{i}" for i in range(200))

    def generate(prompts: list[list[int]], sampling: dict[str, Any]) -> list[str]:
        return ["!" for _ in prompts]

    rows = samples.continuations(
        generate, lambda t: list(t.encode()), [0], documents=[text, "Other words begin this one.\n"] * 9, documents_used=3
    )
    assert [r["prompt"] for r in rows if r["kind"] == "prompt"] == ["word0 word1 word2", "Other words begin"]
    held = [r for r in rows if r["kind"] == "held-out document"]
    assert len(rows) == 2 + 3 and len(held) == 3
    assert all(text.startswith(r["prompt"] + r["truth"]) and len(r["prompt"]) >= 20 for r in held)
    predictions = [qs.grade(conversation(f"q{i}", "a", task="t"), "a" if i % 2 else "b") for i in range(40)]
    shown = samples.answers(predictions, most=5)
    assert [r["prompt"] for r in shown] == ["q0", "q8", "q16", "q24", "q32"]
    many = [qs.grade(conversation(f"q{i}", "a", task=f"t{i % 30}"), "a") for i in range(300)]
    assert len(samples.answers(many)) == 60
