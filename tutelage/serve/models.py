"""The models of one server: each has a name, an engine in a thread of its own, and a renderer. They come and go while it runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tutelage.engine.protocol import EngineProtocol
from tutelage.engine.tool_calls import CallStyle
from tutelage.engine.tool_choice import call_style
from tutelage.serve.metrics import Metrics, ModelMeter
from tutelage.serve.schema import ApiError, unavailable
from tutelage.serve.stream import EngineThread

Loader = Callable[[Path], tuple[EngineProtocol, Any]]
"""From a model folder to an engine and its renderer; takes its time."""


class Served:
    """One model behind the API."""

    def __init__(self, name: str, engine: EngineProtocol, renderer: Any, metrics: Metrics) -> None:
        self.name, self.renderer, self.created = name, renderer, int(time.time())
        self.meter = ModelMeter(metrics, name)
        self.thread = EngineThread(engine, self.meter)
        self._style: CallStyle | None = None
        self._busy = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def engine(self) -> EngineProtocol:
        return self.thread.engine

    def call_style(self) -> CallStyle:
        """How the model writes tool calls. Raises `ConfigError` for one whose template has none."""
        if self._style is None:
            self._style = call_style(self.renderer)
        return self._style

    @property
    def card(self) -> dict[str, Any]:
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "tutelage",
            "max_model_len": self.engine.context_length,
        }  # fmt: skip

    @contextmanager
    def working(self) -> Iterator[None]:
        """A request that the model is not taken away from."""
        self._busy += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._busy -= 1
            if not self._busy:
                self._idle.set()

    async def idle(self) -> None:
        """Waits until no request is left."""
        await self._idle.wait()

    async def stop(self) -> None:
        self.thread.stop()
        await asyncio.to_thread(self.thread.join)


class Models:
    """Who is served under which name. Everything here runs on the event loop; only loading and joining do not."""

    def __init__(self, metrics: Metrics, loader: Loader | None = None) -> None:
        self.metrics, self._loader = metrics, loader
        self._served: dict[str, Served] = {}
        self._loading: set[str] = set()
        self._unloading: set[Served] = set()
        self._open = False
        metrics.watch(lambda: tuple(self._served.values()))

    def __iter__(self) -> Iterator[Served]:
        return iter(tuple(self._served.values()))

    def __len__(self) -> int:
        return len(self._served)

    def get(self, name: str) -> Served:
        """Raises `ApiError`: 404 for a name that nobody has, 503 for one that is loading."""
        if name in self._loading:
            raise unavailable(f"the model {name!r} is loading", "model_loading")
        if name not in self._served:
            known = ", ".join(repr(n) for n in self._served) or "none"
            raise ApiError(
                404, f"the model {name!r} does not exist; this server has {known}", param="model", code="model_not_found"
            )
        return self._served[name]

    def add(self, name: str, engine: EngineProtocol, renderer: Any) -> Served:
        """Serves an engine that is there already."""
        served = self._served[name] = Served(name, engine, renderer, self.metrics)
        if self._open:
            served.thread.start()
        return served

    async def load(self, name: str, folder: Path) -> Served:
        """Serves a model folder once it is read, which does not hold up other requests.

        Raises `ApiError` 409 for a name that is taken, `UserError` for a folder that is no model.
        """
        assert self._loader is not None, "this server was made to load nothing"
        if name in self._served or name in self._loading:
            raise ApiError(409, f"there is a model {name!r} already", param="name", code="model_exists")
        self._loading.add(name)
        try:
            engine, renderer = await asyncio.to_thread(self._loader, folder)
            return self.add(name, engine, renderer)
        finally:
            self._loading.discard(name)

    async def unload(self, name: str) -> None:
        """Takes no more requests for a model, waits for those that run, and frees its memory. Raises what `get` raises."""
        served = self.get(name)
        del self._served[name]
        self._unloading.add(served)
        await served.idle()
        await served.stop()
        self._unloading.discard(served)

    def open(self) -> None:
        """Starts the engines."""
        self._open = True
        for served in self:
            served.thread.start()

    async def idle(self) -> None:
        """Waits until no model has a request left."""
        for served in (*self, *self._unloading):
            await served.idle()

    async def close(self) -> None:
        """Stops the engines; requests that still run end with an error."""
        self._open = False
        stopping = [served.stop() for served in (*self, *self._unloading)]
        self._served.clear()
        await asyncio.gather(*stopping)
