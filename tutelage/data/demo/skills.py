"""`skill:add,reverse?count=2000&seed=0`: problems with one right answer, so that learning can be measured exactly.

Letters stand apart ("k b t"), so that a subword tokenizer cannot hide them and a small model can see what it is asked.
A problem is held out by a hash of its content alone: no seed, count or phrasing moves it to the training side.
"""

from __future__ import annotations

import functools
import random
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tutelage.data.clean.split import TRAIN, VALIDATION, position
from tutelage.errors import ConfigError
from tutelage.records import Conversation, Message

HELD_OUT_SHARE = 0.2
ONES = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
        "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip
PATIENCE = 1000  # draws in a row that give nothing new, before a small problem space counts as used up


@dataclass(slots=True, frozen=True)
class Problem:
    """What is asked, without its wording. Example: Problem(("3", "4"), "7")."""

    given: tuple[str, ...]  # fills {0}, {1}, … of the phrasings; with the task it identifies the problem
    answer: str


@dataclass(slots=True, frozen=True)
class Skill:
    """A task: how a problem is drawn, how it is asked, and what guessing would score."""

    draw: Callable[[random.Random], Problem]
    phrasings: tuple[str, ...]
    chance: float  # expected exact-match accuracy of the best guess that ignores which problem is asked
    derivation: str


def read(names: str, parameters: Mapping[str, str]) -> Iterator[Conversation]:
    """Conversations of the named skills (comma-separated, `all` for every one).

    Parameters: `count` (training problems a skill, 1000), `held_out` (held-out problems a skill, 100), `seed` (0),
    `max` (largest operand of add, subtract, larger: 50). Raises `ConfigError` for an unknown skill or parameter.
    """
    unknown = set(parameters) - {"count", "held_out", "seed", "max"}
    if unknown:
        raise ConfigError("unknown parameter of skill:", found=sorted(unknown)[0], expected="count, held_out, seed, max")
    values = {"count": 1000, "held_out": 100, "seed": 0, "max": 50}
    for key, text in parameters.items():
        if not text.isdigit():
            raise ConfigError("not a whole number", field=f"skill:?{key}", found=text, expected="0, 1, 2, …")
        values[key] = int(text)
    known = skills(values["max"])
    chosen = list(known) if names == "all" else [n.strip() for n in names.split(",") if n.strip()]
    for name in chosen or [names]:
        if name not in known:
            raise ConfigError("unknown skill", field="skill:", found=name, expected=", ".join(known))
    for name in chosen:
        yield from generate(name, known[name], values["count"], values["held_out"], values["seed"])


def generate(name: str, skill: Skill, count: int, held_out: int, seed: int) -> Iterator[Conversation]:
    """`count` training and `held_out` held-out conversations, all different; fewer where the problem space is small."""
    rng = random.Random(f"{name} {seed}")
    wanted = {TRAIN: count, VALIDATION: held_out}
    seen: set[tuple[str, ...]] = set()
    misses = 0
    while any(wanted.values()) and misses < PATIENCE:
        problem = skill.draw(rng)
        side = VALIDATION if position(f"{name} {problem.given}") < HELD_OUT_SHARE else TRAIN
        misses += 1
        if problem.given in seen or not wanted[side]:
            continue
        misses = 0
        seen.add(problem.given)
        wanted[side] -= 1
        question = rng.choice(skill.phrasings).format(*problem.given)
        yield Conversation.make(
            [Message(role="user", content=question), Message(role="assistant", content=problem.answer)],
            source=f"skill:{name}#{len(seen)}",
            licence="CC0-1.0",
            meta={"task": name, "answer": problem.answer, "family": f"{name} {' '.join(problem.given)}", "split": side,
                  "chance": round(skill.chance, 4), "scorer": "exact"},
        )  # fmt: skip


def skills(largest: int = 50) -> dict[str, Skill]:
    """Every skill by name. `largest`: the largest operand of the arithmetic ones."""
    n = largest + 1
    two_of = "one of the two given answers is right"
    return {
        "add": Skill(lambda r: _add(r, largest), ("What is {0} + {1}?", "{0} plus {1} is what?"), 1 / n,
                     f"the most frequent sum of two numbers from 0 to {largest} is {largest}: 1/{n} of the pairs"),
        "subtract": Skill(lambda r: _subtract(r, largest), ("What is {0} - {1}?", "{0} minus {1} is what?"), 2 / (n + 1),
                          f"the most frequent difference is 0: {n} of the {n}*{n + 1}/2 ordered pairs"),
        "larger": Skill(lambda r: _larger(r, largest), ("Which is larger, {0} or {1}?",), 1 / 2, two_of),
        "even": Skill(_even, ("Is {0} even or odd?",), 1 / 2, two_of),
        "sort_numbers": Skill(_sort_numbers, ("Sort these numbers: {0}",), 1 / 6, "3 different numbers have 6 orders"),
        "largest": Skill(_largest, ("Which is the largest of {0}?",), 1 / 3, "one of three numbers is right"),
        "reverse": Skill(_reverse, ("Reverse: {0}", "Say these letters backwards: {0}"), 1 / 6,
                         "3 different letters have 6 orders"),
        "upper": Skill(_upper, ("Write in capital letters: {0}",), 1 / 26**3, "any of the 26**3 rows of three letters"),
        "count_letter": Skill(_count_letter, ("How many times is {0} in {1}?",), 1 / 4, "the count is drawn evenly from 1 to 4"),
        "first_letter": Skill(_first_letter, ("Which is the first letter of {0}?",), 1 / 4, "one of four letters is right"),
        "last_letter": Skill(_last_letter, ("Which is the last letter of {0}?",), 1 / 4, "one of four letters is right"),
        "first_word": Skill(_first_word, ("Which is the first word of: {0}", "{0}. Say the first word."), 1 / 4,
                            "one of four words is right"),
        "last_word": Skill(_last_word, ("Which is the last word of: {0}", "{0}. Say the last word."), 1 / 4,
                           "one of four words is right"),
        "in_digits": Skill(_in_digits, ("Write in digits: {0}", "{0}"), 1 / 9999, "any of the numbers from 1 to 9999"),
        "iso_date": Skill(_iso_date, ("Write as year-month-day: {0}", "{0}"), 1 / (200 * 12 * 28), "any day of 200 years"),
        "alphabetical": Skill(_alphabetical, ("Which comes first in the alphabet, {0} or {1}?",), 1 / 2, two_of),
    }  # fmt: skip


