"""What every request passes first: an id, the API key and its scope, the size limit, the requests of its minute."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from tutelage.log import say
from tutelage.serve.keys import Holder, KeyRing
from tutelage.serve.limits import UNLIMITED
from tutelage.serve.metrics import Metrics
from tutelage.serve.schema import ApiError, server_error

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN = {"/health", "/ready", "/version"}  # whoever restarts or replaces a server has no key
SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Gate:
    """ASGI middleware. Plain ASGI, so that a client's leaving reaches the stream at once.

    Leaves in the request's state: `allowance`, what its key may still use; `owner`, whose is what the request makes (empty where
    no key is needed); `leaving`, an ExitStack that is closed when the request is over, whether it was answered, failed, or its
    client left before the first byte.
    """

    def __init__(self, app: Any, keys: KeyRing, max_body: int, local_only: bool, metrics: Metrics) -> None:
        self.app, self.keys, self.max_body, self.local_only, self.metrics = app, keys, max_body, local_only, metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = _request_id(headers)
        shared = scope.setdefault("state", {})
        shared["allowance"], shared["owner"] = UNLIMITED, ""
        started = False

        async def send_marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.metrics.count_reply(message["status"])
                limits = shared["allowance"].headers().items()
                message["headers"] = [
                    *message["headers"], (b"x-request-id", request_id), *((k.encode(), v.encode()) for k, v in limits)
                ]  # fmt: skip
            await send(message)

        with contextlib.ExitStack() as leaving:
            shared["leaving"] = leaving
            try:
                if self.local_only:
                    _check_local(headers)
                if (holder := self._identify(scope["path"], headers)) is not None:
                    shared["allowance"], shared["owner"] = holder.allowance, holder.owner
                self._check_size(headers)
                if scope["method"] == "POST":
                    shared["allowance"].take_request()
                await self.app(scope, self._counted(receive), send_marked)
            except ApiError as error:
                await _reply(error, send_marked)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt | SystemExit | asyncio.CancelledError | GeneratorExit):
                    raise
                # Exceptions, and panics of libraries in Rust, which are none.
                say(f"request {request_id.decode()} failed", style="red")
                if not started:
                    await _reply(server_error(), send_marked)
                if not isinstance(error, Exception):
                    raise RuntimeError(f"a library panicked: {error}") from error
                raise  # the server prints the traceback

    def _identify(self, path: str, headers: dict[bytes, bytes]) -> Holder | None:
        """The request's key; None where none is needed.

        Raises `ApiError`: 401 without a valid key, 403 for a key that is not for this.
        """
        scope = _scope(path)
        if scope is None or (not self.keys.closed and scope != "admin"):
            return None
        if not self.keys.closed:
            raise _forbidden("this server has no keys, so nobody may change it; start it with --keys FILE")
        holder = self.keys.find(headers.get(b"authorization", b""))
        if holder is None:
            raise ApiError(
                401, "a valid API key is needed", code="invalid_api_key", kind="authentication_error",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        if scope not in holder.key.scopes:
            raise _forbidden(f"this key does not have the scope {scope!r}")
        return holder

    def _check_size(self, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self.max_body} bytes", code="request_too_large")

    def _counted(self, receive: Receive) -> Receive:
        """`receive` that refuses a body which grows over the limit without having said so."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_body:
                raise self._too_large()
            return message

        return counted


def _scope(path: str) -> str | None:
    """What a key needs for a path; None for what is open to all. An unknown path needs a key like any other."""
    if path in OPEN:
        return None
    if path == "/metrics":
        return "metrics"
    return "admin" if path.split("/")[1:2] == ["admin"] else "inference"


def _check_local(headers: dict[bytes, bytes]) -> None:
    """Raises `ApiError` 403 for a request that was meant for another host, or comes from another site's page.

    A name of somebody else's that leads to this machine (DNS rebinding) makes any web page one of our own to its browser.
    """
    for name in (b"host", b"origin"):
        given = headers.get(name)
        if given is None:  # no browser
            continue
        text = given.decode("latin-1")
        if not _is_local(text if name == b"origin" else f"//{text}"):
            raise ApiError(
                403, f"{name.decode()}: {text[:200]!r} is not this machine; without keys a server answers requests to localhost, "
                "127.0.0.1 and [::1] only", code="host_not_allowed", kind="permission_error",
            )  # fmt: skip


def _is_local(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or host.endswith(".localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _request_id(headers: dict[bytes, bytes]) -> bytes:
    """The client's own id where it is one that can stand in a log, else a new one."""
    given = headers.get(b"x-request-id", b"")
    return given if SANE_ID.fullmatch(given) else uuid.uuid4().hex.encode()


def _forbidden(message: str) -> ApiError:
    return ApiError(403, message, code="insufficient_scope", kind="permission_error")


async def _reply(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
