"""Tool calls: read back what any template writes, streamed as whole, and enforced where a request demands one."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine import small
from tutelage.chat.render import Renderer
from tutelage.chat.templates import styles
from tutelage.chat.tool_calls import STYLES, CallStyle, Delta, ToolCall, ToolCallStream, finish_reason, parse_calls, showing
from tutelage.errors import ConfigError
from tutelage.structured.grammar import GrammarCompiler, json_text
from tutelage.structured.tool_choice import call_style, strict_grammar, tool_grammar
from tutelage.tokenizer.detokenize import TextStream, Vocabulary
from tutelage.tokenizer.train import train

STYLE = {style.name: style for style in STYLES}
WITH_TOOLS = [name for name, style in styles().items() if style.tools]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city"],
            "$defs": {"city": {"type": "string", "maxLength": 9}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": 'clo"ck', "description": "Time"}}
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SPELT = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", '{"name": "a", "parameters": {}}', "\\", '"', "}", "]", "\n", " ", "é"]
TEXTS = st.lists(st.one_of(st.text(max_size=4), st.sampled_from(SPELT)), max_size=5).map("".join)
MADE = [
    "<tool_call>", "</tool_call>", "<tool_", "[TOOL_CALLS]", "[", "]", ", ", "\n", "\n\n", " ", "text", "{", "}",
    '{"name": "a", "arguments": {"x": "}\\""}}', '{"name": "b", "parameters": {}}', '{"name": "c", "arguments": "{\\"y\\": 1}"}',
    '{"name": ', '"unclosed', "\\", '{"name": "n", "arguments": {"x": NaN}}', '{"name": 5, "arguments": {}}', "[" * 101,
]  # fmt: skip


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Renderer]:
    made: dict[str, Renderer] = {}

    def one(name: str) -> Renderer:
        if name not in made:
            folder = tmp_path_factory.mktemp("renderers") / name
            train(small.TEXTS, vocab_size=320, template=name, out=folder)
            made[name] = Renderer(folder)
        return made[name]

    return one


def vocabulary_of(renderer: Renderer) -> Vocabulary:
    return Vocabulary(json.loads(renderer.tokenizer.tokenizer.to_str()), renderer.tokenizer.control_ids)


def generated(renderer: Renderer, content: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """What a model would have to generate for this answer, as the server's text stream shows it."""
    made = [{"id": f"call0000{i}", "type": "function", "function": {"name": n, "arguments": a}} for i, (n, a) in enumerate(calls)]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content, "tool_calls": made}]
    prompt = renderer.prompt(turns[:1], [WEATHER])
    rest = renderer.prompt(turns, [WEATHER], add_generation_prompt=False)[len(prompt) :]
    shown = TextStream(showing(vocabulary_of(renderer), call_style(renderer).visible))
    ids = rest[: max(i for i, token in enumerate(rest) if token == renderer.end_of_turn_id)]
    return "".join(map(shown.add, ids)) + shown.flush()


ARGUMENTS = st.dictionaries(TEXTS, st.recursive(st.none() | st.integers() | TEXTS, st.lists, max_leaves=3), max_size=3)


@pytest.mark.parametrize("name", WITH_TOOLS)
@QUICK
@given(content=st.sampled_from(["", "Let me see.", "Two\n\nlines\n"]), arguments=st.lists(ARGUMENTS, min_size=1, max_size=3))
def test_calls_are_read_as_the_template_writes_them(
    make: Callable[[str], Renderer], name: str, content: str, arguments: list[dict[str, Any]]
) -> None:
    """Guards every template that we ship: what a model was trained to write comes back as the message it was trained on."""
    renderer = make(name)
    style = call_style(renderer)
    calls = [(f"tool-{i}", a) for i, a in enumerate(arguments if style.many else arguments[:1])]
    got, read = parse_calls(generated(renderer, content, calls), style)
    assert [(c.name, json.loads(c.arguments)) for c in read] == calls
    assert got == (content.strip() if name == "llama3" else content)
    if name == "mistral":
        assert [c.id for c in read] == [f"call0000{i}" for i in range(len(calls))]


@pytest.mark.parametrize("style", STYLES, ids=lambda s: s.name)
@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from(MADE), max_size=10), seed=st.integers(0, 99))
def test_streamed_is_whole(style: Any, parts: list[str], seed: int) -> None:
    """Guards clients: cut anywhere, a stream tells the same as the whole text; nothing raises and no content is lost."""
    text, rng = "".join(parts), random.Random(seed)
    whole = parse_calls(text, style)
    stream, deltas = ToolCallStream(style), []
    while text:
        size = rng.choice([1, 1, 2, 5])
        deltas += stream.feed(text[:size])
        text = text[size:]
    deltas += stream.finish()
    assert (stream.content, stream.calls) == whole == ("".join(d.content for d in deltas), assembled(deltas))
    if not whole[1]:
        assert whole[0] == "".join(parts)
    for call in whole[1]:
        assert isinstance(json.loads(call.arguments), dict)