@functools.cache
def words() -> tuple[str, ...]:
    """Common English words."""
    return tuple(Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split())


def _add(rng: random.Random, largest: int) -> Problem:
    a, b = rng.randint(0, largest), rng.randint(0, largest)
    return Problem((str(a), str(b)), str(a + b))


def _subtract(rng: random.Random, largest: int) -> Problem:
    pairs = rng.randrange((largest + 1) * (largest + 2) // 2)  # every pair a >= b equally often
    a = int(((8 * pairs + 1) ** 0.5 - 1) / 2)
    b = pairs - a * (a + 1) // 2
    return Problem((str(a), str(b)), str(a - b))


def _larger(rng: random.Random, largest: int) -> Problem:
    a, b = rng.sample(range(largest + 1), 2)
    return Problem((str(a), str(b)), str(max(a, b)))


def _even(rng: random.Random) -> Problem:
    a = rng.randint(0, 999)
    return Problem((str(a),), "odd" if a % 2 else "even")


def _sort_numbers(rng: random.Random) -> Problem:
    numbers = rng.sample(range(10), 3)
    return Problem((_row(numbers),), _row(sorted(numbers)))


def _largest(rng: random.Random) -> Problem:
    numbers = rng.sample(range(10), 3)
    return Problem((_row(numbers),), str(max(numbers)))


def _reverse(rng: random.Random) -> Problem:
    letters = rng.sample(string.ascii_lowercase, 3)
    return Problem((_row(letters),), _row(letters[::-1]))


def _upper(rng: random.Random) -> Problem:
    letters = rng.choices(string.ascii_lowercase, k=3)
    return Problem((_row(letters),), _row(letters).upper())


def _count_letter(rng: random.Random) -> Problem:
    letter, *others = rng.sample(string.ascii_lowercase, 5)
    count = rng.randint(1, 4)
    row = [letter] * count + rng.choices(others, k=5 - count)
    rng.shuffle(row)
    return Problem((letter, _row(row)), str(count))


def _first_letter(rng: random.Random) -> Problem:
    letters = rng.sample(string.ascii_lowercase, 4)
    return Problem((_row(letters),), letters[0])


def _last_letter(rng: random.Random) -> Problem:
    letters = rng.sample(string.ascii_lowercase, 4)
    return Problem((_row(letters),), letters[-1])


def _first_word(rng: random.Random) -> Problem:
    chosen = rng.sample(words(), 4)
    return Problem((_row(chosen),), chosen[0])


def _last_word(rng: random.Random) -> Problem:
    chosen = rng.sample(words(), 4)
    return Problem((_row(chosen),), chosen[-1])


def _alphabetical(rng: random.Random) -> Problem:
    chosen = rng.sample(words(), 2)
    return Problem(tuple(chosen), min(chosen))


def _in_digits(rng: random.Random) -> Problem:
    n = rng.randint(1, 9999)
    return Problem((number_words(n),), str(n))


def number_words(n: int) -> str:
    """English for a number from 1 to 9999. Example: `number_words(1215)` is "one thousand two hundred fifteen"."""
    tens, ones = divmod(n % 100, 10)
    parts = [f"{ONES[n // 1000]} thousand"] if n >= 1000 else []
    parts += [f"{ONES[n // 100 % 10]} hundred"] if n // 100 % 10 else []
    parts += [ONES[n % 100]] if 0 < n % 100 < 20 else [" ".join(x for x in (TENS[tens], ONES[ones]) if x)] if n % 100 else []
    return " ".join(parts)


def _iso_date(rng: random.Random) -> Problem:
    year, month, day = rng.randint(1850, 2049), rng.randint(1, 12), rng.randint(1, 28)
    said = rng.choice((f"{day} {MONTHS[month - 1]} {year}", f"{MONTHS[month - 1]} {day} {year}"))
    return Problem((said,), f"{year}-{month:02d}-{day:02d}")


def _row(items: list[str] | list[int]) -> str:
    return " ".join(map(str, items))


CHANCE: dict[str, float] = {name: skill.chance for name, skill in skills().items()}
"""Chance level of each skill at the default size: accuracy of the best guess that knows the task but not how to do it (where
the answer is one of the things named in the question, a guess among those). `skills()[name].derivation` says why."""
