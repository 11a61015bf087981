"""What a request may say. A key is honoured, listed as harmless, or refused by name: nothing is accepted and then not done."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tutelage.chat.message_keys import REASONING, SPOKEN, reasoning_of
from tutelage.engine.sequence import Sampling
from tutelage.errors import ConfigError, DataError

Whole = Annotated[int, Field(strict=True)]
Prompts = str | list[Whole] | list[str] | list[list[Whole]]
Request = TypeVar("Request", bound=BaseModel)
MAX_ANSWERS = 1024  # to one request
LEFT = ("annotations",)
"""Keys of a message that are taken and left: notes on a text that was given out before; the model reads the text."""
MAX_STOPS = 64  # OpenAI takes 4; lm-eval sends all of a task's, and some have more


class ApiError(Exception):
    """An error in the shape that OpenAI's clients read. `headers` go with the reply (`retry-after`)."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        kind: str = "invalid_request_error", headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def server_error() -> ApiError:
    """500. The connection is closed after it, which a client has to know, or its next request goes into the closing one."""
    message = "the server failed on this request; its log says why"
    return ApiError(500, message, kind="server_error", headers={"connection": "close"})


def unavailable(message: str, code: str) -> ApiError:
    """503 for what another server, or this one in a moment, can do."""
    return ApiError(503, message, code=code, kind="server_error", headers={"retry-after": "1"})


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis; a no-op here


class Generation(BaseModel):
    """What chat and text completions have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: Whole | None = Field(None, ge=1, le=128)
    seed: Whole | None = None
    stop: str | list[str] | None = None
    max_tokens: Whole | None = Field(None, ge=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # beyond OpenAI, through `extra_body`
    top_k: Whole | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    ignore_eos: bool = False
    stop_token_ids: list[Whole] | None = None
    include_stop_str_in_output: bool = False
    min_tokens: Whole | None = Field(None, ge=0)
    skip_special_tokens: bool = True
    prompt_logprobs: Whole | None = Field(None, ge=0, le=20)
    return_token_ids: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    # accepted, of no effect: they change nothing about the answer
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @abstractmethod
    def top(self) -> int | None:
        """How many most likely tokens to report with each token; None for no log-probabilities."""

    def limit(self) -> int | None:
        return self.max_tokens

    def sampling(self, vocabulary: int) -> Sampling:
        """Raises `ApiError` naming the parameter."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed when stream is true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise ApiError(400, "prompt_logprobs are not available when stream is true", param="prompt_logprobs")
        if self.temperature and self.temperature < 1e-3:  # logits over it would not be numbers, for everyone in the batch
            raise ApiError(400, "temperature is 0, or at least 0.001", param="temperature")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > MAX_STOPS:
            raise ApiError(400, f"at most {MAX_STOPS} stop texts", param="stop")
        given: dict[str, Any] = {
            "temperature": self.temperature, "top_p": self.top_p, "n": self.n, "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty, "top_k": self.top_k, "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty, "min_tokens": self.min_tokens,
        }  # fmt: skip
        try:
            return Sampling(
                max_tokens=self.limit(), seed=self.seed, stop=stop, logprobs=self.top(), ignore_eos=self.ignore_eos,
                stop_ids=self._stop_ids(vocabulary), include_stop=self.include_stop_str_in_output,
                logit_bias=self._bias(vocabulary), **{k: v for k, v in given.items() if v is not None},
            )  # fmt: skip
        except ConfigError as error:
            raise ApiError(400, f"{error.field}: {error.message}", param=error.field) from error

    def _stop_ids(self, vocabulary: int) -> tuple[int, ...]:
        ids = tuple(self.stop_token_ids or ())
        if any(not 0 <= token < vocabulary for token in ids):
            raise ApiError(400, f"stop_token_ids: token ids go from 0 to {vocabulary - 1}", param="stop_token_ids")
        return ids

    def _bias(self, vocabulary: int) -> dict[int, float]:
        try:
            bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        except ValueError as error:
            raise ApiError(400, "logit_bias maps token ids to numbers", param="logit_bias") from error
        if any(not 0 <= token < vocabulary for token in bias):
            raise ApiError(400, f"logit_bias: token ids go from 0 to {vocabulary - 1}", param="logit_bias")
        return bias


