"""One response on its way to the client, in one or as events. It is kept before the client hears that it is finished."""

from __future__ import annotations

import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from tutelage.log import say
from tutelage.serve.generation import GenerationRequest
from tutelage.serve.replies import sse
from tutelage.serve.responses.draft import Draft, Told
from tutelage.serve.responses.reply import Reply, usage
from tutelage.serve.schema import ApiError, server_error

Keep = Callable[[dict[str, Any]], Awaitable[None]]


class Answer:
    """`keep` is given the finished response, before anybody else."""

    def __init__(self, work: GenerationRequest, reply: Reply, draft: Draft, keep: Keep) -> None:
        self.work, self.reply, self.draft, self.keep = work, reply, draft, keep
        self._number = 0  # of the next event

    async def whole(self) -> dict[str, Any]:
        async for _, event in self.work.events(whole=True):
            self.draft.feed(event)
        return await self._finished()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The events, all that one step of the engine brings at a time."""
        began = self.reply.running()
        yield self._sse([{"type": f"response.{name}", "response": began} for name in ("created", "in_progress")])
        try:
            async for _, event in self.work.events():
                if told := self.draft.feed(event):
                    yield self._sse(told)
            yield self._sse([_final(await self._finished())])
        except ApiError as error:
            yield self._failed(error)
        except Exception:
            # Not raised: the stream would break off behind this event, and clients would take it for a broken connection.
            say(f"response {self.reply.id} failed\n{traceback.format_exc()}", style="red")
            yield self._failed(server_error())

    async def _finished(self) -> dict[str, Any]:
        response = self.reply.finished(self.draft.items, self.draft.cut, usage(self.work.sequences[0]))
        await self.keep(response)
        return response

    def _failed(self, error: ApiError) -> bytes:
        told = self.draft.break_off()
        return self._sse([*told, _final(self.reply.failed(self.draft.items, error))])

    def _sse(self, events: list[Told]) -> bytes:
        out = []
        for event in events:
            out += [f"event: {event['type']}\n".encode(), sse({**event, "sequence_number": self._number})]
            self._number += 1
        return b"".join(out)


def _final(response: dict[str, Any]) -> Told:
    return {"type": f"response.{response['status']}", "response": response}