def assembled(deltas: list[Delta]) -> list[ToolCall]:
    """The calls as a client puts them together."""
    calls: dict[int, dict[str, str]] = {}
    for part in (p for d in deltas for p in d.to_json().get("tool_calls", ())):
        known = calls.setdefault(
            part["index"], {"id": part.get("id", ""), "name": part["function"].get("name", ""), "arguments": ""}
        )
        known["arguments"] += part["function"]["arguments"]
    assert list(calls) == list(range(len(calls))) and all(c["id"] for c in calls.values())
    return [ToolCall(**calls[i]) for i in calls]


@pytest.mark.parametrize(
    ("style", "text", "content", "names"),
    [
        ("tagged", 'So: <tool_call> {"name":"a","arguments":{"t":"</tool_call>"}} </tool_call>\n', "So: ", ["a"]),
        ("tagged", '<tool_call>{"name": "a", "arguments": {}}', "", ["a"]),  # small models forget the closing mark
        ("tagged", '<tool_call>{"name": "a", "argum', '<tool_call>{"name": "a", "argum', []),
        (
            "tagged",
            '<tool_call>{a}</tool_call><tool_call>{"name":"b","arguments":{}}</tool_call>',
            "<tool_call>{a}</tool_call>",
            ["b"],
        ),
        ("tagged", '<tool_call>{"name": "a", "arguments": {"x": NaN}}</tool_call>', None, []),
        ("tagged", '<tool_call>{"name": "a", "arguments": {"x": ' + "[" * 200 + "]" * 200 + "}}</tool_call>", None, []),
        ("qwen", '<tool_call>\n{"name": "a", "arguments": "{}"}\n</tool_call>', "", ["a"]),
        ("mistral", '[TOOL_CALLS] [{"name": "a", "arguments": {}}, {"name": 1}]', None, []),
        ("llama3", 'See {"name": "a", "parameters": {}}', None, []),  # in the middle of a line: a quotation
        ("llama3", '{"name": "Bob", "age": 3}', None, []),  # an answer in JSON
        ("llama3", '{"name": "a", "parameters": {}}\nDone.', None, []),
    ],
)
def test_what_is_a_call(style: str, text: str, content: str | None, names: list[str]) -> None:
    """Guards against calls lost to a careless model, and content taken for a call."""
    got, calls = parse_calls(text, STYLE[style])
    assert (got, [c.name for c in calls]) == (text if content is None else content, names)


@pytest.mark.parametrize("style", STYLES, ids=lambda s: s.name)
@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from(MADE), max_size=10))
def test_content_says_where_it_stood(style: Any, parts: list[str]) -> None:
    """Guards log-probabilities of tokens: those of a call are not those of the content around it."""
    stream, deltas = ToolCallStream(style), []
    for part in parts:
        deltas += stream.feed(part)
    deltas += stream.finish()
    text = "".join(parts)
    assert all(text[d.at :].startswith(d.content) for d in deltas if d.index is None)
    assert [d.at for d in deltas if d.index is None] == sorted({d.at for d in deltas if d.index is None})


@pytest.mark.parametrize("style", ["tagged", "qwen", "mistral"])
def test_no_more_calls_than_were_asked_for(make: Callable[[str], Renderer], style: str) -> None:
    """`parallel_tool_calls: false` that was accepted, and two calls all the same."""
    template = {"tagged": "default", "qwen": "qwen", "mistral": "mistral"}[style]
    text = generated(make(template), "Look", [("a", {}), ("b", {"x": 1})])
    assert [c.name for c in parse_calls(text, STYLE[style])[1]] == ["a", "b"]
    content, calls = parse_calls(text, replace(STYLE[style], most=1))
    assert content == "Look" and [c.name for c in calls] == ["a"]


def test_content_is_not_held_back() -> None:
    """Guards the feel of a stream: only what may become a call waits."""
    stream = ToolCallStream(STYLE["qwen"])
    assert [d.content for d in stream.feed("Hello <b>")] == ["Hello <b>"]
    assert stream.feed("\n<tool") == [] and [d.content for d in stream.feed("box")] == ["\n<toolbox"]


