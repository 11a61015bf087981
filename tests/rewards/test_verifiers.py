"""Verifiers: what they hold to be right, and texts made to break them."""

from __future__ import annotations

import importlib.util
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.rewards.rollouts import rollout, rubric
from tutelage.config.rewards import Maths, terms_of
from tutelage.errors import ConfigError, MissingExtra, RewardError
from tutelage.records import Message, Prompt, Rollout
from tutelage.rewards import maths
from tutelage.rewards.build import build
from tutelage.rewards.check import judge_texts
from tutelage.rewards.plain import Length
from tutelage.rewards.rubric import Rubric

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="NOT CHECKED: maths by math-verify, which is not installed"
)


@pytest.fixture(scope="module")
def by_math_verify() -> Iterator[Rubric]:
    with rubric({"maths": {"seconds": 1.0}}) as made:
        yield made


PAIRS = [  # expected, text, right as mathematics, right by numbers
    ("18", "so she makes 18 dollars.", 1, 1), ("18", "#### 18", 1, 1), ("She sells 9.\n#### 18", "It is $18", 1, 1),
    ("#### 1,234", "1234.0", 1, 1), ("70000", "about $70,000", 1, 1), ("1/2", "0.5", 1, 1), ("0.5", r"\boxed{\frac{1}{2}}", 1, 1),
    ("3.5", "3 1/2", 1, 1), ("1000", "1e3", 1, 1), ("5", "5 km", 1, 1), ("-7", "-7", 1, 1), ("3", "the answer is 4", 0, 0),
    ("18", "no idea", 0, 0), ("18", "", 0, 0), ("10", "10,5", 0, 0),
    (r"\frac{3}{4}", "The answer is 3/4.", 1, 1), (r"2x+1", "$1+2x$", 1, None), (r"\sqrt{8}", r"$2\sqrt{2}$", 1, None),
    ("x=3", "$x = 3$", 1, 1), ("x-1", "$-1+x$", 1, None), ("2x+1", "1", 0, None), ("(1,2)", "$(1,2)$", 1, None),
    ("18", "17, no: 18", 1, 1), ("12", "12", 1, 1), ("12", "It is 13, not 12.\n#### 13", 0, 0),
]  # fmt: skip


@needs_math_verify
def test_maths(by_math_verify: Rubric) -> None:
    """Guards the reward of every maths run: what is equal counts, whatever it looks like."""
    found = by_math_verify.judge([rollout(text, answer) for answer, text, _, _ in PAIRS])
    wrong = [(pair, v) for pair, v in zip(PAIRS, found, strict=True) if v.reward != pair[2]]
    assert not wrong


def test_maths_by_numbers() -> None:
    """Guards the reader that is used where it is asked for."""
    pairs = [pair for pair in PAIRS if pair[3] is not None]
    with rubric({"maths": {"by": "numbers"}}) as numbers:
        found = numbers.judge([rollout(text, answer) for answer, text, _, _ in pairs])
    assert [v.reward for v in found] == [pair[3] for pair in pairs]


