"""Structured output: whatever the model prefers, the answer fits the grammar, and it ends."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.engine import small
from tutelage.chat.render import Renderer
from tutelage.errors import ConfigError, MissingExtra
from tutelage.models.interface import Batch
from tutelage.structured.grammar import Constraint, Grammar, GrammarCompiler, GrammarsBusy
from tutelage.structured.json_schema import Bounds, prepare
from tutelage.structured.patterns import places
from tutelage.tokenizer.detokenize import Vocabulary

PERSON = {
    "$defs": {"animal": {"type": "object", "properties": {"kind": {"enum": ["cat", "dog", None, 3]}}, "required": ["kind"]}},
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12, "description": "of the person"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "height": {"type": "number", "exclusiveMinimum": 0},
        "pets": {"type": "array", "items": {"$ref": "#/$defs/animal"}, "minItems": 1, "maxItems": 3},
        "note": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-z]{2,4}$"}]},
    },
    "required": ["name", "age", "pets"],
}
Choose = Callable[[list[int]], int]


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return small.renderer(tmp_path_factory.mktemp("tokenizer") / "t")


@pytest.fixture(scope="module")
def vocabulary(renderer: Renderer) -> Vocabulary:
    return Vocabulary(json.loads(renderer.tokenizer.tokenizer.to_str()), renderer.tokenizer.control_ids)


@pytest.fixture(scope="module")
def compiler(renderer: Renderer, vocabulary: Vocabulary) -> GrammarCompiler:
    return GrammarCompiler(vocabulary, renderer.stop_ids, len(vocabulary) + 10, renderer.tokenizer.encode_text)


def answer(constraint: Constraint, vocabulary: Vocabulary, choose: Choose, steps: int = 3000) -> str:
    """The text of a walk through the grammar; the answer must end by itself."""
    out = b""
    for _ in range(steps):
        if constraint.finished:
            return out.decode()
        token = choose(constraint.mask(len(vocabulary)).nonzero()[:, 0].tolist())
        constraint.accept(token)
        if not vocabulary.of(token):
            return out.decode()
        out += vocabulary.of(token)
    raise AssertionError(f"no end after {out[-200:]!r}")


def at_random(vocabulary: Vocabulary, seed: int) -> Choose:
    """Any allowed token, with a liking for those that end something."""
    rng = random.Random(seed)

    def choose(allowed: list[int]) -> int:
        ends = [i for i in allowed if not vocabulary.of(i) or vocabulary.of(i)[:1] in b'"}],']
        return rng.choice(ends if ends and rng.random() < 0.2 else allowed)

    return choose


@pytest.mark.parametrize("seed", range(8))
def test_a_random_walk_fits_the_schema(compiler: GrammarCompiler, vocabulary: Vocabulary, seed: int) -> None:
    """A mask that lets one wrong token through, or a keyword that is ignored, makes an answer that does not fit."""
    got = json.loads(answer(compiler.compile(Grammar.of_schema(PERSON)), vocabulary, at_random(vocabulary, seed)))
    assert {"name", "age", "pets"} <= got.keys() <= PERSON["properties"].keys()  # type: ignore[attr-defined]
    assert 1 <= len(got["name"]) <= 12 and type(got["age"]) is int and 0 <= got["age"] <= 150
    assert got.get("height", 1) > 0 and 1 <= len(got["pets"]) <= 3
    assert all(pet.keys() == {"kind"} and pet["kind"] in ("cat", "dog", None, 3) for pet in got["pets"])
    assert got.get("note") is None or re.fullmatch("[a-z]{2,4}", got["note"])


@pytest.mark.parametrize("seed", range(4))
def test_other_grammars(compiler: GrammarCompiler, vocabulary: Vocabulary, seed: int) -> None:
    """Guards choices with characters that mean something to the grammar, patterns that must match whole, and lark."""
    choices = ["yes", "no", 'né"\\\n', "/x/ | y", "日本語"]
    walks = {
        Grammar.of_choices(choices): lambda text: text in choices,
        Grammar("regex", "[a-c]{2,5}(x|é)?"): lambda text: re.fullmatch("[a-c]{2,5}(x|é)?", text),
        Grammar("json_object"): lambda text: isinstance(json.loads(text), dict),
        Grammar("lark", 'start: "sum" part{1,3}\npart: " " /[0-9]{2}/'): lambda text: re.fullmatch("sum( [0-9]{2}){1,3}", text),
    }
    for grammar, fits in walks.items():
        text = answer(compiler.compile(grammar), vocabulary, at_random(vocabulary, seed))
        assert fits(text), (grammar, text)


@pytest.mark.parametrize("liked", ["0123456789.", " \n", "abc xyz", "[{", ",1"])
@pytest.mark.parametrize("schema", [{}, PERSON, {"type": "object"}, {"type": ["number", "array"]}, {"type": "integer"}])
def test_a_model_that_repeats_itself_comes_to_an_end(renderer: Renderer, vocabulary: Vocabulary, schema: Any, liked: str) -> None:
    """Guards against endless digits, spaces, letters, lists and levels: the token that goes on is always the one chosen."""
    bounds = Bounds(string=40, items=3, levels=2)
    compiler = GrammarCompiler(vocabulary, renderer.stop_ids, len(vocabulary), renderer.tokenizer.encode_text, bounds=bounds)

    def stubborn(allowed: list[int]) -> int:
        texts = {i: vocabulary.of(i).decode("utf-8", "replace") for i in allowed}
        return next(
            (i for i, text in texts.items() if text and set(text) <= set(liked)), max(texts, key=lambda i: bool(texts[i]))
        )

    json.loads(answer(compiler.compile(Grammar.of_schema(schema)), vocabulary, stubborn))


def test_a_model_is_held_to_the_schema(renderer: Renderer, compiler: GrammarCompiler, vocabulary: Vocabulary) -> None:
    """Guards `apply`: forbidden logits, padding of the vocabulary included, are -inf and the others stay as they were."""
    model = small.model(len(vocabulary) + 10)
    schema = {"properties": {"word": {"enum": ["the cat", "dog"]}, "ok": {"type": "boolean"}}, "required": ["word", "ok"]}
    constraint = compiler.compile(Grammar.of_schema(schema))
    ids = renderer.prompt([{"role": "user", "content": "who?"}])
    start = len(ids)
    while not constraint.finished:
        with torch.no_grad():
            row = model.logits(Batch.of([ids]))[0, -1]
        before, allowed = row.clone(), constraint.mask(len(row))
        constraint.apply(row)
        assert torch.equal(row, torch.where(allowed, before, -torch.inf)) and not allowed[len(vocabulary) :].any()
        ids.append(int(row.argmax()))
        constraint.accept(ids[-1])
        assert len(ids) < start + 100
    got = json.loads(b"".join(map(vocabulary.of, ids[start:])))
    assert got["word"] in ("the cat", "dog") and got["ok"] in (True, False) and len(got) == 2


def test_end_tokens_are_allowed_at_the_end_only(renderer: Renderer, compiler: GrammarCompiler, vocabulary: Vocabulary) -> None:
    """Guards answers cut short, and models without an end token, whose answers end when the grammar does."""
    constraint = compiler.compile(Grammar("regex", "aa?"))
    ends, a = set(renderer.stop_ids), vocabulary.bytes.index(b"a")
    assert not ends & set(constraint.mask(400).nonzero()[:, 0].tolist())
    constraint.accept(a)
    assert set(constraint.mask(400).nonzero()[:, 0].tolist()) == {a, *ends} and not constraint.finished
    constraint.accept(a)
    assert constraint.finished and set(constraint.mask(400).nonzero()[:, 0].tolist()) == ends
    with pytest.raises(ConfigError):
        constraint.accept(a)
    endless = GrammarCompiler(vocabulary, (), len(vocabulary), renderer.tokenizer.encode_text).compile(Grammar("regex", "a"))
    endless.accept(a)
    assert endless.finished


def test_answers_do_not_share_their_place(compiler: GrammarCompiler, vocabulary: Vocabulary) -> None:
    """Guards the cache: a constraint handed out twice would have the second answer go on where the first is."""
    first, second = (compiler.compile(Grammar("regex", "ab")) for _ in range(2))
    first.accept(vocabulary.bytes.index(b"a"))
    assert second.mask(400).nonzero().item() == vocabulary.bytes.index(b"a")


def test_compiled_grammars_are_kept(renderer: Renderer, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against compiling at every request, and against keeping every grammar that was ever asked for."""
    compiler = GrammarCompiler(vocabulary, renderer.stop_ids, len(vocabulary), renderer.tokenizer.encode_text, kept=2)
    built, build = [], compiler._build
    monkeypatch.setattr(compiler, "_build", lambda grammar, text: built.append(grammar.source) or build(grammar, text))
    for source in "abacab":
        compiler.compile(Grammar("regex", source))
    assert "".join(built) == "abcb"


