"""One request that generates, on its way through an engine: queued, counted against its key, ended when its client leaves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from tutelage.engine import Event, Sampling, Sequence
from tutelage.serve.engine_thread import PendingResponse
from tutelage.serve.registry import Served
from tutelage.serve.requests import GONE, as_api_errors, unless_gone
from tutelage.serve.state import allowance_of, check_queue, owner_of, state_of
from tutelage.tokenizer.detokenize import Vocabulary


class GenerationRequest:
    """The prompts of one request. `param`: the request's parameter that they came in."""

    def __init__(self, request: Request, served: Served, prompts: list[list[int]], sampling: Sampling, param: str) -> None:
        self.request, self.served, self.prompts, self.sampling, self.param = request, served, prompts, sampling, param
        self.allowance = allowance_of(request)
        self._response: PendingResponse | None = None
        self._reserved = 0  # tokens of the key's allowance

    @property
    def vocabulary(self) -> Vocabulary:
        vocabulary = self.served.engine.vocabulary
        assert vocabulary is not None, "a server needs a tokenizer"
        return vocabulary

    @property
    def sequences(self) -> list[Sequence]:
        assert self._response is not None, "not submitted yet"
        return self._response.sequences

    async def submit(self, first: Callable[[], Awaitable[None]] | None = None, answers: bool = True) -> None:
        """Queues the answers (none where only `first` is wanted), after `first`. Raises `ApiError` for what cannot be answered,
        which then costs nothing."""
        wanted = [(ids, self.sampling, j) for ids in self.prompts for j in range(self.sampling.n)] if answers else []
        reserved = self._largest() if answers else 0
        with self.allowance.admitting(sum(map(len, self.prompts)), reserved), as_api_errors(self.param):
            if first is not None:
                await first()
            check_queue(self.served, state_of(self.request).max_waiting, len(wanted))
            self._response = await self.served.thread.submit(wanted, owner_of(self.request), self.served.adapter)
        self._reserved = reserved
        self.request.state.leaving.callback(self._release, reserved)
        self.request.state.leaving.callback(self.served.thread.cancel, self._response)

    async def events(self, whole: bool = False) -> AsyncIterator[tuple[int, Event]]:
        """(number of the answer, event), their tokens taken off what the key may use. `whole`: nobody reads along. Raises what
        stopped the engine."""
        assert self._response is not None, "not submitted yet"
        async for number, event in self._response.events(whole):
            self.allowance.spend(len(event.ids))
            self._release(len(event.ids))
            yield number, event

    def _largest(self) -> int:
        """Tokens that the answers may have together."""
        rooms = [max(0, self.served.engine.context_length - len(ids)) for ids in self.prompts]
        asked = self.sampling.max_tokens
        return self.sampling.n * sum(room if asked is None else min(asked, room) for room in rooms)

    def _release(self, tokens: int) -> None:
        """Ends the reservation of tokens that were made, or will not be."""
        tokens = min(tokens, self._reserved)
        self._reserved -= tokens
        self.allowance.release(tokens)

    async def respond(
        self, stream: bool, pieces: Callable[[], AsyncIterator[bytes]], whole: Callable[[], Coroutine[Any, Any, dict[str, Any]]]
    ) -> Response:
        """The reply: as server-sent events, or in one for a client that is still there."""
        if stream:
            return StreamingResponse(pieces(), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        body = await unless_gone(self.request, whole())
        return GONE if body is None else JSONResponse(body)
