"""Tools: what a model may call, and the loop that lets it call them until it answers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tutelage.chat.tool_calls import ToolCall
from tutelage.engine.calculator import calculate
from tutelage.errors import SandboxError, UserError


@dataclass(slots=True, frozen=True)
class Tool:
    """A function that a model may call. `function` takes the arguments by name and returns text for the model.

    Example:
        Tool("weather", "Weather of a city", {"type": "object", "properties": {"city": {"type": "string"}}}, weather)
    """

    name: str
    description: str
    parameters: Mapping[str, Any]  # JSON schema of the arguments: an object
    function: Callable[..., str]

    def to_json(self) -> dict[str, Any]:
        """The tool as requests and chat templates have it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    def call(self, arguments: str) -> str:
        """The function's answer to a call, or what was wrong with the call: the model is to read it and try again.

        Errors that nobody foresaw are raised.
        """
        try:
            given = json.loads(arguments)
            inspect.signature(self.function).bind(**given)
        except (TypeError, ValueError) as error:
            return f"error: wrong arguments for {self.name}: {error}"
        try:
            return self.function(**given)
        except SandboxError:  # no answer for a model: nothing that it calls can run
            raise
        except UserError as error:
            return f"error: {error}"


calculator = Tool(
    "calculator",
    "Works out an arithmetic expression: + - * / // % **, parentheses, min, max, abs, round, sqrt.",
    {
        "type": "object",
        "properties": {"expression": {"type": "string", "maxLength": 300, "description": "for example (2 + 3) * 4"}},
        "required": ["expression"],
        "additionalProperties": False,
    },
    calculate,
)


@dataclass(slots=True, frozen=True)
class Reply:
    """One answer of a model."""

    content: str
    calls: tuple[ToolCall, ...] = ()
    finish_reason: str = "stop"  # stop | length | tool_calls | ...


class Generate(Protocol):
    """Anything that answers: our engine, a server, a stand-in. Messages and tools are in OpenAI's shape.

    A backend that trains on what it generated keeps the ids itself: text does not always tokenize back to them.
    """

    def __call__(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Reply: ...


@dataclass(slots=True, frozen=True)
class Transcript:
    """A conversation with all calls and their answers."""

    messages: tuple[dict[str, Any], ...]  # those that were given, then what was added
    finish_reason: str  # of the last answer; "max_rounds" where it still wanted to call
    rounds: int  # answers of the model

    @property
    def content(self) -> str:
        """The last answer's text."""
        return next((str(m["content"]) for m in reversed(self.messages) if m["role"] == "assistant"), "")


def run_with_tools(
    generate: Generate, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], max_rounds: int = 8
) -> Transcript:
    """Lets the model answer, runs the tools it calls, shows it the results, until it answers without a call.

    The calls of one answer run in their order. An answer that was cut off runs none of its calls. In the last of `max_rounds`
    answers the calls stand in the transcript without results.
    """
    said = [dict(message) for message in messages]
    offered = [tool.to_json() for tool in tools]
    for number in range(1, max_rounds + 1):
        reply = generate([dict(message) for message in said], offered)
        answer: dict[str, Any] = {"role": "assistant", "content": reply.content}
        said.append(answer | ({"tool_calls": [call.to_json() for call in reply.calls]} if reply.calls else {}))
        if not reply.calls or reply.finish_reason not in ("stop", "tool_calls"):
            return Transcript(tuple(said), reply.finish_reason, number)
        if number < max_rounds:
            said += run_calls(reply.calls, tools)
    return Transcript(tuple(said), "max_rounds", max_rounds)


def run_calls(calls: Sequence[ToolCall], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The results of calls, in their order, as messages."""
    known = {tool.name: tool for tool in tools}
    return [_result(call, known) for call in calls]


def _result(call: ToolCall, known: Mapping[str, Tool]) -> dict[str, Any]:
    tool = known.get(call.name)
    content = tool.call(call.arguments) if tool else f"error: no tool {call.name!r}; there are {', '.join(known) or 'none'}"
    return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content}
