"""The models of one server: each has a name, an engine in a thread of its own, and a renderer. They come and go while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tutelage.chat.render import Renderer
from tutelage.chat.tool_calls import CallStyle
from tutelage.engine.protocol import EngineProtocol
from tutelage.engine.text_limit import TextLimit
from tutelage.serve.engine_thread import EngineThread
from tutelage.serve.metrics import Metrics, ModelMeter
from tutelage.serve.schema import ApiError, unavailable
from tutelage.structured.tool_choice import call_style

T = TypeVar("T")
Loader = Callable[[Path], tuple[EngineProtocol, Any]]
"""From a model folder to an engine and its renderer; takes its time."""


class Served:
    """One name behind the API: a model, or one with an adapter (`Adapted`)."""

    def __init__(self, name: str, renderer: Any, meter: ModelMeter, thread: EngineThread, adapter: Any = None) -> None:
        self.name, self.renderer, self.created, self.meter = name, renderer, int(time.time()), meter
        self.thread, self.adapter = thread, adapter  # the adapter is None for a model by itself
        self._limit: TextLimit | None = None
        self._style: CallStyle | None = None
        self._busy = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def engine(self) -> EngineProtocol:
        return self.thread.engine

    @property
    def limit(self) -> TextLimit:
        """How long a text may be to be tokenized at all."""
        if self._limit is None:
            self._limit = TextLimit(self.renderer.tokenizer, self.engine.vocabulary, self.engine.context_length)
        return self._limit

    def encode(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a text to continue. Raises `ContextOverflow` for one that cannot fit, before it is tokenized."""
        if isinstance(prompt, str):
            self.limit.check(prompt)
        return self.engine.encode(prompt)

    @property
    def turns_renderer(self) -> Renderer:
        """The renderer of conversations, which refuses what cannot fit before it is tokenized."""
        found: Renderer = self.renderer.checked(self.limit.check)
        return found

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
        """Ends what belongs to this name alone."""


class Base(Served):
    """A model with an engine of its own."""

    def __init__(self, name: str, engine: EngineProtocol, renderer: Any, metrics: Metrics) -> None:
        meter = ModelMeter(metrics, name)
        super().__init__(name, renderer, meter, EngineThread(engine, meter))

    async def stop(self) -> None:
        self.thread.stop()
        await asyncio.to_thread(self.thread.join)


class Adapted(Served):
    """A model with an adapter. It answers in its base's batch and counts as its base, as vLLM's metrics have it."""

    def __init__(self, name: str, base: Base, adapter: Any, renderer: Any) -> None:
        super().__init__(name, renderer, base.meter, base.thread, adapter)
        self.base = base

    @property
    def card(self) -> dict[str, Any]:
        return super().card | {"parent": self.base.name}

    @contextmanager
    def working(self) -> Iterator[None]:
        with super().working(), self.base.working():
            yield

    async def stop(self) -> None:
        with contextlib.suppress(ApiError):  # the base has stopped, and everything with it
            await asyncio.wrap_future(self.thread.call(lambda engine: engine.forget(self.adapter)))


class Models:
    """Who is served under which name. Everything here runs on the event loop; only loading and joining do not."""

    def __init__(self, metrics: Metrics, loader: Loader | None = None) -> None:
        self.metrics, self._loader = metrics, loader
        self._served: dict[str, Served] = {}
        self._loading: set[str] = set()
        self._unloading: set[Served] = set()
        self._open = False
        metrics.watch(lambda: tuple(s for s in self._served.values() if isinstance(s, Base)))

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
        served = self._served[name] = Base(name, engine, renderer, self.metrics)
        if self._open:
            served.thread.start()
        return served

    async def load(self, name: str, folder: Path, wait: float | None = None) -> Served:
        """Serves a model folder once it is read, which does not hold up other requests. wait: seconds at most.

        Raises `ApiError` 503 after that time, `ApiError` 409 for a name that is taken, `UserError` for a folder that is no model.
        """
        loader = self._loader
        assert loader is not None, "this server was made to load nothing"
        with self._naming(name):
            engine, renderer = await _loaded(lambda: loader(folder), wait)
            return self.add(name, engine, renderer)

    async def adapt(self, name: str, folder: Path, base: str, wait: float | None = None) -> Served:
        """Serves model `base` with the adapter in a folder, under a name of its own. Where the folder has a tokenizer too, its
        template is used.

        Raises what `load` and `get` raise, and `UserError` for an adapter that does not fit.
        """
        own = self.get(base)
        if not isinstance(own, Base):
            raise ApiError(400, f"{base!r} is an adapter itself", param="base")
        with self._naming(name), own.working():
            lora, renderer = await _loaded(lambda: _read_adapter(own, folder), wait)
            served = self._served[name] = Adapted(name, own, lora, renderer)
            return served

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        if name in self._served or name in self._loading:
            raise ApiError(409, f"there is a model {name!r} already", param="name", code="model_exists")
        self._loading.add(name)
        try:
            yield
        finally:
            self._loading.discard(name)

    async def unload(self, name: str) -> None:
        """Takes no more requests for a model, waits for those that run, and frees its memory. Raises what `get` raises, and
        `ApiError` 409 for one that adapters still need."""
        served = self.get(name)
        worn = [s.name for s in self if isinstance(s, Adapted) and s.base is served]
        if worn:
            raise ApiError(409, f"adapters of this model are served: {', '.join(worn)}", param="name", code="model_in_use")
        del self._served[name]
        self._unloading.add(served)
        await served.idle()
        await served.stop()
        self._unloading.discard(served)

    def open(self) -> None:
        """Starts the engines."""
        self._open = True
        for served in self:
            if isinstance(served, Base):
                served.thread.start()

    async def idle(self) -> None:
        """Waits until no model has a request left."""
        for served in (*self, *self._unloading):
            await served.idle()

    async def close(self) -> None:
        """Stops the engines; requests that still run end with an error."""
        self._open = False
        stopping = [served.stop() for served in (*self, *self._unloading) if isinstance(served, Base)]
        self._served.clear()
        await asyncio.gather(*stopping)


async def _loaded(function: Callable[[], T], wait: float | None) -> T:
    """What `function` reads, in a thread that ends with the process: a folder on a disk that hangs keeps nothing else waiting,
    and the server still ends. Raises `ApiError` 503 after `wait` seconds; what comes after that is thrown away."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            result = function()
        except BaseException as error:
            with contextlib.suppress(InvalidStateError):
                future.set_exception(error)
        else:
            with contextlib.suppress(InvalidStateError):
                future.set_result(result)

    threading.Thread(target=work, name="loading", daemon=True).start()
    try:
        async with asyncio.timeout(wait):
            return await asyncio.wrap_future(future)
    except TimeoutError as error:
        raise unavailable(f"the model was not loaded within {wait:g} s", "loading_timed_out") from error


def _read_adapter(base: Base, folder: Path) -> tuple[Any, Any]:
    """An adapter, and the renderer for it."""
    lora = base.engine.adapter(folder)
    if not (folder / "tokenizer.json").is_file():
        return lora, base.renderer
    renderer = Renderer(folder)
    base.renderer.tokenizer.check_same(renderer.tokenizer)
    return lora, renderer
