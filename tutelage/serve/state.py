"""What all requests of one server share, and what lets them in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastapi import Request

from tutelage.serve.keys import KeyRing
from tutelage.serve.limits import Allowance
from tutelage.serve.metrics import Metrics
from tutelage.serve.registry import Loader, Models, Served
from tutelage.serve.responses.store import ResponseStore
from tutelage.serve.schema import ApiError, unavailable

Status = Literal["ready", "loading", "draining", "no model"]


class ServerState:
    """The state of one server.

    keys: who may do what. max_waiting: no request is let in while so many jobs of its model wait for their turn.
    allowed: folders that models may be loaded from. loader: loads them; None where the server never loads. store: keeps
    responses; None where nothing is kept. local_only: requests must name this machine as their host.
    load_seconds: how long a request to load a model waits for it.
    """

    def __init__(
        self, keys: KeyRing, *, max_waiting: int = 256, allowed: Sequence[Path] = (), loader: Loader | None = None,
        store: ResponseStore | None = None, local_only: bool = False, load_seconds: float = 600.0,
    ) -> None:  # fmt: skip
        self.local_only, self.load_seconds = local_only, load_seconds
        self.keys, self.max_waiting, self.store = keys, max_waiting, store
        self.allowed = [folder.resolve() for folder in allowed]
        self.metrics = Metrics()
        self.models = Models(self.metrics, loader)
        self.starting = False  # listens, but has not loaded its first models yet
        self.draining = False  # finishes what runs, takes nothing new

    @property
    def status(self) -> Status:
        if self.draining:
            return "draining"
        if self.starting:
            return "loading"
        return "ready" if len(self.models) else "no model"

    def refuse_draining(self) -> None:
        """Raises `ApiError` 503 while the server shuts down."""
        if self.draining:
            raise unavailable("the server is shutting down", "shutting_down")

    def admit(self, request: Request, name: str) -> Served:
        """The model that a request asks to work for it; it stays until the request is over, however that ends.

        Raises `ApiError`: 503 while draining or loading, 404 for an unknown model, 429 when too many wait already.
        """
        self.refuse_draining()
        served = self.models.get(name)
        check_queue(served, self.max_waiting, 1)
        request.state.leaving.enter_context(served.working())
        return served


def check_queue(served: Served, most: int, answers: int) -> None:
    """Raises `ApiError` 429 where so many more answers would wait that there were more than `most`. Where none wait, a request of
    any number is taken: it would never fit otherwise."""
    waiting = served.thread.waiting
    if waiting and waiting + answers > most:
        raise ApiError(
            429, f"{waiting} answers wait already", code="queue_full", kind="server_busy", headers={"retry-after": "5"}
        )


def state_of(request: Request) -> ServerState:
    found: ServerState = request.app.state.server
    return found


def allowance_of(request: Request) -> Allowance:
    found: Allowance = request.state.allowance
    return found


def owner_of(request: Request) -> str:
    found: str = request.state.owner
    return found
