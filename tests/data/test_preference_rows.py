"""Rows of preferences that cannot be trusted: what is said names what stands in the row."""

from __future__ import annotations

from typing import Any

import pytest

from tutelage.data.sources.feedback import read
from tutelage.errors import DataError
from tutelage.records import Preference

U, V, A, B = ({"role": r, "content": c} for r, c in (("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")))
S = {"role": "system", "content": "s"}


def preference(row: dict[str, Any]) -> Preference:
    found = read("preferences", row, file="rows.jsonl", line=7, source="rows.jsonl#7", fields=None)
    assert isinstance(found, Preference)
    return found


BAD: list[tuple[dict[str, Any], str, str, str]] = [  # row, field, found, words
    ({"prompt": "zzz", "chosen": [U, A], "rejected": [U, B]}, "chosen[0]", "user: a", "row's `prompt`"),
    ({"prompt": "a", "chosen": [U, A], "rejected": [V, B]}, "rejected[0]", "user: b", "row's `prompt`"),
    ({"prompt": [S, U], "chosen": [U, A], "rejected": [U, B]}, "chosen[0]", "user: a", "system: s / user: a"),
    ({"question": "zzz", "chosen": "Human: a\n\nAssistant: c", "rejected": "d"}, "chosen", "user: a", "row's `question`"),
    ({"prompt": "a", "chosen": "c", "rejected": None}, "rejected", "null", "expected: a string"),
    ({"prompt": "a", "chosen": None, "rejected": "d"}, "chosen", "null", "fix:"),
    ({"chosen": [U, A], "rejected": None}, "rejected", "null", "a list of {role, content}"),
    ({"prompt": "a", "chosen": "c", "rejected": 4}, "rejected", "4", "no text"),
    ({"prompt": [U, V], "chosen": [A], "rejected": [B]}, "prompt[1]", "user after user", "out of order"),
    ({"prompt": [U], "chosen": [U, A], "rejected": [U, B, A]}, "rejected[2]", "assistant after assistant", "out of order"),
    ({"chosen": [U, A, A], "rejected": [U, B]}, "chosen[2]", "assistant after assistant", "out of order"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "field", "found", "words"), BAD)
def test_bad_preferences_are_named_by_what_the_row_has(row: dict[str, Any], field: str, found: str, words: str) -> None:
    """Guards against `messages[1].role` of a row that has no `messages`, and against a null that is shown as nothing."""
    with pytest.raises(DataError) as caught:
        preference(row)
    error = caught.value
    assert (error.field, str(error.found)) == (field, found) and words in str(error)
    assert error.fix and str(error).startswith("rows.jsonl:7: ")


def test_a_prompt_may_be_repeated_or_not() -> None:
    """Guards against rules so strict that rows which agree are refused."""
    rows = [{"prompt": "a", "chosen": [U, A], "rejected": [U, B]}, {"prompt": [U], "chosen": [A], "rejected": [B]},
            {"chosen": [U, A], "rejected": [U, B]}, {"question": "a", "chosen": "c", "rejected": "d"}]  # fmt: skip
    assert {tuple(m.content for m in (*r.prompt, *r.chosen, *r.rejected)) for r in map(preference, rows)} == {("a", "c", "d")}
    long = preference({"prompt": [U, A], "chosen": [V, A], "rejected": [V, B]})
    assert [m.content for m in long.prompt] == ["a", "c", "b"]