class ChatRequest(Generation):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    # beyond OpenAI: what the template is told
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    # refused unless they ask for what happens anyway
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None

    def top(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def limit(self) -> int | None:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ApiError(400, "max_tokens and max_completion_tokens are one limit: give either", param="max_tokens")
        return next(iter(limits), None)

    def refuse_unsupported(self) -> None:
        """Raises `ApiError` for what this server does not do."""
        asked = {
            "functions": bool(self.functions),
            "function_call": self.function_call not in (None, "none", "auto"),
            "modalities": self.modalities not in (None, ["text"]),
        }
        for name, wrong in asked.items():
            if wrong:
                raise ApiError(400, f"{name} is not supported by this server", param=name, code="unsupported_parameter")
        if self.continue_final_message and self.add_generation_prompt:
            raise ApiError(
                400, "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )

    def turns(self) -> list[dict[str, Any]]:
        """The messages as the renderer takes them: `developer` is `system`, parts of text are joined."""
        out = []
        for i, message in enumerate(self.messages):
            where = f"messages[{i}]"
            role = {"developer": "system"}.get(str(message.get("role")), message.get("role"))
            if role not in ("system", "user", "assistant", "tool"):
                raise ApiError(400, f"{where}: unknown role {message.get('role')!r}", param=f"{where}.role")
            content = _text(message.get("content"), where)
            if content is None and not (role == "assistant" and message.get("tool_calls")):
                raise ApiError(400, f"{where}: content is missing", param=f"{where}.content")
            _check_message(message, role, where)
            given = {k: v for k, v in message.items() if v is not None and k not in LEFT}
            out.append(given | {"role": role, "content": content or ""})
        return out


class CompletionRequest(Generation):
    prompt: Prompts
    max_tokens: Whole | None = Field(None, ge=0)  # 0: only the prompt's log-probabilities
    echo: bool | None = None
    logprobs: Whole | None = Field(None, ge=0, le=20)
    best_of: Whole | None = None
    suffix: str | None = None

    def top(self) -> int | None:
        return self.logprobs

    def limit(self) -> int | None:
        return 16 if self.max_tokens is None else max(self.max_tokens, 1)

    @property
    def prompt_only(self) -> bool:
        return self.max_tokens == 0

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt. Raises `ApiError` for none, for `suffix` and `best_of`, which are not supported, and where nothing
        is asked for."""
        if self.prompt_only and not (self.echo and self.logprobs is not None):
            raise ApiError(
                400, "max_tokens is 0 only for a prompt's log-probabilities: with echo and logprobs", param="max_tokens"
            )
        if self.suffix:
            raise ApiError(400, "suffix is not supported by this model", param="suffix", code="unsupported_parameter")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, "best_of is not supported, unless it equals n", param="best_of", code="unsupported_parameter")
        prompts = one_each(self.prompt, "prompt", most=MAX_ANSWERS)
        if len(prompts) * (self.n or 1) > MAX_ANSWERS:
            raise ApiError(400, f"at most {MAX_ANSWERS} answers to one request, n to each prompt", param="n")
        return prompts


def one_each(prompts: Prompts, param: str, most: int) -> list[str | list[int]]:
    """A list of texts and token ids, whichever of the four shapes it came in. Raises `ApiError` for an empty prompt."""
    given: Any = prompts
    many = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not many or any(len(p) == 0 for p in many):
        raise ApiError(400, f"the {param} is empty", param=param)
    if len(many) > most:
        raise ApiError(400, f"at most {most} prompts in one request", param=param)
    return many


def parse(kind: type[Request], body: Any) -> Request:
    """The request in `body`. A null asks for nothing. Raises `ApiError` naming the first parameter that is wrong."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        return kind.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        param = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "extra_forbidden":
            close = get_close_matches(param or "", kind.model_fields, 1, 0.8)
            meant = f"; did you mean {close[0]}?" if close else ""
            message = f"{param} is not supported by this server{meant}"
            raise ApiError(400, message, param=param, code="unsupported_parameter") from error
        raise ApiError(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}", param=param) from error


def refuse_unknown(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raises `ApiError` naming the first key outside `known` that says something."""
    names = tuple(known)
    for key, value in given.items():
        if key not in names and value is not None:
            param = f"{where}.{key}"
            close = get_close_matches(key, names, 1, 0.6)
            meant = f"; did you mean {close[0]}?" if close else ""
            message = f"{param} is not supported by this server{meant}"
            raise ApiError(400, message, param=param, code="unsupported_parameter")


def _check_message(message: Mapping[str, Any], role: str, where: str) -> None:
    """Raises `ApiError` for a key that would be left out of what the model reads, or that is of another's turn."""
    refuse_unknown(message, (*SPOKEN, *LEFT), where)
    for key, owner in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
        if message.get(key) and role != owner:
            raise ApiError(400, f"{where}.{key}: only a turn of the {owner} has it", param=f"{where}.{key}")
    for key in ("name", "tool_call_id"):
        if not isinstance(message.get(key), str | None):
            raise ApiError(400, f"{where}.{key} is a text", param=f"{where}.{key}")
    for key in REASONING:
        if not isinstance(message.get(key), str | None):
            raise ApiError(400, f"{where}.{key} is a text", param=f"{where}.{key}")
    try:
        reasoning_of(message, role, where)
    except DataError as error:
        raise ApiError(400, f"{error.field}: {error.message}", param=error.field) from error
    calls = message.get("tool_calls")
    if not isinstance(calls, list | None):
        raise ApiError(400, f"{where}.tool_calls is a list", param=f"{where}.tool_calls")
    for i, call in enumerate(calls or []):
        _check_call(call, i, f"{where}.tool_calls[{i}]")


def _check_call(call: Any, number: int, where: str) -> None:
    """Raises `ApiError` for a tool call that is not in OpenAI's shape. Its arguments may be any text: another model, or an answer
    that was cut off, leaves some that are no JSON, and a conversation goes on behind them."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{where}: a function with a name, and arguments as text", param=where)
    refuse_unknown(call, ("id", "type", "function", "index"), where)
    refuse_unknown(function, ("name", "arguments"), f"{where}.function")
    wanted = {
        "id": isinstance(call.get("id"), str | None), "type": call.get("type") in (None, "function"),
        "index": call.get("index") in (None, number),
        "function.arguments": isinstance(function.get("arguments"), str | dict | None),
    }  # fmt: skip
    for key, right in wanted.items():
        if not right:
            raise ApiError(400, f"{where}.{key}: a call in OpenAI's shape has another", param=f"{where}.{key}")


def _text(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where}: content must be text", param=f"{where}.content")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ApiError(400, f"{where}: parts of type {kind!r} are not supported", param=f"{where}.content")
        refuse_unknown(part, ("type", "text"), f"{where}.content[{i}]")
        texts.append(part["text"])
    return "".join(texts)


Kind = Literal["chat.completion", "text_completion"]
