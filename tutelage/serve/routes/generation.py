"""Chat and text completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from tutelage.serve.completions import CompletionHandler
from tutelage.serve.replies import Reply
from tutelage.serve.requests import as_api_errors, read_json
from tutelage.serve.response_format import shape_of
from tutelage.serve.schema import ChatRequest, CompletionRequest, parse
from tutelage.serve.state import state_of
from tutelage.serve.tokenizing import tokenized

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def chat(request: Request) -> Response:
    asked = parse(ChatRequest, await read_json(request))
    served = state_of(request).admit(request, asked.model)
    asked.refuse_unsupported()
    sampling = asked.sampling(served.engine.vocab_size)
    turns = asked.turns()
    shape = await shape_of(asked, served)
    ids = await tokenized(request, lambda: _prompt(served.turns_renderer, asked, turns, list(shape.tools) or None))
    reply = Reply("chat.completion", served.name)
    return await CompletionHandler(request, served, reply, [ids], shape.sampling(sampling), "messages", shape.style).answer(asked)


@router.post("/v1/completions", response_model=None)
async def complete(request: Request) -> Response:
    asked = parse(CompletionRequest, await read_json(request))
    served = state_of(request).admit(request, asked.model)
    sampling = (await shape_of(asked, served)).sampling(asked.sampling(served.engine.vocab_size))
    prompts = asked.prompts()
    with as_api_errors("prompt"):
        ids = await tokenized(request, lambda: [served.encode(prompt) for prompt in prompts])
    job = CompletionHandler(request, served, Reply("text_completion", served.name), ids, sampling, "prompt")
    return await job.answer(asked, echo=prompts if asked.echo else ())


def _prompt(renderer: Any, asked: ChatRequest, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
    """Token ids of a conversation. Raises `ApiError`."""
    with as_api_errors("chat_template_kwargs"):
        if asked.chat_template_kwargs:
            renderer = renderer.with_variables(asked.chat_template_kwargs)
    with as_api_errors("messages"):
        if asked.continue_final_message:
            return renderer.continued(turns, tools)  # type: ignore[no-any-return]
        return renderer.prompt(turns, tools, asked.add_generation_prompt is not False)  # type: ignore[no-any-return]
