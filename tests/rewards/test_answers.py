"""Stated answers: time, and mathematics in plain signs."""

from __future__ import annotations

import importlib.util
import random
import time

import pytest

from tests.rewards.rollouts import rollout, rubric
from tutelage.config.rewards import bounds, terms_of
from tutelage.rewards.answers import bare, right
from tutelage.rewards.forms import folded


def test_time_grows_with_the_length_alone() -> None:
    """Guards the trainer, in which answers are read, against texts made to be slow."""
    rng = random.Random(0)
    parts = (
        "The answer is ",
        "\"'",
        "- a\n",
        "7, ",
        "not ",
        "(b) ",
        "= ",
        "$",
        "**",
        "\\frac{1}",
        " ",
        "x",
        "1 1/",
        "it is not a, ",
        "a b ",
    )
    hostile = [part * (20_000 // len(part)) for part in parts] + ["".join(rng.choices(parts, k=5_000)) for _ in range(3)]
    began = time.process_time()
    for text in hostile:
        for expected in ("B", "7", "a, b", "Paris is nice", "\\sqrt{2}"):
            assert not right(expected, text, "Which of (A) a (B) b is 7?")
    assert time.process_time() - began < 20


def test_forms_keep_what_counts() -> None:
    """Unicode's compatibility form makes 103 of 10³ and 11/2 of 1½."""
    assert folded("10³ − 1½ ﬁve H₂O x⁻¹") == "10^3 - 1 1/2 five H2O x^-1"
    assert [bare(text) for text in (' **"Foo"**. ', "...", "a.", "`x`", "_x_")] == ["Foo", "...", "a", "x", "_x_"]


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="NOT CHECKED: math-verify is not installed")
def test_maths_reads_plain_signs_and_thin_spaces() -> None:
    """math-verify read 12\\,345 as 357 and 1\\,000 as 0, found no answer in these signs, and took one of two for the answer."""
    pairs = [
        (r"\boxed{12\,345}", "12345", 1), (r"\boxed{12\,345}", "357", 0), (r"\boxed{1\,000}", "1000", 1),
        (r"\boxed{1\,000}", "0", 0),
        ("The answer is \u22125", "-5", 1), ("π", r"\pi", 1), ("½", r"\frac{1}{2}", 1), ("sqrt(2)", r"\sqrt{2}", 1),
        ("√2", r"\sqrt{2}", 1),
        ("The answer is $9{,}500.", "9500", 1), (r"\boxed{12\,500}", "12500", 1),
        ("8 or 10", "10", 0), ("10000001", "10000000", 0),
        (r"\boxed{2^{10}}", "1024", 1), (r"\boxed{2^{10}}", "10", 0), ("0.333333", "1/3", 1),
        (r"$2\cdot 9$", "18", 1), (r"$2\cdot 9$", "9", 0),
        ("x²", "x^2", 1), ("It is not 12.", "12", 0),
    ]  # fmt: skip
    with rubric({"maths": 1.0}) as made:
        found = made.judge([rollout(text, answer, i) for i, (text, answer, _) in enumerate(pairs)])
    assert [pair for pair, v in zip(pairs, found, strict=True) if v.reward != pair[2]] == []


@pytest.mark.parametrize("kind", ["exact", "answer", "numeric"])
def test_any_of_several_right_answers_counts(kind: str) -> None:
    """Only the first of them did, as a reward."""
    with rubric({kind: 1.0}) as made:
        found = made.judge([rollout(text, "12", i, accepted=["14"]) for i, text in enumerate(("12", "14", "13"))])
    assert [v.reward for v in found] == [1, 1, 0]


def test_bounds_of_rewards() -> None:
    """An interval of held-out rewards left what a reward can be."""
    assert bounds(terms_of({"exact": 2.0, "length": {"target": 5, "weight": -0.5}})) == (-0.5, 2.0)
    assert bounds(terms_of({"maths": 1.0, "length": {"maximum": 5}})) == (-1.0, 1.0)
    assert bounds(terms_of({"function": {"path": "a:b"}})) is None