def test_finish_reason_does_not_lie() -> None:
    """Guards agents: an answer cut off after a call is not one that waits for results."""
    call = ToolCall("a", "{}")
    assert [finish_reason("stop", [call]), finish_reason("length", [call]), finish_reason("stop", [])] == [
        "tool_calls",
        "length",
        "stop",
    ]
    first, second = parse_calls(
        '[TOOL_CALLS][{"name":"a","arguments":{},"id":"x"},{"name":"a","arguments":{},"id":"x"}]', STYLE["mistral"]
    )[1]
    assert first.id == "x" != second.id and len(second.id) == 9


def template(call: str) -> str:
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}" + call + "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def test_the_style_of_a_foreign_template_is_proven(make: Callable[[str], Renderer]) -> None:
    """Guards other people's models: known by what their template writes, and refused where calls could not be read back."""
    for name in WITH_TOOLS:
        assert call_style(make(name)).name == {"default": "tagged", "chatml": "tagged"}.get(name, name)
    assert not call_style(make("llama3")).many and call_style(make("qwen")).many
    swapped = """'{"arguments": ' + c.function.arguments | tojson + ', "name": "' + c.function.name + '"}'"""
    other = template("{{ '\\n\\n<tool_call>\\n' + " + swapped + " + '</tool_call>' }}")
    assert call_style(Renderer(make("chatml").tokenizer, other)).closing.strip() == "</tool_call>"
    for refused in (make("gemma"), Renderer(make("chatml").tokenizer, template("{{ '<call:' + c.function.name + '>' }}"))):
        with pytest.raises(ConfigError, match="no tool calls that can be read back"):
            call_style(refused)


def test_marks_that_are_control_tokens_are_shown(make: Callable[[str], Renderer]) -> None:
    """Guards Mistral's calls, whose mark a text stream leaves out; other control tokens stay hidden."""
    renderer = make("mistral")
    style, plain = call_style(renderer), vocabulary_of(renderer)
    [mark] = style.visible
    shown = showing(plain, style.visible)
    assert shown.of(mark) == b"[TOOL_CALLS]" and plain.of(mark) == b"" and shown.of(renderer.end_of_turn_id) == b""
    assert not call_style(make("qwen")).visible


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_calls_that_are_required_are_made(make: Callable[[str], Renderer], name: str) -> None:
    """Guards `tool_choice`: whatever the model prefers, it writes calls that fit the tools, in its template's own words."""
    renderer = make(name)
    style, vocabulary = call_style(renderer), vocabulary_of(renderer)
    shown = showing(vocabulary, style.visible)
    compiler = GrammarCompiler(vocabulary, renderer.stop_ids, len(vocabulary), renderer.tokenizer.encode_text)
    seen: set[str] = set()
    for seed in range(6):
        for wanted, most in ((None, 8), ("weather", 1)):
            constraint, rng, out = compiler.compile(tool_grammar(style, [WEATHER, CLOCK], wanted)), random.Random(seed), b""
            while not constraint.finished:
                token = rng.choice(constraint.mask(len(vocabulary)).nonzero()[:, 0].tolist())
                constraint.accept(token)
                out += shown.of(token)
                if token in renderer.stop_ids:
                    break
            content, calls = parse_calls(out.decode(), style)
            assert not content and 1 <= len(calls) <= (most if style.many else 1)
            assert {c.name for c in calls} <= ({wanted} if wanted else {"weather", 'clo"ck'})
            for call in (c for c in calls if c.name == "weather"):
                arguments = json.loads(call.arguments)
                assert len(arguments["city"]) <= 9 and 1 <= arguments.get("days", 1) <= 9 and arguments.keys() <= {"city", "days"}
            seen |= {c.name for c in calls}
    assert len(seen) == 2


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_strict_tools_bind_a_call_that_is_begun(make: Callable[[str], Renderer], name: str) -> None:
    """Guards `strict` where a call may be made or not: text is free, and an answer without a call; what begins as a call is one
    of a tool, with arguments that fit."""
    renderer = make(name)
    style, vocabulary = call_style(renderer), vocabulary_of(renderer)
    shown = showing(vocabulary, style.visible)
    compiler = GrammarCompiler(vocabulary, renderer.stop_ids, len(vocabulary), renderer.tokenizer.encode_text)
    weather = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    grammar = strict_grammar(style, [weather, CLOCK], parallel=False)
    encode = renderer.tokenizer.tokenizer.encode  # marks that are control tokens become them
    free = compiler.compile(grammar)
    for token in encode("It is [1, 2] o'clock. <b>{}</b>", add_special_tokens=False).ids:
        assert free.mask(len(vocabulary))[token]
        free.accept(token)
    assert any(free.mask(len(vocabulary))[end] for end in renderer.stop_ids)
    seen: set[str] = set()
    for seed in range(8):
        begun = ("Look: " if style.opening else "") + style.opening
        constraint, rng, out = compiler.compile(grammar), random.Random(seed), b""
        for token in encode(begun, add_special_tokens=False).ids:
            assert constraint.mask(len(vocabulary))[token]
            constraint.accept(token)
            out += shown.of(token)
        for _ in range(3000):
            allowed = constraint.mask(len(vocabulary)).nonzero()[:, 0].tolist()
            if not out and not style.opening:  # the first token decides whether it is a call
                allowed = [t for t in allowed if shown.of(t).startswith(b"{")]
            over = [t for t in allowed if t in renderer.stop_ids]
            token = over[0] if over else rng.choice(allowed)
            if token in renderer.stop_ids:
                break
            constraint.accept(token)
            out += shown.of(token)
        _, calls = parse_calls(out.decode(), style)
        assert calls, out
        for call in calls:
            arguments = json.loads(call.arguments)
            assert call.name in ("weather", 'clo"ck')
            assert call.name != "weather" or (len(arguments["city"]) <= 9 and arguments.keys() <= {"city", "days"})
        seen |= {c.name for c in calls}
    assert "weather" in seen


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_an_answer_in_json_leaves_room_for_calls(make: Callable[[str], Renderer], name: str) -> None:
    """Guards a format beside tools: an answer is JSON of the schema or calls as the template writes them, and reads back so."""
    renderer = make(name)
    style, vocabulary = call_style(renderer), vocabulary_of(renderer)
    shown = showing(vocabulary, style.visible)
    compiler = GrammarCompiler(vocabulary, renderer.stop_ids, len(vocabulary), renderer.tokenizer.encode_text)
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    schema = {"type": "object", "properties": {"name": {"enum": ["<tool_call>{", "[TOOL_CALLS][{"]}}, "required": ["name"]}
    if style.bare:
        with pytest.raises(ConfigError, match="which nothing tells from an answer in JSON"):
            strict_grammar(style, [WEATHER, CLOCK], answer=json_text(schema))
        return
    for tools, bound in (([WEATHER, CLOCK], False), ([strict, CLOCK], True)):
        grammar = strict_grammar(style, tools, answer=json_text({**schema, "additionalProperties": False}))
        for called, seed in itertools.product((True, False), range(4)):
            constraint, rng, out = compiler.compile(grammar), random.Random(seed), b""
            while not constraint.finished and len(out) < 20_000:
                allowed = constraint.mask(len(vocabulary)).nonzero()[:, 0].tolist()
                if not out:
                    allowed = [t for t in allowed if shown.of(t).startswith(b"{") != called]
                token = next((t for t in allowed if t in renderer.stop_ids), None) or rng.choice(allowed)
                if token in renderer.stop_ids:
                    break
                constraint.accept(token)
                out += shown.of(token)
            content, calls = parse_calls(out.decode(), style)
            assert bool(calls) == called and bool(content) != called
            assert called or json.loads(content)["name"] in schema["properties"]["name"]["enum"]
            for call in calls:
                fits = set(json.loads(call.arguments)) <= {"city", "days"}
                assert call.name in ("weather", 'clo"ck') and (fits or call.name != "weather" or not bound)


