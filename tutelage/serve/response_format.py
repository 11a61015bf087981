"""What a request asks of the shape of its answer: a format, a schema, tools and whether they must be called."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from tutelage.chat.tool_calls import CallStyle
from tutelage.engine import Sampling
from tutelage.errors import ConfigError
from tutelage.serve.registry import Served
from tutelage.serve.schema import ApiError, ChatRequest, CompletionRequest, refuse_unknown, unavailable
from tutelage.structured.grammar import Grammar, GrammarsBusy, written
from tutelage.structured.tool_choice import strict_grammar, tool_grammar

STRUCTURED = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "lark", "json_object": "json_object"}
"""Keys of `structured_outputs`, as vLLM has them, and our kinds of grammar."""
MAX_TOOLS = 128  # of one request, as OpenAI has it
_GRAMMARS = ThreadPoolExecutor(4, "grammars")  # of their own: where slow ones wait, nobody's prompt waits to be tokenized
T = TypeVar("T")


@dataclass(slots=True, frozen=True)
class ResponseFormat:
    """`tools` are shown to the model; `style` is how it writes calls, None where it may make none."""

    tools: tuple[dict[str, Any], ...] = ()
    style: CallStyle | None = None
    grammar: Grammar | None = None
    shown_ids: frozenset[int] = frozenset()  # control tokens that are part of the text

    def sampling(self, plain: Sampling) -> Sampling:
        """Raises `ApiError` for what a grammar leaves no room for."""
        shown = self.shown_ids | frozenset(self.style.visible if self.style else ())
        try:
            return replace(plain, grammar=self.grammar, shown_ids=tuple(sorted(shown)))
        except ConfigError as error:
            raise ApiError(400, f"{error.field}: {error.message}", param=error.field) from error


async def shape_of(asked: ChatRequest | CompletionRequest, served: Served) -> ResponseFormat:
    """Raises `ApiError` naming the parameter that cannot be honoured. A grammar is compiled when this returns."""
    tools: tuple[dict[str, Any], ...] = ()
    style: CallStyle | None = None
    formats: dict[str, Grammar] = {}
    if (structured := _structured(asked.structured_outputs)) is not None:
        formats["structured_outputs"] = structured
    if isinstance(asked, ChatRequest):
        if (wanted := _response_format(asked.response_format)) is not None:
            formats["response_format"] = wanted
        tools, mode, name = _tools(asked)
        if tools:
            parallel, forced = asked.parallel_tool_calls is not False, mode == "required"
            style = replace(_named("tools", served.call_style), most=None if parallel else 1, forced=forced)
            if forced:
                _refuse_stops(asked)
                formats["tool_choice"] = await _apart("tools", partial(tool_grammar, style, tools, name, parallel=parallel))
            elif len(formats) < 2:
                formats = await _with_calls(formats, style, tools, parallel)
            tools = tuple({**t, "function": {k: v for k, v in t["function"].items() if k != "strict"}} for t in tools)
    shown = frozenset() if asked.skip_special_tokens else served.renderer.tokenizer.control_ids
    if len(formats) > 1:
        raise ApiError(400, f"{' and '.join(formats)} exclude each other", param=next(iter(formats)))
    for param, grammar in formats.items():
        await _apart(param, partial(served.engine.constrain, grammar))
        return ResponseFormat(tools, style, grammar, shown)
    return ResponseFormat(tools, style, shown_ids=shown)


async def _with_calls(
    formats: dict[str, Grammar], style: CallStyle, tools: tuple[dict[str, Any], ...], parallel: bool
) -> dict[str, Grammar]:
    """A format of JSON leaves room for calls, which `strict` tools bind. Any other grammar says itself whether calls fit it."""
    param, wanted = next(iter(formats.items()), ("tools", None))
    answer = None
    if wanted is not None and wanted.kind in ("json_schema", "json_object"):
        _, answer = await _apart(param, partial(written, wanted))
    if answer is None and not any(tool["function"].get("strict") for tool in tools):
        return formats
    grammar = await _apart("tools", partial(strict_grammar, style, tools, parallel=parallel, answer=answer))
    return {param: grammar} if answer is not None else {**formats, "tools": grammar}


def _refuse_stops(asked: ChatRequest) -> None:
    """Raises `ApiError` for what would end an answer in the middle of a call that it has to make."""
    for param, given in (("stop", asked.stop), ("stop_token_ids", asked.stop_token_ids)):
        if given:
            raise ApiError(400, f"{param} would cut off the call that tool_choice asks for", param=param)


async def _apart(param: str, function: Callable[[], T]) -> T:
    """`_named`, in a thread."""
    return await asyncio.get_running_loop().run_in_executor(_GRAMMARS, partial(_named, param, function))


def _named(param: str, function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function whose `ConfigError` is the fault of `param`."""
    try:
        return function(*arguments)
    except GrammarsBusy as error:
        raise unavailable(str(error.message), "grammars_busy") from error
    except ConfigError as error:
        detail = f" at {error.field}" if error.field and error.field != param else ""
        found = f": {error.found}" if error.found is not None else ""
        fix = f"; {error.fix}" if error.fix else ""
        raise ApiError(400, f"{param}{detail}: {error.message}{found}{fix}"[:2000], param=param) from error