def test_a_tokenizer_that_adds_a_space(renderer: Renderer, vocabulary: Vocabulary) -> None:
    """Guards SentencePiece-like tokenizers: forced text would be spelt with a space that the grammar does not allow."""
    compiler = GrammarCompiler(vocabulary, renderer.stop_ids, 400, lambda text: renderer.tokenizer.encode_text(" " + text))
    grammar = Grammar.of_choices(["the cat sat", "the café"])
    assert answer(compiler.compile(grammar), vocabulary, max) in ("the cat sat", "the café")


def refused(compiler: GrammarCompiler, grammar: Grammar) -> str:
    with pytest.raises(ConfigError) as caught:
        compiler.compile(grammar)
    return str(caught.value)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"if": {}, "then": {}}, "if cannot be enforced"),
        ({"properties": {"a/b": {"items": {"not": {"type": "null"}}}}}, "#/properties/a~1b/items/not"),
        ({"uniqueItems": True}, "uniqueItems"),
        ({"requird": ["a"]}, "requird"),
        ({"x-guidance": {"lenient": True}}, "x-guidance"),
        ({"type": "strin"}, "#/type"),
        ({"type": "string", "format": "zip-code"}, "zip-code"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"type": "string", "pattern": "(((a{100}){100}){100}){100}"}, "repeats"),
        ({"required": "a"}, "#/required"),
        ({"properties": {"a": 5}}, "#/properties/a"),
        ({"$ref": "https://example.com/a.json"}, "#/$ref"),
        ({"$ref": "#/$defs/b", "$defs": {"a": {}}}, "points to no schema"),
        ({"$ref": "#"}, "no finite value"),
        ({"required": ["a"], "properties": {"a": {"$ref": "#"}}}, "no finite value"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
        ({"enum": [str(i) for i in range(5000)]}, "enums"),
        ({"properties": {str(i): {} for i in range(5000)}}, "too large"),
        (False, "false"),
        ("string", "not a schema"),
    ],
)
def test_what_cannot_be_enforced_is_refused(compiler: GrammarCompiler, schema: Any, words: str) -> None:
    """Guards against a schema that is accepted and not kept: the keyword or its place is named."""
    assert words in refused(compiler, Grammar.of_schema(schema))


