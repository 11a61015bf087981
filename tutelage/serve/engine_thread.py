"""The bridge between the server's event loop and the engine's own thread, where all requests run in one batch."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from tutelage.engine import Event, Sampling, Sequence
from tutelage.engine.protocol import EngineProtocol
from tutelage.serve.schema import ApiError, unavailable

T = TypeVar("T")
Delivery = tuple[int, Event] | Exception

GROUP_TOKENS = 4096
"""Tokens, padding included, that are embedded or scored between two steps of generation."""
PACE = 0.02
"""Seconds between two events of a request. A small model makes a token in less, and chunks would cost more than tokens."""
Grouped = Callable[[EngineProtocol, list[list[int]], Any], list[T]]
"""From an engine, some prompts and an adapter to a result for each prompt."""


class Meter:
    """Is told what happens to answers, by any thread. This one keeps nothing. Times in seconds."""

    def started(self, waited: float) -> None:
        """An answer left the queue."""

    def first_token(self, since_asked: float, prompt_tokens: int) -> None: ...

    def next_token(self, since_last: float) -> None: ...

    def generated(self, tokens: int) -> None: ...

    def embedded(self, waited: float, since_asked: float, prompt_tokens: int) -> None:
        """A text became a vector: it left the queue after `waited`, and was ready after `since_asked`."""

    def scored(self, prompt_tokens: int) -> None:
        """A prompt was read for its log-probabilities alone."""

    def finished(self, reason: str, since_asked: float) -> None:
        """reason: stop, length, abort (the client left) or error."""


class PendingResponse:
    """The answers to one request, while they come. The engine's thread posts, the loop reads.

    The loop is woken only where it listens: while it pauses between two events, what comes is left for it to find.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.sequences: list[Sequence] = []
        self._inbox: deque[Delivery] = deque()
        self._bell = asyncio.Event()
        self._listening = False

    def post(self, delivery: Delivery) -> bool:
        """Leaves something for the loop; True where it has to be woken."""
        self._inbox.append(delivery)
        return self._listening or isinstance(delivery, Exception) or delivery[1].finish_reason is not None

    def wake(self) -> None:
        """Called on the loop."""
        self._bell.set()

    async def events(self, whole: bool = False) -> AsyncIterator[tuple[int, Event]]:
        """(number of the answer, event) until all are finished. Those that come faster than PACE are merged; the first and the
        last do not wait. With `whole`, only ends are waited for. Raises what stopped the engine."""
        left, pause = len(self.sequences), None if whole else 0.0
        while left:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(pause):
                    await self._bell.wait()
            self._listening = True
            while not self._inbox:
                await self._bell.wait()
                self._bell.clear()
            self._listening = False
            self._bell.clear()
            inbox = [self._inbox.popleft() for _ in range(len(self._inbox))]
            for number, event in _merged(inbox):
                left -= event.finish_reason is not None
                yield number, event
            if isinstance(inbox[-1], Exception):
                raise inbox[-1]
            pause = None if whole else self.loop.time() + PACE


def _merged(inbox: list[Delivery]) -> list[tuple[int, Event]]:
    """One event for each answer."""
    found: dict[int, Event] = {}
    for delivery in inbox:
        if not isinstance(delivery, Exception):
            number, event = delivery
            found[number] = found[number] + event if number in found else event
    return list(found.items())


@dataclass(slots=True)
class _Answer:
    """A sequence that is not finished: whose it is, and when things happened to it."""

    response: PendingResponse
    number: int  # which answer of the response
    asked: float
    last: float | None = None  # when the last token came