@pytest.mark.parametrize("style", STYLES, ids=lambda s: s.name)
def test_forced_calls_are_all_there_is(style: CallStyle) -> None:
    """Guards clients of an answer that was cut off: half a call, which passed for content."""
    forced = replace(style, forced=True)
    text = written_by(style)
    for end in range(len(text) + 1):
        content, calls = parse_calls(text[:end], forced)
        stream = ToolCallStream(forced)
        streamed = [delta for character in text[:end] for delta in stream.feed(character)] + stream.finish()
        assert not content and not any(delta.content for delta in streamed)
        assert calls == stream.calls == parse_calls(text[:end], style)[1]
    assert calls


def written_by(style: CallStyle) -> str:
    call = f'{{"name": "f", "{style.key}": {{"a": "}}"}}}}'
    return f"{style.opening}[{call}]" if style.listed else style.opening + call + style.closing


def test_tools_that_cannot_be_enforced_are_refused() -> None:
    """Guards against a tool whose schema is only half kept: tool and keyword are named."""
    bad: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}
    with pytest.raises(ConfigError, match=r"tools\[1\].function.parameters #/properties/a/not"):
        tool_grammar(STYLE["qwen"], [WEATHER, bad])
    bad["function"]["parameters"] = {"const": float("inf")}
    with pytest.raises(ConfigError, match="not JSON"):
        tool_grammar(STYLE["qwen"], [bad])
    with pytest.raises(ConfigError, match="no such tool"):
        tool_grammar(STYLE["qwen"], [WEATHER], "wether")