def test_deep_schemas_are_refused(compiler: GrammarCompiler) -> None:
    """Guards against schemas that crash a parser: ours, Python's and the library's."""
    schema: dict[str, Any] = {}
    for _ in range(200):
        schema = {"items": schema}
    assert "levels" in refused(compiler, Grammar.of_schema(schema))
    assert "not valid JSON" in refused(compiler, Grammar("json_schema", "[" * 60_000))


def test_bad_grammars_are_refused(compiler: GrammarCompiler) -> None:
    """Guards against a bad grammar taken for one that allows everything, or nothing."""
    for grammar, words in (
        (Grammar("choice", "[]"), "a list of texts"),
        (Grammar("choice", '["\\ud800"]'), "a list of texts"),
        (Grammar("regex", "(a"), "regex"),
        (Grammar("regex", "((a{100}){100}){100}"), "repeats"),
        (Grammar("lark", "start: nothing"), "nothing"),
        (Grammar("regex", "[a&&b]"), "no text fits"),
    ):
        assert words in refused(compiler, grammar)
    for kind, source in (("yaml", ""), ("regex", "a" * 100_000), ("regex", "\ud800")):
        with pytest.raises(ConfigError):
            Grammar(kind, source)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not JSON"):
        Grammar.of_schema({"const": float("nan")})


def test_slow_grammars_are_left_behind(renderer: Renderer, vocabulary: Vocabulary, compiler: GrammarCompiler) -> None:
    """Guards the server: a request whose grammar takes too long fails alone."""
    hurried = GrammarCompiler(vocabulary, renderer.stop_ids, 400, renderer.tokenizer.encode_text, seconds=1e-7)
    assert "seconds of compiling" in refused(hurried, Grammar.of_schema({"enum": [f"{i} of many" for i in range(2000)]}))
    compiler.compile(Grammar("regex", "afterwards"))


