"""What `POST /v1/responses` may say, and the chat request that asks the model for the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from tutelage.serve.responses.items import Item, messages, read
from tutelage.serve.schema import ApiError, ChatRequest, Whole, parse

LOGPROBS = "message.output_text.logprobs"
SHARED = (
    "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "logit_bias", "top_k", "min_p",
    "repetition_penalty", "ignore_eos", "structured_outputs",
)  # fmt: skip
"""Parameters that mean here what they mean in a chat request, which also checks them."""

Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16),
]


def _boolean(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("must be false")
    return value


No = Annotated[Literal[False], BeforeValidator(_boolean)]  # the literal alone takes 0, which equals it


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _StreamOptions(_Strict):
    include_obfuscation: bool = False  # padding against traffic analysis; a no-op here


class _Text(_Strict):
    format: Any = None
    verbosity: Literal["medium"] = "medium"  # what an answer has anyway


class _Schema(_Strict):
    type: Literal["json_schema"]
    name: str = Field(pattern=r"^[\w-]{1,64}$")
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None  # a schema is always enforced


class _PlainFormat(_Strict):
    type: Literal["text", "json_object"]


class _Reasoning(_Strict):
    """Our models have no thoughts beside their answers, so only what asks for none is taken."""

    effort: Literal["none"] | None = None
    summary: Literal["auto"] | None = None  # of no thoughts


class _Tool(_Strict):
    type: Literal["function"]
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: No = False


class _NamedTool(_Strict):
    type: Literal["function"]
    name: str


class _AllowedTools(_Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[_NamedTool]


class ResponsesRequest(BaseModel):
    """One request; `chat` is what the model is asked."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    input: str | list[Any] = Field(min_length=1)
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_output_tokens: Whole | None = Field(None, ge=1)
    text: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Whole | None = Field(None, ge=1)  # of tools that a server runs; this one runs none
    include: list[str] | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    metadata: Metadata | None = None
    # refused unless they ask for what happens anyway
    background: No | None = None
    truncation: Literal["disabled"] | None = None
    reasoning: dict[str, Any] | None = None
    # accepted, of no effect: they change nothing about the answer
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    service_tier: str | None = None
    # those of `SHARED`
    temperature: Any = None
    top_p: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    seed: Any = None
    stop: Any = None
    logit_bias: Any = None
    top_k: Any = None
    min_p: Any = None
    repetition_penalty: Any = None
    ignore_eos: Any = None
    structured_outputs: Any = None

    @property
    def logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def check(self) -> None:
        """Raises `ApiError` naming what is not supported, or does not go together."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed when stream is true", param="stream_options")
        if other := [name for name in self.include or () if name != LOGPROBS]:
            raise ApiError(400, f"include: {other[0]!r} is not supported by this server, only {LOGPROBS!r}", param="include")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, f"top_logprobs needs {LOGPROBS!r} in include", param="top_logprobs")
        if self.reasoning is not None:
            read(_Reasoning, self.reasoning, "reasoning")

    def chat(self, items: Iterable[Item]) -> ChatRequest:
        """The chat request that asks for the same answer to these items. Raises `ApiError` naming the parameter of this one."""
        body: dict[str, Any] = {name: getattr(self, name) for name in SHARED}
        body |= {
            "max_completion_tokens": self.max_output_tokens, "parallel_tool_calls": self.parallel_tool_calls,
            "logprobs": self.logprobs or None, "top_logprobs": self.top_logprobs if self.logprobs else None,
            "response_format": self._response_format(), "tools": self._tools(), "tool_choice": self._tool_choice(),
        }  # fmt: skip
        asked = {name: value for name, value in body.items() if value is not None}
        return parse(ChatRequest, {"model": self.model, "messages": self._messages(items), **asked})

    def _messages(self, items: Iterable[Item]) -> list[dict[str, Any]]:
        """`instructions` and a system prompt right behind them are one: most templates have place for one only."""
        turns = messages(items)
        if not turns:
            raise ApiError(400, "input has nothing that the model could read", param="input")
        if self.instructions is None:
            return turns
        system = [self.instructions]
        if turns[0]["role"] in ("system", "developer"):
            system.append(turns.pop(0)["content"])
        return [{"role": "system", "content": "\n\n".join(system)}, *turns]

    @property
    def format(self) -> dict[str, Any]:
        """`text.format` as it is honoured. Raises `ApiError` for one that is none."""
        given = read(_Text, self.text or {}, "text").format
        if given is None:
            return {"type": "text"}
        if isinstance(given, dict) and given.get("type") == "json_schema":
            found = read(_Schema, given, "text.format")
            described = {} if found.description is None else {"description": found.description}
            return {"type": "json_schema", "name": found.name, "schema": found.json_schema, "strict": True, **described}
        return read(_PlainFormat, given, "text.format").model_dump()

    def _response_format(self) -> dict[str, Any]:
        found = self.format
        if found["type"] != "json_schema":
            return found
        return {"type": "json_schema", "json_schema": {"name": found["name"], "schema": found["schema"]}}

    @property
    def functions(self) -> list[dict[str, Any]]:
        """`tools` as they are honoured: where a call is forced, the schema of its arguments is enforced in any case. Raises
        `ApiError`."""
        choice = self.tool_choice if isinstance(self.tool_choice, dict) else {"mode": self.tool_choice}
        forced = choice.get("mode") == "required" or choice.get("type") == "function"
        found = [read(_Tool, tool, f"tools[{i}]") for i, tool in enumerate(self.tools or ())]
        return [tool.model_dump(exclude={"defer_loading"}) | {"strict": forced or bool(tool.strict)} for tool in found]

    def _tools(self) -> list[dict[str, Any]] | None:
        kept = ("name", "description", "parameters", "strict")
        functions = [{key: tool[key] for key in kept if tool[key] is not None} for tool in self.functions]
        return [{"type": "function", "function": function} for function in functions] or None

    def _tool_choice(self) -> Any:
        choice = self.tool_choice
        if not isinstance(choice, dict):
            return choice
        if choice.get("type") == "allowed_tools":
            found = read(_AllowedTools, choice, "tool_choice")
            tools = [{"type": "function", "function": {"name": tool.name}} for tool in found.tools]
            return {"type": "allowed_tools", "allowed_tools": {"mode": found.mode, "tools": tools}}
        return {"type": "function", "function": {"name": read(_NamedTool, choice, "tool_choice").name}}


@contextlib.contextmanager
def named_as_here() -> Iterator[None]:
    """Errors of a chat request name the parameter of this one."""
    try:
        yield
    except ApiError as error:
        fields = error.body["error"]
        fields["message"] = str(fields["message"]).replace("response_format", "text.format")
        fields["param"] = "text.format" if fields["param"] == "response_format" else fields["param"]
        raise