def test_nothing_stands_in_for_math_verify_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a reward that silently means something else on another machine."""
    monkeypatch.setattr(maths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"by: numbers") as caught:
        rubric({"maths": 1.0})
    assert 'pip install "tutelage[rl]"' in str(caught.value)
    assert rubric({"maths": {"by": "numbers"}}).judge([rollout("4", "4")])[0].reward == 1


HOSTILE = [
    "9**9**9", r"$9^{9^{9^{9}}}$", r"\boxed{9^{9^{9^9}}}", "9" * 10**6, "(" * 10**5,
    r"$" + r"\frac{" * 3000 + "1" + "}{2}" * 3000 + "$",
    r"\boxed{" * 5000, "{" * 20_000, "\\" * 20_000, "$" * 20_000, "1e999999999", r"\boxed{10^{10^{10}}!}",
    r"$\sum_{i=1}^{10^{99}} i!$",
    "\x00\ud800\u202e", r"\boxed{\sqrt{" * 2000, "-" * 20_000 + "1", "1/0", r"$\int_0^1 x^{x^{x}} dx$", "import os",
    "#### " * 5000,
    r"\boxed{" + "+".join(f"x_{i}" for i in range(3000)) + "}", r"\boxed{(x+y+z)^{400}}",
]  # fmt: skip


@needs_math_verify
def test_maths_stands_up_to_hostile_texts(by_math_verify: Rubric) -> None:
    """Guards the run: no text hangs it, fills its memory, ends it, or is right; those past the limit are counted."""
    found = by_math_verify.judge([rollout(text, "18") for text in HOSTILE])
    assert [v.reward for v in found] == [0.0] * len(HOSTILE)
    assert all(v.notes["maths"] for v in found)
    late = sum("took more" in v.notes["maths"] for v in found)
    assert by_math_verify.past_limits["maths"] == late >= 1
    assert by_math_verify.judge([rollout("18", "18")])[0].reward == 1  # and it goes on


LAX = {"ignore_case": True, "ignore_punctuation": True}


@pytest.mark.parametrize(
    ("settings", "text", "answer", "value"),
    [
        ({"kind": "exact"}, "t q h", "T Q H", 0), ({"kind": "exact"}, "103", "10³", 0), ({"kind": "exact"}, "C", "C#", 0),
        ({"kind": "exact"}, "", "...", 0), ({"kind": "exact", **LAX}, "5", "-5", 0), ({"kind": "exact"}, "\u22125", "-5", 1),
        ({"kind": "exact", **LAX}, " The  Cat! ", "cat", 1), ({"kind": "exact"}, "cats", "cat", 0),
        ({"kind": "exact", **LAX}, "the", "The", 1),
        ({"kind": "exact", "ignore_case": False}, "Cat", "cat", 0),
        ({"kind": "exact", "ignore_punctuation": False}, "cat.", "cat", 0),
        ({"kind": "exact", "tag": "answer"}, "hm <answer>no</answer> <answer>cat</answer>", "cat", 1),
        ({"kind": "exact", "tag": "answer"}, "cat", "cat", 0), ({"kind": "exact"}, "ﬁve", "five", 1),
        ({"kind": "numeric"}, "it is 3.1415", "3.1416", 0), ({"kind": "numeric", "tolerance": 0.001}, "3.1415", "3.1416", 1),
        ({"kind": "numeric", "relative": 0.1}, "91", "100", 1), ({"kind": "numeric", "relative": 0.1}, "89", "100", 0),
        ({"kind": "regex", "pattern": "^a+b$"}, "aaab", None, 1), ({"kind": "regex", "pattern": "b"}, "abc", None, 1),
        ({"kind": "regex", "pattern": "b", "match": "full"}, "abc", None, 0),
        ({"kind": "format", "tags": ["think", "answer"]}, "<think>x</think>\n<answer>y</answer>\n", None, 1),
        ({"kind": "format", "tags": ["think", "answer"]}, "<think>x</think> so <answer>y</answer>", None, 0),
        ({"kind": "format", "tags": ["think", "answer"]}, "<answer>y</answer><think>x</think>", None, 0),
        ({"kind": "format", "tags": ["think"]}, "<think><think>x</think>", None, 0),
        ({"kind": "format", "pattern": r"\d+ apples"}, "12 apples\n", None, 1),
        ({"kind": "length", "target": 4}, "a b c", None, 0.75), ({"kind": "length", "target": 4}, "a " * 9, None, 0),
        ({"kind": "length", "maximum": 4}, "a b c d", None, 0), ({"kind": "length", "maximum": 4}, "a b c d e", None, -1),
        ({"kind": "length", "maximum": 10, "margin": 4}, "a " * 7, None, -0.25),
        ({"kind": "length", "maximum": 10, "margin": 4}, "a " * 10, None, -1),
        ({"kind": "length", "maximum": 10, "margin": 4}, "a " * 6, None, 0),
        ({"kind": "length", "maximum": 3, "unit": "characters"}, "abcd", None, -1),
    ],
)  # fmt: skip
def test_plain_terms(settings: dict[str, Any], text: str, answer: str | None, value: float) -> None:
    """Guards what each setting means."""
    with rubric({"term": settings}) as made:
        assert made.judge([rollout(text, answer)])[0].terms == {"term": value}


def rollout_of(text: str, answer: str | None = None) -> Rollout:
    """One whose text alone is long."""
    return replace(rollout("", answer), text=text)


MUCH = 200_000
LONG = [  # text, expected, value
    ("cat " * MUCH, "cat", 0), ("cat" * MUCH, "cat", 0), ("cat" + " " * MUCH, "cat", 1), (" " * MUCH + "cat", "Cat", 1),
    ("." * MUCH + "the cat" + "\u3002" * MUCH, "cat", 1), ("\u0323\u0301" * MUCH, "cat", 0), ("the " * MUCH + "cat", "cat", 1),
    ("cat" + " ." * MUCH + "s", "cat", 0), ("e\u0301 " * 9000, "\u00e9 " * 9000, 1),
    ("a\u0323\u0301" * 9000, "\u1ea1\u0301" * 9000, 1),
]  # fmt: skip


@pytest.mark.parametrize(("text", "answer", "value"), LONG, ids=range(len(LONG)))
def test_long_texts_are_read_as_far_as_they_are_right(text: str, answer: str, value: float) -> None:
    """Guards the trainer, which is where this runs: a text of a hundred million characters took gigabytes, and one of marks that
    stand above one another hours. Right answers with much that does not count stay right."""
    tracemalloc.start()
    with rubric({"exact": LAX}) as made:
        assert made.judge([rollout_of(text, answer)])[0].reward == value
    assert tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()


@pytest.mark.parametrize("settings", [{"target": 4}, {"maximum": 4}, {"maximum": 4, "margin": 2}])
def test_words_are_counted_up_to_the_limit(settings: dict[str, Any]) -> None:
    """Guards against a list of fifty million words; the values are those of all of them."""
    texts = ["a " * n for n in (0, 3, 4, 5, 8, 9, 10**6)]
    tracemalloc.start()
    with rubric({"length": {**settings, "unit": "words"}}) as made:
        found = made.judge([rollout_of(text) for text in texts])
    assert tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()
    assert [v.reward for v in found] == [Length(made.terms["length"][0].settings).value(len(t.split())) for t in texts]
    assert found[-1].notes["length"].startswith("more than") and found[1].notes["length"] == "3 words"


def test_a_catastrophic_pattern_is_given_up() -> None:
    """Guards the run against a pattern that takes for ever on one text, of the recipe or of a prompt's row."""
    bad = "a" * 40 + "b"
    with rubric({"regex": {"seconds": 0.5}}) as made:
        found = made.judge(
            [rollout(bad, pattern="^(a+)+$"), rollout("aaa", pattern="^(a+)+$"), rollout("x" * 300_000, pattern="x")]
        )
        assert [v.reward for v in found] == [0, 1, 0] and made.past_limits["regex"] == 2
        with pytest.raises(RewardError, match=r"0/abc/3.*no regular expression"):
            made.judge([rollout("a", pattern="(", number=3)])
        with pytest.raises(RewardError, match="has no regular expression"):
            made.judge([rollout("a")])
    with pytest.raises(ConfigError, match="not a regular expression"):
        rubric({"regex": {"pattern": "("}})


