"""Between text and token ids, as vLLM has it."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from tutelage.serve.models import Served
from tutelage.serve.requests import as_api_errors, read_json
from tutelage.serve.schema import ApiError, ChatRequest, Whole, parse
from tutelage.serve.state import state_of

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
        ids = await asyncio.to_thread(_encode, served, asked)
    return {"count": len(ids), "max_model_len": served.engine.context_length, "tokens": ids}


@router.post("/detokenize")
async def detokenize(request: Request) -> dict[str, Any]:
    asked = parse(DetokenizeRequest, await read_json(request))
    served = _served(request, asked.model)
    size = served.engine.vocab_size
    if any(not 0 <= token < size for token in asked.tokens):
        raise ApiError(400, f"token ids go from 0 to {size - 1}", param="tokens")
    return {"prompt": await asyncio.to_thread(served.renderer.tokenizer.decode, asked.tokens)}


def _encode(served: Served, asked: TokenizeRequest) -> list[int]:
    if asked.messages is not None:
        if asked.add_special_tokens:
            raise ApiError(400, "the template adds a conversation's special tokens", param="add_special_tokens")
        turns = parse(ChatRequest, {"model": served.name, "messages": asked.messages}).turns()
        return list(served.renderer.prompt(turns))
    assert asked.prompt is not None
    if asked.add_special_tokens is False:
        return list(served.renderer.tokenizer.encode_text(asked.prompt))
    return served.engine.encode(asked.prompt)


def _served(request: Request, name: str | None) -> Served:
    """The model asked for; the only one where none is named."""
    models = state_of(request).models
    if name is not None:
        return models.get(name)
    if len(models) != 1:
        raise ApiError(400, "say which model", param="model")
    return next(iter(models))
