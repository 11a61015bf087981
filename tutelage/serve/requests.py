"""Reading requests and telling what is wrong with them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from tutelage.engine.limits import ContextOverflow
from tutelage.errors import ConfigError, UserError
from tutelage.serve.schema import ApiError

T = TypeVar("T")

GONE = Response(status_code=499)
"""For a client that has left; nobody reads it."""


async def read_json(request: Request) -> Any:
    """The body. Raises `ApiError` 415 for another content type, 400 for broken JSON, 499 for one that ends in the middle."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A page of another site can send anything to this machine, but not JSON under its own name.
        raise ApiError(415, "the content type must be application/json")
    try:
        text = (await request.body()).decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_object)
        if "\\u" in text:  # half a surrogate pair is JSON, but no text: no tokenizer takes it
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except ClientDisconnect as error:
        raise ApiError(GONE.status_code, "the client left") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON ({error})") from error


@contextlib.contextmanager
def as_api_errors(param: str) -> Iterator[None]:
    """What a user can mend becomes a 400 that names the parameter."""
    try:
        yield
    except ContextOverflow as error:
        message = f"{error.message}: {error.found}, {error.expected}"
        raise ApiError(400, message, param=param, code="context_length_exceeded") from error
    except ConfigError as error:
        raise ApiError(400, str(error), param=error.field or param) from error
    except UserError as error:
        raise ApiError(400, str(error), param=param) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises `ValueError` for a key that comes twice: readers differ in which they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name[:100]!r} comes twice in one object")
    return found


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` gives; None when the client leaves before, which ends the work."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