SCHEMA = {
    "type": "object", "required": ["name", "tags"], "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 1, "pattern": "^[a-z]+$"}, "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2, "uniqueItems": True},
    },
    "$defs": {"tag": {"enum": ["a", "b", 1]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def by_schema() -> Iterator[Rubric]:
    with rubric({"json_schema": 1.0}) as made:
        yield made


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"name": "x", "tags": []}', 1), ('{"name": "x", "tags": ["a", 1], "age": 3.0}', 1), ('{"name": "x"}', 0),
        ('{"name": "", "tags": []}', 0), ('{"name": "X", "tags": []}', 0), ('{"name": "x", "tags": ["c"]}', 0),
        ('{"name": "x", "tags": ["a", "a"]}', 0), ('{"name": "x", "tags": [true]}', 0),
        ('{"name": "x", "tags": [], "age": -1}', 0),
        ('{"name": "x", "tags": [], "age": true}', 0), ('{"name": "x", "tags": [], "more": 1}', 0), ("[]", 0), ("NaN", 0),
        ("", 0),
        ("[" * 100_000, 0), ('{"a":' * 100_000, 0), ("9" * 10_000, 0), ('{"name": "x", "tags": []} extra', 0),
    ],
)  # fmt: skip
def test_json_schema(by_schema: Rubric, text: str, value: float) -> None:
    """Guards what is valid, and that no text breaks the check."""
    assert by_schema.judge([rollout(text, schema=SCHEMA)])[0].reward == value


@pytest.mark.parametrize(
    ("schema", "fits", "misfits"),
    [
        ({"anyOf": [{"type": "null"}, {"const": 1}]}, "1.0", "true"), ({"oneOf": [{"minimum": 1}, {"maximum": 3}]}, "5", "2"),
        ({"not": {"type": "string"}}, "1", '"a"'), ({"if": {"const": 1}, "then": False, "else": {"const": 2}}, "2", "1"),
        ({"multipleOf": 0.1}, "0.3", "0.35"), ({"exclusiveMaximum": 3}, "2.9", "3"),
        ({"contains": {"const": 1}}, "[0, 1]", "[0]"),
        ({"prefixItems": [{"const": 1}], "items": {"const": 2}}, "[1, 2]", "[2, 2]"), ({"allOf": [{"minimum": 1}]}, "1", "0"),
        ({"patternProperties": {"^a": {"const": 1}}}, '{"a1": 1, "b": 3}', '{"a1": 2}'),
        ({"const": {"a": [1]}}, '{"a": [1.0]}', "{}"),
        ({"propertyNames": {"maxLength": 1}}, '{"a": 1}', '{"ab": 1}'), ({"dependentRequired": {"a": ["b"]}}, "{}", '{"a": 1}'),
    ],
)  # fmt: skip
def test_schema_keywords(by_schema: Rubric, schema: dict[str, Any], fits: str, misfits: str) -> None:
    """Guards each keyword by a value on either side of it, and settings against the prompt's own facts."""
    assert [v.reward for v in by_schema.judge([rollout(fits, schema=schema), rollout(misfits, schema=schema)])] == [1, 0]


