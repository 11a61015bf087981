"""Responses: made, and where the server has a store, kept, read, continued and deleted."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from tutelage.chat.tool_calls import CallStyle, showing
from tutelage.serve.generation import GenerationRequest
from tutelage.serve.registry import Served
from tutelage.serve.requests import as_api_errors, read_json
from tutelage.serve.response_format import shape_of
from tutelage.serve.responses.answer import Answer
from tutelage.serve.responses.draft import Draft
from tutelage.serve.responses.items import Item, read_input
from tutelage.serve.responses.reply import Reply
from tutelage.serve.responses.request import ResponsesRequest, named_as_here
from tutelage.serve.responses.scores import PlacedScores
from tutelage.serve.responses.store import ResponseStore, Stored
from tutelage.serve.schema import ApiError, parse
from tutelage.serve.state import owner_of, state_of
from tutelage.serve.tokenizing import tokenized

router = APIRouter()
START = "start the server with --store FILE"


class RetrieveQuery(BaseModel):
    """A response is given back as it was made: whole, with what it was made with."""

    model_config = ConfigDict(extra="forbid")

    stream: Literal["false"] = "false"


class ItemsQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    limit: int = Field(20, ge=1, le=100)
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None


@router.post("/v1/responses", response_model=None)
async def create(request: Request) -> Response:
    asked = parse(ResponsesRequest, await read_json(request))
    served = state_of(request).admit(request, asked.model)
    asked.check()
    items, store = read_input(asked.input), _store_asked_for(request, asked)
    before = await _before(request, asked)
    with named_as_here():
        chat = asked.chat([*before, *items])
        plain, turns = chat.sampling(served.engine.vocab_size), chat.turns()
        shape = await shape_of(chat, served)
    with as_api_errors("input"):
        ids = await tokenized(request, lambda: served.turns_renderer.prompt(turns, list(shape.tools) or None))
    sampling = shape.sampling(plain)
    work = GenerationRequest(request, served, [ids], sampling, "input")
    reply = Reply(asked, sampling, served.name, stored=store is not None)
    draft = Draft(shape.style, _scores(served, shape.style) if asked.logprobs else None)

    unkept: list[str] = []

    async def keep(response: dict[str, Any]) -> None:
        if store is not None:
            try:
                await store.put(Stored(items, response, asked.previous_response_id), owner_of(request))
            except ApiError as error:
                if asked.store:  # the client relies on it, and would try again and pay for each answer
                    error.headers["x-should-retry"] = "false"
                    raise
                response["store"] = False  # the answer is worth more than its copy
                unkept.append('199 - "the store of responses cannot be used now; this response was not kept"')

    answer = Answer(work, reply, draft, keep)
    await work.submit()
    reply_sent = await work.respond(bool(asked.stream), answer.pieces, answer.whole)
    if unkept:
        reply_sent.headers["warning"] = unkept[0]
    return reply_sent


@router.get("/v1/responses/{response_id}")
async def retrieve(request: Request, response_id: str) -> dict[str, Any]:
    parse(RetrieveQuery, _query(request))
    return (await _stored(request, response_id)).response


@router.delete("/v1/responses/{response_id}")
async def delete(request: Request, response_id: str) -> dict[str, Any]:
    """What continues it stays, but cannot be continued any more: its beginning is gone."""
    if not await _store(request, response_id).delete(response_id, owner_of(request)):
        raise _unknown(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.get("/v1/responses/{response_id}/input_items")
async def input_items(request: Request, response_id: str) -> dict[str, Any]:
    """The response's own input, without the responses that it continues. Newest first, unless asked otherwise."""
    asked = parse(ItemsQuery, _query(request))
    items = (await _stored(request, response_id)).input
    items = items if asked.order == "asc" else items[::-1]
    if asked.after is not None:
        places = [i for i, item in enumerate(items) if item["id"] == asked.after]
        if not places:
            raise ApiError(400, f"there is no input item {asked.after!r}", param="after")
        items = items[places[0] + 1 :]
    page = items[: asked.limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else ("", "")
    return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": len(items) > len(page)}


@router.post("/v1/responses/{response_id}/cancel")
async def cancel(request: Request, response_id: str) -> dict[str, Any]:
    await _stored(request, response_id)
    raise ApiError(400, "only background responses can be cancelled, and this server makes none; leave the stream instead")


def _query(request: Request) -> dict[str, str]:
    """The query's parameters. Clients write the name of a list with brackets."""
    return {name.removesuffix("[]"): value for name, value in request.query_params.items()}


def _store_asked_for(request: Request, asked: ResponsesRequest) -> ResponseStore | None:
    """Where the response is to be kept; None for nowhere. Raises `ApiError` 400 for what needs a store where there is none."""
    store = state_of(request).store
    if store is None:
        for param, wanted in (("store", asked.store), ("previous_response_id", asked.previous_response_id is not None)):
            if wanted:
                raise ApiError(400, f"{param}: this server keeps no responses; {START}", param=param, code="no_store")
    return None if asked.store is False else store


async def _before(request: Request, asked: ResponsesRequest) -> list[Item]:
    """The conversation that the request continues. Raises `ApiError` 400 where a part of it is gone."""
    store, last = state_of(request).store, asked.previous_response_id
    if store is None or last is None:
        return []
    chain = await store.chain(last, owner_of(request))
    missing = chain[0].previous if chain else last
    if missing is not None:
        raise ApiError(
            400, f"there is no response {missing!r}: it was never kept, deleted, or is too old, and nothing can continue it",
            param="previous_response_id", code="previous_response_not_found",
        )  # fmt: skip
    return [item for stored in chain for item in (*stored.input, *stored.response["output"])]


def _store(request: Request, response_id: str) -> ResponseStore:
    store = state_of(request).store
    if store is None:
        raise _unknown(response_id, f"; this server keeps none: {START}")
    return store


async def _stored(request: Request, response_id: str) -> Stored:
    found = await _store(request, response_id).get(response_id, owner_of(request))
    if found is None:
        raise _unknown(response_id)
    return found


def _unknown(response_id: str, why: str = "") -> ApiError:
    return ApiError(404, f"there is no response {response_id!r}{why}", param="response_id", code="response_not_found")


def _scores(served: Served, style: CallStyle | None) -> PlacedScores:
    vocabulary = served.engine.vocabulary
    assert vocabulary is not None, "a server needs a tokenizer"
    return PlacedScores(showing(vocabulary, style.visible) if style and style.visible else vocabulary)
