"""Embeddings: unit vectors, as floats or as base64 of little-endian float32."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from tutelage.engine.limits import check_length, check_tokens
from tutelage.engine.protocol import EngineProtocol
from tutelage.serve.registry import Served
from tutelage.serve.requests import GONE, as_api_errors, read_json, unless_gone
from tutelage.serve.schema import ApiError, Prompts, Whole, one_each, parse
from tutelage.serve.state import allowance_of, state_of
from tutelage.serve.tokenizing import tokenized

router = APIRouter()


class EmbeddingRequest(BaseModel):
    """`dimensions` must be the model's width: our models are not trained so that the beginning of a vector would do alone."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Whole | None = None
    user: str | None = None


@router.post("/v1/embeddings", response_model=None)
async def embeddings(request: Request) -> Response:
    asked = parse(EmbeddingRequest, await read_json(request))
    served = state_of(request).admit(request, asked.model)
    width = served.engine.hidden_size
    if asked.dimensions not in (None, width):
        raise ApiError(400, f"the vectors of this model have {width} dimensions, no fewer", param="dimensions")
    texts = one_each(asked.input, "input", most=2048)
    with as_api_errors("input"):
        prompts = await tokenized(request, lambda: [served.encode(text) for text in texts])
        for ids in prompts:
            check_tokens(ids, served.engine.vocab_size)
            check_length(ids, served.engine.context_length)
    tokens = sum(map(len, prompts))
    with allowance_of(request).admitting(tokens), as_api_errors("input"):
        vectors = await unless_gone(request, _vectors(served, prompts))
    if vectors is None:
        return GONE
    data = [
        {"object": "embedding", "index": i, "embedding": _written(vector, asked.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": usage})


async def _vectors(served: Served, prompts: list[list[int]]) -> list[np.ndarray]:
    """A vector for each prompt. Counts how each ended, whether they all did or the client left before."""
    asked, left = time.monotonic(), len(prompts)

    def measured(engine: EngineProtocol, texts: list[list[int]], adapter: Any) -> list[np.ndarray]:
        nonlocal left
        began = time.monotonic()
        vectors = engine.embed(texts, adapter)
        left -= len(texts)
        for ids in texts:
            served.meter.embedded(began - asked, time.monotonic() - asked, len(ids))
        return vectors

    try:
        return await served.thread.grouped(prompts, measured, adapter=served.adapter)
    except BaseException as error:
        for _ in range(left):
            served.meter.finished("abort" if isinstance(error, asyncio.CancelledError) else "error", time.monotonic() - asked)
        raise


def _written(vector: np.ndarray, encoding_format: str) -> Any:
    if encoding_format == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
