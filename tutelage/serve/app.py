"""The OpenAI-compatible server as an ASGI application. `listen.py` runs it on a port.

Everything in a request is honoured or refused with 400 and the parameter's name (`schema.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tutelage import __version__
from tutelage.engine.protocol import EngineProtocol
from tutelage.errors import MissingExtra

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response
    from starlette.exceptions import HTTPException

    from tutelage.serve.keys import KeyRing
    from tutelage.serve.middleware import Gate
    from tutelage.serve.responses.store import ResponseStore, tended
    from tutelage.serve.routes import embeddings, generation, models, operations, responses, tokens
    from tutelage.serve.schema import ApiError
    from tutelage.serve.state import ServerState
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "fastapi", "serve", "the server") from error

ROUTERS = [generation.router, responses.router, embeddings.router, models.router, tokens.router, operations.router]
MAX_BODY = 4 << 20
"""Bytes of a request."""


def create_app(
    engine: EngineProtocol, renderer: Any, name: str, *, api_keys: Sequence[str] = (), max_body: int = MAX_BODY,
    max_waiting: int = 256, store: ResponseStore | None = None, local_only: bool = False,
) -> FastAPI:  # fmt: skip
    """The application that serves `engine` as model `name`. The engine runs in a thread of its own from start-up to shutdown.

    api_keys: where given, every request must carry one as a Bearer token. store: keeps responses; closed with the application.
    local_only: requests must name this machine as their host (localhost, 127.0.0.1, [::1]), as `listen.serve` wants it
    without keys. For key files, several models, and models that come and go, see `build_app`.
    """
    state = ServerState(KeyRing(api_keys), max_waiting=max_waiting, store=store, local_only=local_only)
    state.models.add(name, engine, renderer)
    return build_app(state, max_body)


def build_app(state: ServerState, max_body: int = MAX_BODY) -> FastAPI:
    """The application over a server's state. max_body: bytes of a request at most."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with tended(state.store):
            state.models.open()
            yield
            await state.models.close()

    app = FastAPI(title="Tutelage", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = state
    app.add_middleware(Gate, keys=state.keys, max_body=max_body, local_only=state.local_only, metrics=state.metrics)
    for router in ROUTERS:
        app.include_router(router)
    _add_errors(app)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{error.detail}: {request.method} {request.url.path}"
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code, headers=error.headers)
