"""Numbers in texts."""

from __future__ import annotations

import random
import time
from fractions import Fraction

import pytest

from tutelage.rewards.numbers import last_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", "18"), ("so 3 + 4 = 7 apples.", "7"), ("#### 1,234", "1234"), ("We get 5.\n#### -7\nbye 9", "-7"),
        (r"thus \boxed{\frac{3}{4}} of 9", "3/4"), (r"\boxed{12", "12"), ("The answer is 6, since 2*3 and 9", "6"),
        ("the answer: $1,234.50 in all, after 2 days", "2469/2"), ("3/4", "3/4"), ("1 1/2 cups", "3/2"), 
        ("it is -3", "-3"), ("= −4", "-4"), ("1e3", "1000"), ("2.5E-1", "1/4"), (".5", "1/2"), ("50%", "50"),
        ("1,000,000.", "1000000"), ("12.", "12"), ("€ 20", "20"), ("2 days, 3 h", "3"), ("-$5", "-5"),
    ],
)  # fmt: skip
def test_last_number(text: str, value: str) -> None:
    """Guards the reading of answers as GSM8K and models write them."""
    assert last_number(text) == Fraction(value)


@pytest.mark.parametrize("text", ["", "none", "####", "1/0", r"\boxed{}", "9" * 61, "1e999999999", "-", r"\frac{1}{0}"])
def test_no_number(text: str) -> None:
    """Guards against errors, and against numbers that fill the memory."""
    assert last_number(text) is None


def test_time_grows_with_the_length_alone() -> None:
    """Guards the run against texts made to be slow: each of these took minutes with a pattern that goes back."""
    rng = random.Random(0)
    hostile = [
        "9" * 20_000,
        "1," * 10_000,
        "1 1/" * 5_000,
        "-" * 20_000,
        r"\boxed{" * 3_000,
        "9.9e" * 5_000,
        "answer is " * 2_000,
    ]
    hostile += ["".join(rng.choices("0123456789,./-e {}\\$#", k=20_000)) for _ in range(5)]
    began = time.process_time()
    for text in hostile:
        last_number(text)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\boxed{$9{,}500}", 9500), ("The answer is $9{,}500.", 9500), (r"\boxed{12\,500}", 12500), (r"\boxed{1{,}234}", 1234),
        ("The answer is 1\u00a0250", 1250), ("The answer is: 3 + 4 = 7", 7), ("The answer is twice 6, which is 12.", 12),
        (r"\boxed{2^{10}}", 1024), (r"\boxed{5\text{ cm}^2}", 5), ("5 m²", 5), ("It is 13, not 12.", 13), ("1½", Fraction(3, 2)),
        (r"3 \times 10^4", 30_000), ("3 million", 3_000_000), ("The answer is 12. No wait, 13.", 13), ("<<9*2=18>>18 a day", 18),
        ("She has 18 (eighteen) eggs.", 18), (r"\boxed{\$18}", 18), ("H2O: 7", 7),
    ],
)  # fmt: skip
def test_numbers_as_latex_and_people_write_them(text: str, value: int | Fraction) -> None:
    """Each of these was read as another number: 500, 9, 3, 6, 10, 2, ..."""
    assert last_number(text) == value


@pytest.mark.parametrize(
    "text",
    ["5-3", "10,5", "12 - 1", "8 or 10", "7 to 8", "x = 4 or x = 5", "not 8", "at least 8",
     "4x", "x^2", "2π", r"\sqrt{2}", "(1, 2)",
     "36 / 2", "10:30", "3.10.1", "±4", "1,00", r"\frac{x}{2}", "f(2)", "It is 11, so 12 - 1", "1939-1945", "the 1990s"],
)  # fmt: skip
def test_what_cannot_be_read_is_not_another_number(text: str) -> None:
    """As a reward each of these was worth 1 to a model that only had to name the last of its numbers."""
    assert last_number(text) is None