class EngineThread:
    """Runs an engine in a background thread. Every other thread talks to it through `call`, `submit`, `grouped` and `cancel`."""

    def __init__(self, engine: EngineProtocol, meter: Meter | None = None) -> None:
        self.engine, self.meter = engine, meter or Meter()
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._answers: dict[int, _Answer] = {}  # by id of the sequence
        self._queued: set[int] = set()  # ids of those that no step has taken up yet
        self._ordered = 0  # jobs that the thread has not come to yet
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        self.engine.start()
        self._thread.start()

    def stop(self) -> None:
        """Ends what still runs with an error, and then the thread. Returns at once; to be called where `call` is called."""
        self._stopped = True
        self._orders.put(lambda: self._fail(_stopping()))
        self._orders.put(None)

    def join(self) -> None:
        """Waits for the end of a stopped thread."""
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Jobs that wait their turn: answers without a place in the batch, prompts to embed or to score."""
        return self._ordered + len(self.engine.waiting)

    @property
    def running(self) -> int:
        """Answers in the batch."""
        return max(0, len(self._answers) - len(self.engine.waiting))

    def call(self, function: Callable[[EngineProtocol], T]) -> Future[T]:
        """Runs `function` in the engine's thread between two steps. Raises `ApiError` 503 after `stop`."""
        if self._stopped:
            raise _stopping()
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

    async def submit(
        self, wanted: list[tuple[list[int], Sampling, int]], owner: str = "", adapter: Any = None
    ) -> PendingResponse:
        """Queues answers: (prompt ids, sampling, which of n), for one owner and with one adapter. All or none:
        an error leaves nothing behind."""
        response = PendingResponse(asyncio.get_running_loop())
        asked = time.monotonic()

        def order(engine: EngineProtocol) -> None:
            try:
                for number, (ids, sampling, index) in enumerate(wanted):
                    sequence = engine.submit(ids, sampling, index, adapter, owner)
                    response.sequences.append(sequence)
                    self._answers[id(sequence)] = _Answer(response, number, asked)
                    self._queued.add(id(sequence))
            except Exception:
                self._drop(response, None)
                raise

        with self._counted(len(wanted)):
            future = self.call(order)
            try:
                await asyncio.wrap_future(future)
            except asyncio.CancelledError:
                self.cancel(response)
                raise
        return response

    async def grouped(
        self, prompts: list[list[int]], function: Grouped[T], tokens: int = GROUP_TOKENS, adapter: Any = None
    ) -> list[T]:
        """`function` of all prompts, results in their order, with one adapter. They are handed over in groups of similar length,
        one group between two steps, so that running answers wait for one group at most."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        out: dict[int, T] = {}
        with self._counted(1):
            while order:
                count = max(1, tokens // len(prompts[order[0]]))
                group, order = order[:count], order[count:]
                texts = [prompts[i] for i in group]
                made = await asyncio.wrap_future(self.call(lambda engine, texts=texts: function(engine, texts, adapter)))  # type: ignore[misc]
                out.update(zip(group, made, strict=True))
        return [out[i] for i in range(len(prompts))]

    @contextmanager
    def _counted(self, jobs: int) -> Iterator[None]:
        self._ordered += jobs
        try:
            yield
        finally:
            self._ordered -= jobs

    def cancel(self, response: PendingResponse) -> None:
        """Ends what still runs of a request and frees its slots. Returns at once."""
        self._orders.put(lambda: self._drop(response, "abort"))

    def _drop(self, response: PendingResponse, reason: str | None) -> None:
        for sequence in response.sequences:
            answer = self._answers.pop(id(sequence), None)
            self._queued.discard(id(sequence))
            if answer is not None and reason is not None:
                self.meter.finished(reason, time.monotonic() - answer.asked)
            self.engine.cancel(sequence)

    def _work(self) -> None:
        while True:
            # Orders that come meanwhile wait for a step: no stream of them can hold up the answers that run.
            for _ in range(max(self._orders.qsize(), int(self.engine.idle))):
                if not self._follow():
                    self.engine.close()
                    return
            if not self.engine.idle:
                self._step()

    def _follow(self) -> bool:
        """Carries out the next order; False at the end. Not in the loop, whose name for it would keep the last request alive."""
        order = self._orders.get()
        if order is not None:
            order()
        return order is not None

    def _step(self) -> None:
        try:
            began = time.monotonic()
            events = self.engine.step()
            self._note_started(began)
            self._deliver(events)
        except Exception as error:
            self._fail(error)

    def _note_started(self, began: float) -> None:
        """Finds out which answers the step that began then took out of the queue."""
        if not self._queued:
            return
        waiting = {id(sequence) for sequence in self.engine.waiting}
        for taken in self._queued - waiting:
            self.meter.started(began - self._answers[taken].asked)
        self._queued &= waiting

    def _deliver(self, events: list[Event]) -> None:
        """Hands a step's events over, with one wake-up a loop."""
        woken: dict[asyncio.AbstractEventLoop, list[PendingResponse]] = {}
        now = time.monotonic()
        for event in events:
            answer = self._answers.get(id(event.sequence))
            if answer is None:
                continue
            self._measure(answer, event, now)
            if event.finish_reason is not None:
                del self._answers[id(event.sequence)]
            if answer.response.post((answer.number, event)):
                woken.setdefault(answer.response.loop, []).append(answer.response)
        for loop, responses in woken.items():
            _wake(loop, responses)

    def _measure(self, answer: _Answer, event: Event, now: float) -> None:
        if answer.last is None:
            # A prompt counts once, with the first of its n answers, as `usage` has it.
            self.meter.first_token(now - answer.asked, event.sequence.prompt_length if event.sequence.index == 0 else 0)
        else:
            self.meter.next_token(now - answer.last)
        answer.last = now
        self.meter.generated(len(event.ids))
        if event.finish_reason is not None:
            self.meter.finished(event.finish_reason, now - answer.asked)

    def _fail(self, error: Exception) -> None:
        """A failed step ends every request with its error; the next ones find an empty engine."""
        responses = {id(answer.response): answer.response for answer in self._answers.values()}
        for response in responses.values():
            self._drop(response, "error")
            response.post(error)
            _wake(response.loop, [response])


def _stopping() -> ApiError:
    return unavailable("the server stopped before the answer was finished", "shutting_down")


def _wake(loop: asyncio.AbstractEventLoop, responses: list[PendingResponse]) -> None:
    def ring() -> None:
        for response in responses:
            response.wake()

    if not loop.is_closed():
        loop.call_soon_threadsafe(ring)
