"""Between text and token ids, as vLLM has it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from tutelage.serve.registry import Served
from tutelage.serve.requests import as_api_errors, read_json
from tutelage.serve.schema import ApiError, ChatRequest, Whole, parse
from tutelage.serve.state import state_of
from tutelage.serve.tokenizing import tokenized

router = APIRouter()


class TokenizeRequest(BaseModel):
    """`add_special_tokens`: whether a prompt begins as a document does; a conversation's special tokens are its template's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None  # may be left out where there is only one
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: list[Whole]


@router.post("/tokenize")
async def tokenize(request: Request) -> dict[str, Any]:
    asked = parse(TokenizeRequest, await read_json(request))
    served = _served(request, asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    with as_api_errors("prompt" if asked.messages is None else "messages"):
        ids = await tokenized(request, lambda: _encode(served, asked))
    return {"count": len(ids), "max_model_len": served.engine.context_length, "tokens": ids}


@router.post("/detokenize")
async def detokenize(request: Request) -> dict[str, Any]:
    asked = parse(DetokenizeRequest, await read_json(request))
    served = _served(request, asked.model)
    size = served.engine.vocab_size
    if any(not 0 <= token < size for token in asked.tokens):
        raise ApiError(400, f"token ids go from 0 to {size - 1}", param="tokens")
    return {"prompt": await tokenized(request, lambda: served.renderer.tokenizer.decode(asked.tokens))}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, model: str | None = None) -> dict[str, Any]:
    """What lm-eval asks for where it has no tokenizer of its own: the special tokens, and the chat template."""
    tokenizer = _served(request, model).renderer.tokenizer
    named = ("bos_token", "eos_token", "pad_token")
    return {name: tokenizer.special_tokens.get(name) for name in named} | {"chat_template": tokenizer.template}


def _encode(served: Served, asked: TokenizeRequest) -> list[int]:
    if asked.messages is not None:
        if asked.add_special_tokens:
            raise ApiError(400, "the template adds a conversation's special tokens", param="add_special_tokens")
        turns = parse(ChatRequest, {"model": served.name, "messages": asked.messages}).turns()
        return list(served.turns_renderer.prompt(turns))
    assert asked.prompt is not None
    if asked.add_special_tokens is False:
        tokenizer, text = served.renderer.tokenizer, asked.prompt
        if text in tokenizer.control_tokens:  # so lm-eval asks for the id of an end token; within a text it is characters
            return [tokenizer.tokenizer.token_to_id(text)]
        served.limit.check(text)
        return list(served.renderer.tokenizer.encode_text(asked.prompt))
    return served.encode(asked.prompt)


def _served(request: Request, name: str | None) -> Served:
    """The model asked for; the only one where none is named."""
    models = state_of(request).models
    if name is not None:
        return models.get(name)
    if len(models) != 1:
        raise ApiError(400, "say which model", param="model")
    return next(iter(models))