def test_a_schema_that_can_not_be_checked_is_refused() -> None:
    """Guards against a keyword that is passed over, so that wrong texts would be right."""
    with pytest.raises(ConfigError, match="`unevaluated` can't be checked"):
        rubric({"json_schema": {"definition": {"properties": {"a": {"unevaluated": False}}}}})
    for reference in ("#/$defs/none", "https://example.invalid/schema.json"):
        with rubric({"json_schema": 1.0}) as made, pytest.raises(RewardError, match=r"0/abc/0.*refers to nothing"):
            made.judge([rollout("1", schema={"$ref": reference})])
    with pytest.raises(ConfigError, match="unknown draft"):
        rubric({"json_schema": {"definition": {"$schema": "https://example.invalid/draft"}}})


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ({}, "no rewards"), ({"math": 1.0}, "did you mean `maths`"), ({"mine": 1.0}, "say which"),
        ({"short": {"kind": "length", "traget": 60}}, "did you mean `target`"), ({"length": 1.0}, "one of target and maximum"),
        ({"length": {"target": 3, "maximum": 4}}, "one of target and maximum"), ({"format": 1.0}, "one of tags and pattern"),
        ({"exact": {"tolerance": 1}}, "unknown key `tolerance`"), ({"exact": "much"}, "weight"),
        ({"exact": float("nan")}, "finite"),
        ({"length": {"maximum": 5, "margin": 6}}, "margin"), ({"function": {"path": "mine"}}, "path"),
    ],
)  # fmt: skip
def test_settings_are_honoured_or_refused(rewards: dict[str, Any], said: str) -> None:
    """Guards a recipe's `rewards` against names that do nothing."""
    with pytest.raises(ConfigError) as caught:
        terms_of(rewards)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"kind": "regex", "pattern": "("}, "pattern"), ({"kind": "format", "pattern": "("}, "pattern"),
        ({"kind": "json_schema", "definition": {"type": "text"}}, "definition.type"), ({"kind": "judge"}, "base_url"),
        ({"kind": "judge", "base_url": "ftp://x"}, "base_url"),
        ({"kind": "judge", "base_url": "http://x", "key_variable": "NO_SUCH_KEY"}, "key_variable"),
        ({"kind": "function", "path": "no_such_module:score"}, "path"),
    ],
)  # fmt: skip
def test_a_setting_is_named_as_the_recipe_has_it(settings: dict[str, Any], field: str) -> None:
    """Guards against `field: pattern` in a recipe of five terms, two of which have one."""
    with pytest.raises(ConfigError) as caught:
        rubric({"right": {"kind": "exact"}, "mine": settings})
    assert caught.value.field == f"rewards.mine.{field}"


def test_what_a_stage_has_not_wired_is_named() -> None:
    """Guards against a term that fails in the middle of a run instead of before it."""
    with pytest.raises(ConfigError, match="`model` needs `score_texts`"):
        rubric({"model": 1.0})
    with pytest.raises(ConfigError, match="no model to ask"):
        rubric({"judge": {"question": "{text}"}})
    assert isinstance(terms_of({"maths": 2})["maths"], Maths)
    scored = build(terms_of({"model": {"centre": 1.0, "scale": 2.0}}), score_texts=lambda texts: [len(ids) for ids in texts])
    assert scored.judge([rollout("a b c")])[0].reward == (2 + 3 - 1.0) / 2


@pytest.mark.parametrize(
    ("rewards", "words"),
    [({"exact": 1}, "no expected answer"), ({"numeric": 1}, "no expected answer"), ({"json_schema": 1}, "no JSON schema")],
)
def test_a_prompt_is_named_by_its_place(rewards: dict[str, Any], words: str) -> None:
    """Guards against a hash where the file and the line of the prompt are known."""
    prompt = Prompt.make([Message(role="user", content="2+2?")], source="sums/asked#2.jsonl#17")
    with rubric(rewards) as judge, pytest.raises(RewardError, match=words) as caught:
        judge_texts(judge, [(prompt, "4")])
    assert (caught.value.file, caught.value.line) == ("sums/asked#2.jsonl", 17)
    assert str(caught.value).startswith("sums/asked#2.jsonl:17: reward `") and prompt.id not in caught.value.message
