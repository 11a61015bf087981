"""Schemas as they are compiled: what is let through is valid JSON by the schema as it was given, and ordinary answers are let
through. The answers are given byte by byte to the library and judged by `jsonschema`."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tutelage.errors import ConfigError
from tutelage.structured.grammar import LIMITS, json_text
from tutelage.structured.json_schema import prepare
from tutelage.structured.schema_proofs import without_nul

llguidance = pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

INTEGER, TEXT = {"type": "integer"}, {"type": "string"}
ESCAPED = '{"a": 1, "\\u0061": "x"}'  # the name a again, for which the schema has an integer


class Bytes:
    tokens = (*(bytes([i]) for i in range(256)), b"<|end|>")
    bos_token_id, eos_token_id, special_token_ids = None, 256, (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


TOKENS = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()), n_vocab=257, eos_token=[256])


def taken(schema: Any, answers: list[str]) -> list[str]:
    """The answers that the compiled grammar lets through."""
    library = llguidance.LLMatcher
    grammar = library.grammar_from_json_schema(json_text(schema))
    matcher = library(TOKENS, grammar, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))
    assert not matcher.is_error(), matcher.get_error()
    out = []
    for answer in answers:
        walk, given = matcher.deep_copy(), list(answer.encode())
        if walk.try_consume_tokens(given) == len(given) and walk.is_accepting():
            out.append(answer)
    return out


OBJECTS = ['{"a": 1}', '{"a": 1, "c": "x"}', ESCAPED, '{"a": 1, "c": 1}', '{"c": "x"}', "{}", "null"]


@pytest.mark.parametrize(
    ("schema", "least"),
    [
        ({"type": "object", "properties": {"a": INTEGER}, "additionalProperties": TEXT}, 4),
        ({"type": "object", "properties": {"a": INTEGER}, "required": ["a"], "additionalProperties": TEXT}, 2),
        ({"type": ["object", "null"], "properties": {"a": INTEGER}, "additionalProperties": TEXT}, 5),
        ({"type": "object", "properties": {"a": INTEGER}, "additionalProperties": True}, 5),
        ({"properties": {"a": INTEGER, "b": {}}, "required": ["a", "c"]}, 2),
        ({"type": "object", "properties": {"o": {}, "a": INTEGER}, "additionalProperties": {"type": ["string", "null"]}}, 4),
        ({"allOf": [{"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}, {"properties": {"b": TEXT}}]}, 3),
        ({"allOf": [{"properties": {"a": INTEGER}}], "type": "object", "properties": {"a": {}}, "additionalProperties": TEXT}, 0),
        ({"$defs": {"x": {"properties": {"a": INTEGER}}}, "$ref": "#/$defs/x", "properties": {"c": TEXT}, "required": ["a"]}, 2),
        ({"type": "object", "properties": {"a": INTEGER}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, 3),
        ({"type": "object", "patternProperties": {"^a": INTEGER}}, 2),
        ({"type": "object", "patternProperties": {"^a": INTEGER}, "additionalProperties": True}, 2),
    ],
)
def test_other_properties(schema: Any, least: int) -> None:
    """Guards ordinary objects with additionalProperties, whose declared properties could never be written, and names behind
    escapes, which the library takes for other names: a declared property got a value of any type."""
    passed = taken(schema, OBJECTS)
    assert ESCAPED not in passed and len(passed) >= least, passed
    for answer in passed:
        jsonschema.validate(json.loads(answer), schema)


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "object", "patternProperties": {"^a": INTEGER}, "additionalProperties": TEXT}, "#/additionalProperties"),
        ({"type": "object", "minProperties": 2}, "#/minProperties"),
        ({"type": "object", "patternProperties": {"^a": INTEGER}, "minProperties": 2}, "#/minProperties"),
        ({"allOf": [{"properties": {"a": INTEGER}}, {"minProperties": 2}]}, "#/allOf/1/minProperties"),
        (
            {
                "allOf": [
                    {"type": "object", "properties": {"a": INTEGER}},
                    {"type": "object", "patternProperties": {"^a": INTEGER}, "additionalProperties": False},
                ]
            },
            "#/allOf/0/properties",
        ),
    ],
)
def test_what_the_library_gets_wrong_is_refused(schema: Any, place: str) -> None:
    """Guards combinations that were taken and not kept: names behind escapes, and one name twice for two properties."""
    with pytest.raises(ConfigError) as caught:
        prepare(schema)
    assert place in str(caught.value) and "cannot" in str(caught.value)


def test_a_count_of_properties_that_is_kept() -> None:
    """Guards against refusing more than the library gets wrong."""
    for schema in (
        {"type": "object", "minProperties": 1},
        {"type": "object", "required": ["a", "c"], "minProperties": 2},
        {"properties": {"a": INTEGER, "c": TEXT}, "required": ["a", "c"], "minProperties": 2, "additionalProperties": False},
    ):
        assert '{"a": 1, "c": "x"}' in taken(schema, OBJECTS) and "{}" not in taken(schema, OBJECTS)


TIMES = {
    "date": (["2024-02-29", "2000-02-29", "0400-02-29", "2023-02-28", "1999-12-31"], ["2023-02-29", "1900-02-29", "2024-04-31"]),
    "time": (["23:59:59Z", "00:00:00.5+01:00"], ["23:59:59", "24:00:00Z", "23:59:60Z", f"00:00:00.{'1' * 10}Z"]),
    "date-time": (
        ["2024-02-29T23:59:59Z", "2024-01-01t00:00:00.123456789z", "2024-01-01T00:00:00-08:00"],
        ["2023-02-29T00:00:00Z", "2024-01-01", f"2024-01-01T00:00:00.{'1' * 3000}Z"],
    ),
    "duration": (["P1Y2M3DT4H5M6S", "P1W", "PT36H", "P1DT1S"], ["P", "PT", "P1DT", "P1Y3D", f"P{'1' * 3000}Y"]),
}


@pytest.mark.parametrize("name", TIMES)
def test_times_end_and_are_of_the_calendar(name: str) -> None:
    """Guards against fractions and durations with digits for ever, and 29 February in a year that has none; beside a pattern,
    another type or an enum too."""
    right, wrong = TIMES[name]
    texts = [*map(json.dumps, right)]
    schema = {"type": "string", "format": name}
    assert taken(schema, [*texts, *map(json.dumps, wrong)]) == texts
    first = {"type": ["string", "null"], "format": name, "pattern": f"^{re.escape(right[0][:2])}"}
    assert taken(first, [*texts, *map(json.dumps, wrong), "null"]) == [t for t in texts if t[1:3] == right[0][:2]] + ["null"]
    assert taken({"enum": [right[0], wrong[0]], "format": name}, [texts[0], json.dumps(wrong[0])]) == [texts[0]]
    assert taken({"type": "integer", "format": name}, ["3"]) == ["3"]


def test_names_of_hosts_and_addresses_end() -> None:
    """Guards against letters up to the bound of any text."""
    assert prepare({"type": "string", "format": "hostname"})["maxLength"] == 253
    assert prepare({"type": "string", "format": "email"})["maxLength"] == 254
    assert prepare({"type": "string", "format": "uri", "minLength": 3000})["maxLength"] == 3000


@pytest.mark.parametrize(
    "pattern",
    [
        '^[^"]+$', r"^[^\\]+$", r'^[^"\\\n]+$', r"^[\x00-\x1f]+$", r"^[]\x00-!]+$", r"^[^\x20-\x7e]$", "^[^,]+$", "^[a-z]+$",
        r"^[\[\]]$", r"^(\x00|[\x01-\x1f])$", r"^(?:[\x00-\x10]|[\x11-\x1f])$", r"^\[a\]$",
    ],
)  # fmt: skip
def test_classes_with_control_characters(pattern: str) -> None:
    """Guards patterns like [^"]+, which took a quotation mark: the library takes a set of all control characters for one that
    holds the quotation mark and the backslash. But for U+0000 nothing is lost."""
    texts = ['"', "\\", 'a"', "a\\b", "a", "\n", "\x01", "\x1f", "]", "[a]", ",", "[", "é", "!"]
    fit = [text for text in texts if re.search(pattern, text)]
    written = {text: json.dumps(text, ensure_ascii=False) for text in texts}
    assert taken({"type": "string", "pattern": pattern}, [*written.values()]) == [written[text] for text in fit]
    names = {"type": "object", "patternProperties": {pattern: INTEGER}, "additionalProperties": False}
    for text in texts[:4]:
        assert bool(taken(names, [json.dumps({text: 1})])) <= (text in fit)


def test_classes_are_found() -> None:
    """Guards the reading of a pattern: classes in classes, a bracket that comes first, and escapes."""
    assert without_nul(r"[a-z]\[x[]^a]") == r"[a-z]\[x[[]^a]&&[^\x00]]"
    assert without_nul("[[:cntrl:]x]{2}") == r"[[[:cntrl:]x]&&[^\x00]]{2}"
    assert without_nul(r"\p{Cc}\PL\d\x00") == r"[\p{Cc}&&[^\x00]][\PL&&[^\x00]]\d[\x00&&[^\x00]]"
    assert without_nul("[^a") == r"[[^a&&[^\x00]]"  # left for the library to refuse
