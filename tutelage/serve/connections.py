"""Connections of a server: how many there may be, and how long each may take to say what it wants."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import time
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from tutelage.log import say

BACKLOG = 128
"""Connections that the system keeps waiting: asyncio accepts so many at a time before it closes any."""
SPARE_FILES = 64  # open files beside connections: models, a store, processes that try grammars
SILENCE = 60.0  # seconds for which a warning of the same kind is not repeated
NO_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Bounds:
    """What one server allows. `refused` connections are said once a minute."""

    def __init__(self, most: int, request_seconds: float) -> None:
        self.most, self.request_seconds = most, request_seconds
        self._said: dict[str, float] = {}

    def warn(self, message: str) -> None:
        now = time.monotonic()
        if now - self._said.get(message, -SILENCE) >= SILENCE:
            self._said[message] = now
            say(f"{message} (said once a minute)", style="red")


def fitting(wanted: int) -> tuple[int, int]:
    """Connections and backlog that the limit of open files has room for."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return wanted, BACKLOG
    room = max(16, limit - _open_files() - SPARE_FILES)
    most = max(8, min(wanted, room * 3 // 4))
    return most, max(4, min(BACKLOG, room - most))


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 32


def protocol(bounds: Bounds) -> type[asyncio.Protocol]:
    """uvicorn's own protocol, bounded."""

    class Bounded(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > bounds.most:
                bounds.warn(f"more than {bounds.most} connections; new ones get 503")
                self._refuse(503, "Service Unavailable", "too many connections", "retry-after: 1\r\n")
                return
            self._wait()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            if self._incomplete():
                self._wait()
            else:
                self._done()

        def connection_lost(self, exc: Exception | None) -> None:
            self._done()
            super().connection_lost(exc)

        def _incomplete(self) -> bool:
            """Whether more of a request has to come before it can be answered."""
            return self.cycle is None or self.cycle.more_body or self.cycle.response_complete

        def _wait(self) -> None:
            if self._timer is None and not self.transport.is_closing():
                self._timer = self.loop.call_later(bounds.request_seconds, self._late)

        def _done(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _late(self) -> None:
            self._timer = None
            if self.transport.is_closing():
                return
            if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
                self.transport.close()
                return
            self._refuse(408, "Request Timeout", f"the request did not come within {bounds.request_seconds:g} s")

        def _refuse(self, status: int, phrase: str, message: str, more: str = "") -> None:
            body = f'{{"error": {{"message": "{message}", "type": "server_busy", "param": null, "code": "connection"}}}}'
            self.transport.write(
                f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{more}"
                f"connection: close\r\n\r\n{body}".encode()
            )
            self.transport.close()

    return Bounded


def quiet(loop: asyncio.AbstractEventLoop, bounds: Bounds) -> None:
    """Says once a minute, without a traceback, that no connection can be accepted: asyncio says it at every try."""

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in NO_RESOURCES and "accept" in str(context.get("message", "")):
            bounds.warn(f"no connection can be accepted: {os.strerror(error.errno)}")
            return
        loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