def _response_format(given: dict[str, Any] | None) -> Grammar | None:
    kind = (given or {}).get("type", "text")
    if given is not None:
        refuse_unknown(given, ("type", "json_schema") if kind == "json_schema" else ("type",), "response_format")
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json_object")
    outer = given.get("json_schema")
    if kind != "json_schema" or not isinstance(outer, dict) or not isinstance(outer.get("schema"), dict | bool):
        raise ApiError(
            400, "response_format is text, json_object, or json_schema with json_schema.schema", param="response_format"
        )
    if not isinstance(outer.get("name"), str) or not re.fullmatch(r"[\w-]{1,64}", outer["name"]):
        message = "response_format.json_schema.name is 1 to 64 letters, digits, _ and -"
        raise ApiError(400, message, param="response_format.json_schema.name")
    refuse_unknown(outer, ("name", "schema", "strict", "description"), "response_format.json_schema")
    return _named("response_format", Grammar.of_schema, outer["schema"])


def _structured(given: dict[str, Any] | None) -> Grammar | None:
    if given is None:
        return None
    asked = {key: value for key, value in given.items() if value is not None}
    if len(asked) != 1 or next(iter(asked)) not in STRUCTURED:
        raise ApiError(400, f"structured_outputs has one of {', '.join(STRUCTURED)}", param="structured_outputs")
    ((key, value),) = asked.items()
    if key == "json" and not isinstance(value, str):
        return _named("structured_outputs", Grammar.of_schema, value)
    if key == "choice" and isinstance(value, list):
        return _named("structured_outputs", Grammar.of_choices, value)
    source = "" if key == "json_object" else value
    return _named("structured_outputs", Grammar, STRUCTURED[key], source)


def _tools(asked: ChatRequest) -> tuple[tuple[dict[str, Any], ...], str, str | None]:
    """The tools to show, whether a call is required, and of which tool."""
    if len(asked.tools or ()) > MAX_TOOLS:
        raise ApiError(400, f"at most {MAX_TOOLS} tools", param="tools")
    tools = tuple(_checked(tool, i) for i, tool in enumerate(asked.tools or ()))
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "two tools have one name", param="tools")
    choice = asked.tool_choice
    if choice in (None, "auto", "none"):
        return (() if choice == "none" else tools), "auto", None
    if not tools:
        raise ApiError(400, "tool_choice is only allowed when tools are given", param="tool_choice")
    if choice == "required":
        return tools, "required", None
    if isinstance(choice, dict):
        refuse_unknown(choice, ("type", choice.get("type") or "function"), "tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return _allowed(choice.get("allowed_tools"), tools)
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(function, dict) or function.get("name") not in names:
        raise ApiError(400, "tool_choice is none, auto, required, or names one of the tools", param="tool_choice")
    refuse_unknown(function, ("name",), "tool_choice.function")
    return tools, "required", function["name"]


def _allowed(given: Any, tools: tuple[dict[str, Any], ...]) -> tuple[tuple[dict[str, Any], ...], str, str | None]:
    given = given if isinstance(given, dict) else {}
    refuse_unknown(given, ("mode", "tools"), "tool_choice.allowed_tools")
    wanted = [(t.get("function") or {}).get("name") for t in given.get("tools") or () if isinstance(t, dict)]
    chosen = tuple(tool for tool in tools if tool["function"]["name"] in wanted)
    if given.get("mode", "auto") not in ("auto", "required") or not wanted or len(chosen) != len(set(wanted)):
        raise ApiError(400, "allowed_tools has a mode (auto or required) and names given tools", param="tool_choice")
    return chosen, given.get("mode", "auto"), None


def _checked(tool: Any, number: int) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ApiError(400, f"tools[{number}] is a function with a name", param="tools")
    if not isinstance(function.get("strict"), bool | None):
        raise ApiError(400, f"tools[{number}].function.strict is true or false", param="tools")
    if not isinstance(function.get("parameters", {}), dict | None):
        raise ApiError(400, f"tools[{number}].function.parameters is a JSON schema", param="tools")
    refuse_unknown(tool, ("type", "function"), f"tools[{number}]")
    refuse_unknown(function, ("name", "description", "parameters", "strict"), f"tools[{number}].function")
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}
