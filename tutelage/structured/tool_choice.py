"""Which tool calls a model can write: the style of its template, found out by proof, and grammars that enforce a call."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tutelage.chat.render import Renderer
from tutelage.chat.tool_calls import STYLES, CallStyle, ToolCall, parse_calls
from tutelage.errors import ConfigError, UserError
from tutelage.structured.grammar import MAX_SOURCE, Grammar, json_text

MAX_CALLS = 8  # of one answer, where a grammar enforces calls: a grammar that may repeat must end

_ASKED = "tutelage asks"
_TOOL = {"type": "function", "function": {"name": "tutelage_probe", "description": "", "parameters": {"type": "object"}}}
_CALL = ToolCall("tutelage_probe", '{"a": 1, "b": "<\\"}]"}', "probe0001")


def call_style(renderer: Renderer) -> CallStyle:
    """How this model's chat template writes calls: the style that reads back what the template wrote, whatever its name.

    Raises `ConfigError` for a template without tools, or whose calls none of our styles reads: tools must then be refused.
    """
    try:
        written = [_written(renderer, content, calls=1) for content in ("", "Look")]
    except UserError as error:
        raise _no_tools(renderer, str(error.message)) from error
    exact = [s for s in STYLES if all(parse_calls(t, s) == (c, [_CALL]) for t, c in zip(written, ("", "Look"), strict=True))]
    readable = [s for s in STYLES if all(parse_calls(t, s)[1] == [_CALL] for t in written)]
    if not readable:
        raise _no_tools(renderer, written[0])
    style = (exact or readable)[0]
    marks = style.opening + style.closing
    control = tuple((t, renderer.tokenizer.tokenizer.get_vocab()[t]) for t in renderer.tokenizer.control_tokens if t in marks)
    return replace(style, control=control, many=style.many and _writes_two(renderer, style))


def _no_tools(renderer: Renderer, found: str) -> ConfigError:
    return ConfigError(
        "this model's chat template writes no tool calls that can be read back", field="tools", found=found,
        expected=f"calls as one of our styles writes them: {', '.join(s.name for s in STYLES)}",
        fix="send the request without tools, or take a model trained with such a template",
    )  # fmt: skip


def _written(renderer: Renderer, content: str, calls: int) -> str:
    """What the template makes of an answer with calls: the text that the model would have generated, without its end."""
    asked = {"role": "user", "content": _ASKED}
    answer = {
        "role": "assistant",
        "content": content,
        "tool_calls": [replace(_CALL, id=f"probe000{i}").to_json() for i in range(calls)],
    }
    prompt, text = renderer.text([asked], [_TOOL]), renderer.text([asked, answer], [_TOOL], add_generation_prompt=False)
    # A template may ask for an answer in other words than it writes one: then the answer is somewhere behind the question.
    answered = text[len(prompt) :] if text.startswith(prompt) else text[text.rindex(_ASKED) + len(_ASKED) :]
    end = str(renderer.tokenizer.tokenizer.id_to_token(renderer.end_of_turn_id))
    return answered[: answered.rindex(end)] if end in answered else answered


def _writes_two(renderer: Renderer, style: CallStyle) -> bool:
    try:
        return parse_calls(_written(renderer, "", calls=2), style)[1] == [_CALL, _CALL]
    except UserError:
        return False


def tool_grammar(
    style: CallStyle, tools: Sequence[Mapping[str, Any]], name: str | None = None, *, parallel: bool = True
) -> Grammar:
    """The grammar of an answer that is one or more calls: of any of these tools (`tool_choice` "required"), or one of `name`.

    tools: in OpenAI's shape, their parameters enforced. parallel: several calls may be made, where the template can write them
    and no name is given. Raises `ConfigError` naming the tool and the keyword of its schema that cannot be enforced.
    """
    functions = [tool.get("function", tool) for tool in tools]
    wanted = [i for i, function in enumerate(functions) if name in (None, function["name"])]
    if not wanted:
        known = ", ".join(function["name"] for function in functions)
        raise ConfigError("no such tool", field="tool_choice", found=name, expected=known or "a list of tools")
    most = MAX_CALLS if parallel and style.many and name is None else 1
    calls, rules = _calls(style, most), _rules(style, functions, wanted)
    return Grammar("lark", "\n".join([f"start: {_opening(style)} {calls}", *rules]))


def strict_grammar(
    style: CallStyle, tools: Sequence[Mapping[str, Any]], *, parallel: bool = True, answer: str | None = None
) -> Grammar:
    """The grammar of an answer that may have calls in it: free text, and wherever a call begins, one of these tools with
    arguments that its schema allows (those of tools without `strict` are any object).

    answer: a schema as `json_text` writes it, of what an answer without calls is, in place of free text; one with calls is
    nothing but calls then. Raises what `tool_grammar` raises, and `ConfigError` for such a schema where calls have no marks.
    """
    functions = [tool.get("function", tool) for tool in tools]
    functions = [f if f.get("strict") else {**f, "parameters": {}} for f in functions]
    most = MAX_CALLS if parallel and style.many else 1
    calls, rules = _calls(style, most), _rules(style, functions, list(range(len(functions))))
    if answer is not None:
        if style.bare:
            raise _no_telling(style)
        return Grammar("lark", "\n".join([f"start: {_opening(style)} {calls} | answer", f"answer: %json {answer}", *rules]))
    if not style.opening:  # an answer is a call or begins otherwise
        return Grammar("lark", "\n".join([f"start: {calls} | OTHER", "OTHER: /([^{ \\n\\t](.|\\n)*)?/", *rules]))
    mark = style.opening.rstrip()
    begin = f"begin{'' if mark in dict(style.control) else '[lazy]'}: TEXT {_literal(mark, style)}"
    rest = _literal(_opening_text(style)[len(mark) :], style)
    start = f"start: (begin {rest} {calls}){{0,{most}}} TEXT"
    return Grammar("lark", "\n".join([start, begin, "TEXT: /(.|\\n)*/", *rules]))


def _no_telling(style: CallStyle) -> ConfigError:
    return ConfigError(
        "this model's template writes calls as plain JSON, which nothing tells from an answer in JSON",
        field="tools", found=style.name, expected="either tools or an answer in JSON",
        fix='set tool_choice to "none", or leave the format of the answer open',
    )  # fmt: skip


def _opening_text(style: CallStyle) -> str:
    return style.opening + "[" * style.listed


def _opening(style: CallStyle) -> str:
    return _literal(_opening_text(style), style)


def _calls(style: CallStyle, most: int) -> str:
    """One call and more, and what closes them."""
    between = _literal(", " if style.listed else style.closing + style.between + style.opening, style)
    more = f" ({between} call){{0,{most - 1}}}" if most > 1 else ""
    return f"call{more} {_literal(']' * style.listed + style.closing, style)}"


def _rules(style: CallStyle, functions: Sequence[Mapping[str, Any]], wanted: list[int]) -> list[str]:
    rules: list[str] = []
    for i in wanted:
        rules.append(_rule(functions[i], style, i))
        if sum(map(len, rules)) > MAX_SOURCE:
            expected = f"up to {MAX_SOURCE:,} characters with their bounds"
            raise ConfigError("the tools' parameters are too long", field="tools", expected=expected)
    return ["call: " + " | ".join(f"call_{i}" for i in wanted), *rules]


def _rule(function: Mapping[str, Any], style: CallStyle, number: int) -> str:
    """The rule of calls of one tool, character for character as the template writes them; white space is free in arguments."""
    try:
        arguments = json_text({"type": "object", **(function.get("parameters") or {})})
    except ConfigError as error:
        field = f"tools[{number}].function.parameters {error.field}"
        raise error.but(field=field) from error
    name = json.dumps(function["name"], ensure_ascii=False)
    head = json.dumps(f'{{"name": {name}, "{style.key}": ', ensure_ascii=False)
    tail = '", \\"id\\": \\"" /[a-zA-Z0-9]{9}/ "\\"}"' if style.listed else '"}"'
    return f"call_{number}: {head} arguments_{number} {tail}\narguments_{number}: %json {arguments}"


def _literal(text: str, style: CallStyle) -> str:
    """A text in a lark grammar, control tokens by id."""
    ids = dict(style.control)
    parts = re.split("|".join(f"({re.escape(name)})" for name in ids), text) if ids else [text]
    return " ".join(f"<[{ids[p]}]>" if p in ids else json.dumps(p) for p in parts if p)
