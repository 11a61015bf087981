"""The bridge between the server's event loop and the engine's own thread, where all requests run in one batch."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from tutelage.engine import Engine, Event, Sampling, Sequence

T = TypeVar("T")
Delivery = tuple[int, Event] | Exception


class Ticket:
    """The answers to one request, while they come."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.inbox: asyncio.Queue[Delivery] = asyncio.Queue()
        self.sequences: list[Sequence] = []

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(number of the answer, event) until all are finished. Raises what stopped the engine."""
        left = len(self.sequences)
        while left:
            got = await self.inbox.get()
            if isinstance(got, Exception):
                raise got
            left -= got[1].finish_reason is not None
            yield got


class EngineThread:
    """Runs an engine in a background thread. Every other thread talks to it through `call`, `submit` and `cancel`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: dict[int, tuple[Ticket, int]] = {}  # id of a sequence -> whose it is, and which answer
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        self.engine.model.eval()
        self._thread.start()

    def stop(self) -> None:
        self._orders.put(None)
        self._thread.join()

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Runs `function` in the engine's thread between two steps."""
        future: Future[T] = Future()

        def order() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(self.engine))
            except Exception as error:
                future.set_exception(error)

        self._orders.put(order)
        return future

    async def submit(self, wanted: list[tuple[list[int], Sampling, int]]) -> Ticket:
        """Queues answers: (prompt ids, sampling, which of n). All or none: an error leaves nothing behind."""
        ticket = Ticket(asyncio.get_running_loop())

        def order(engine: Engine) -> None:
            try:
                for number, (ids, sampling, index) in enumerate(wanted):
                    sequence = engine.submit(ids, sampling, index)
                    ticket.sequences.append(sequence)
                    self._tickets[id(sequence)] = (ticket, number)
            except Exception:
                self._drop(ticket)
                raise

        future = self.call(order)
        try:
            await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self.cancel(ticket)
            raise
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends what still runs of a request and frees its slots. Returns at once."""
        self._orders.put(lambda: self._drop(ticket))

    def _drop(self, ticket: Ticket) -> None:
        for sequence in ticket.sequences:
            self._tickets.pop(id(sequence), None)
            self.engine.cancel(sequence)

    def _work(self) -> None:
        while True:
            order = self._next_order()
            while order is not _NOTHING:
                if order is None:
                    return
                order()
                order = self._next_order()
            try:
                self._deliver(self.engine.step())
            except Exception as error:
                self._fail(error)

    def _next_order(self) -> Any:
        """The next order; without one, waits if there is nothing to run, else `_NOTHING`."""
        if self.engine.idle:
            return self._orders.get()
        try:
            return self._orders.get_nowait()
        except queue.Empty:
            return _NOTHING

    def _deliver(self, events: list[Event]) -> None:
        """Hands a step's events over, with one wake-up a loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Delivery]]] = {}
        for event in events:
            owner = self._tickets.get(id(event.sequence))
            if owner is None:
                continue
            if event.finish_reason is not None:
                del self._tickets[id(event.sequence)]
            ticket, number = owner
            by_loop.setdefault(ticket.loop, []).append((ticket, (number, event)))
        for loop, mail in by_loop.items():
            _post(loop, mail)

    def _fail(self, error: Exception) -> None:
        """A failed step ends every request with its error; the next ones find an empty engine."""
        tickets = {id(ticket): ticket for ticket, _ in self._tickets.values()}
        for ticket in tickets.values():
            self._drop(ticket)
            _post(ticket.loop, [(ticket, error)])


_NOTHING = object()


def _post(loop: asyncio.AbstractEventLoop, mail: list[tuple[Ticket, Delivery]]) -> None:
    def put() -> None:
        for ticket, delivery in mail:
            ticket.inbox.put_nowait(delivery)

    if not loop.is_closed():
        loop.call_soon_threadsafe(put)
