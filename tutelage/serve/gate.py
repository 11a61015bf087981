"""What every request passes first: an id, the size limit, the API key."""

from __future__ import annotations

import hmac
import json
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tutelage.serve.schema import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """ASGI middleware. Plain ASGI, so that a client's leaving reaches the stream at once."""

    def __init__(self, app: Any, api_keys: tuple[str, ...], max_body: int) -> None:
        self.app, self.max_body = app, max_body
        self.api_keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = uuid.uuid4().hex.encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        error = self._refusal(scope["path"], headers)
        if error is not None:
            await _reply(error, send_with_id)
            return
        await self.app(scope, self._counted(receive), send_with_id)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if path.startswith("/v1") and self.api_keys and not self._knows(headers.get(b"authorization", b"")):
            return ApiError(401, "a valid API key is needed", code="invalid_api_key", kind="authentication_error")
        length = headers.get(b"content-length", b"0")
        return self._too_large() if length.isdigit() and int(length) > self.max_body else None

    def _knows(self, header: bytes) -> bool:
        scheme, _, key = header.partition(b" ")
        # Every key is compared, in constant time: neither the time nor the order tells anything.
        same = [hmac.compare_digest(key.strip(), known) for known in self.api_keys]
        return scheme.lower() == b"bearer" and any(same)

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


async def _reply(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