def test_one_of_is_kept_where_options_exclude_each_other() -> None:
    """Guards tagged unions, which Pydantic writes as oneOf of references: the grammar library alone refuses them."""
    kinds = {k: {"type": "object", "properties": {"kind": {"const": k}}, "required": ["kind"]} for k in ("a", "b")}
    schema = {"$defs": kinds, "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}, {"type": "null"}]}
    assert "anyOf" in prepare(schema)
    kinds["b"]["required"] = []
    with pytest.raises(ConfigError, match="option 0 and option 1"):
        prepare(schema)


def test_bounds_take_a_part_of_the_schema() -> None:
    """Guards against a bound that contradicts what the schema says itself, or that closes what a combination needs open."""
    assert prepare({"type": "string", "minLength": 9000})["maxLength"] == 9000
    assert prepare({"type": "integer", "minimum": -(2**63), "maximum": 7}) == {
        "type": "integer",
        "minimum": -(10**15),
        "maximum": 7,
    }
    assert prepare({"type": "number", "maximum": 1e-12}).get("multipleOf") is None
    both = prepare(
        {"allOf": [{"properties": {"a": {"type": "null"}}}, {"properties": {"b": {"type": "null"}}, "required": ["b"]}]}
    )
    assert all("additionalProperties" not in one for one in both["allOf"])
    assert prepare({"properties": {"a": {}}, "required": ["b"]})["additionalProperties"] is not False
    assert prepare({"enum": ["a"], "title": "x", "x-order": 1}) == {"enum": ["a"]}


def test_combined_schemas(compiler: GrammarCompiler, vocabulary: Vocabulary) -> None:
    """Guards intersections, which keep properties that only one part declares, and required ones that no part declares."""
    schema = {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {
                "type": "object",
                "properties": {"b": {"type": "boolean"}},
                "required": ["b"],
                "additionalProperties": {"type": "integer"},
            },
        ]
    }
    got = json.loads(answer(compiler.compile(Grammar.of_schema(schema)), vocabulary, at_random(vocabulary, 1)))
    assert type(got["a"]) is int and type(got["b"]) is bool
    undeclared = {"properties": {"a": {"const": 1}}, "required": ["b"], "additionalProperties": {"type": "boolean"}}
    got = json.loads(answer(compiler.compile(Grammar.of_schema(undeclared)), vocabulary, at_random(vocabulary, 1)))
    assert type(got["b"]) is bool


def test_places_of_a_pattern() -> None:
    """Guards the size limit of patterns: nested repeats multiply, and what stands in a class or is escaped repeats nothing."""
    assert places("(ab{3}){10}") == 40 and places("((a{10}){10}){10,20}") == 2000
    assert places(r"[{9}(]{2}\{9\}") == 2 + 3 and places("a{,5}|b+") == 6


def test_missing_library(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards an installation without the extra: it is told what to install."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match=r"tutelage\[serve\]"):
        GrammarCompiler(vocabulary, (), 10, lambda text: [])


def test_a_process_that_died_is_replaced(renderer: Renderer, vocabulary: Vocabulary) -> None:
    """Guards the next grammar after one that was too large, or after the system took the process's memory: it is not to blame."""
    compiler = GrammarCompiler(vocabulary, renderer.stop_ids, len(vocabulary), renderer.tokenizer.encode_text, seconds=1.0)
    compiler.compile(Grammar("regex", "a"))
    (process,) = compiler._trials._idle
    process._popen.kill()
    process._popen.wait()
    compiler.compile(Grammar("regex", "b"))
    slow = {"allOf": [{"type": "integer", "multipleOf": 99991}, {"multipleOf": 99989}, {"multipleOf": 1.5}]}
    assert "seconds of compiling" in refused(compiler, Grammar.of_schema(slow))
    compiler.compile(Grammar("regex", "c"))
    assert len(compiler._trials._idle) == 1 and compiler._trials._idle[0] is not process


def test_a_grammar_waits_for_its_turn(renderer: Renderer, vocabulary: Vocabulary) -> None:
    """Guards the others against one that is being tried for long: they may come again, their grammar is not wrong."""
    compiler = GrammarCompiler(vocabulary, renderer.stop_ids, len(vocabulary), renderer.tokenizer.encode_text, seconds=0.1)
    taken = [compiler._trials._free.acquire() for _ in range(2)]
    with pytest.raises(GrammarsBusy):
        compiler.compile(Grammar("regex", "a"))
    for _ in taken:
        compiler._trials._free.release()
