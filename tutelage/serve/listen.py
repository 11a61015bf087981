"""Listens on a port: loads the models, says when it is ready, and on SIGTERM finishes what runs before it ends."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from tutelage.errors import ConfigError, MissingExtra
from tutelage.log import say
from tutelage.serve.app import build_app
from tutelage.serve.connections import Bounds, fitting, protocol, quiet
from tutelage.serve.engines import check_engine, open_engine
from tutelage.serve.keys import KeyRing
from tutelage.serve.options import Options
from tutelage.serve.registry import Adapted, Served
from tutelage.serve.responses.store import ResponseStore
from tutelage.serve.state import ServerState

try:
    import uvicorn
except ImportError as error:
    raise MissingExtra("uvicorn", "serve", "the server") from error


GRACE_SECONDS = 1
"""How long uvicorn waits for connections after the drain, which has waited for their answers already."""


def serve(models: Mapping[str, Path], options: Options, adapters: Mapping[str, Path] | None = None) -> None:
    """Serves model folders by name until it is stopped: SIGTERM drains, Ctrl-C does not wait. `adapters` are of the first model.

    Raises `ConfigError` for a host beyond this machine without keys and for what the engine does not have, `ArtifactError` for a
    folder that is no model, `StorageError` for a store that cannot be used.
    """
    check_binding(options)
    check_port(options)
    check_folders(options)
    check_engine(options, len(models), len(adapters or ()))
    state = ServerState(
        KeyRing(options.api_keys, options.keys), max_waiting=options.max_waiting, allowed=options.allow_models,
        loader=lambda folder: open_engine(folder, options),
        load_seconds=options.load_seconds, local_only=not (options.api_keys or options.keys or options.insecure),
        store=None if options.store is None else ResponseStore(options.store, options.store_days),
    )  # fmt: skip
    most, backlog = fitting(options.max_connections)
    bounds = Bounds(most, options.request_seconds)
    config = uvicorn.Config(
        build_app(state, options.max_body), host=options.host, port=options.port, log_level="warning", backlog=backlog,
        http=protocol(bounds), ws="none", timeout_graceful_shutdown=GRACE_SECONDS,
    )  # fmt: skip
    listener = Listener(config, state, models, adapters or {}, options.drain_seconds, bounds)
    with contextlib.suppress(KeyboardInterrupt):
        listener.run()
    if listener.failure is not None:
        raise listener.failure


def check_binding(options: Options) -> None:
    """Raises `ConfigError` when others could reach the server and nothing would stop them."""
    try:
        local = options.host == "localhost" or ipaddress.ip_address(options.host).is_loopback
    except ValueError:
        local = False
    if not (local or options.api_keys or options.keys or options.insecure):
        raise ConfigError(
            "others could use this server: it would listen beyond this machine without an API key", field="host",
            found=options.host, expected="a loopback address, or keys",
            fix="give --keys FILE or --api-key KEY, or --insecure if the network is trusted",
        )  # fmt: skip


def check_folders(options: Options) -> None:
    """Raises `ConfigError` for a folder of --allow-models that is not there."""
    for folder in options.allow_models:
        if not folder.is_dir():
            raise ConfigError("no such folder", field="allow_models", found=str(folder), fix="make it, or check the path")


def check_port(options: Options) -> None:
    """Raises `ConfigError` for a port that cannot be had, before a model is loaded."""
    try:
        if not 0 <= options.port <= 65535:
            raise OverflowError("ports go from 0 to 65535")
        for family, kind, protocol, _, address in socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"the server cannot listen there ({error})", field="port", found=f"{options.host}:{options.port}",
            fix="choose another with --port, 0 for any free one",
        ) from error  # fmt: skip


class Listener(uvicorn.Server):
    """Listens first and loads then, so that /health and /ready answer meanwhile."""

    def __init__(
        self, config: uvicorn.Config, state: ServerState, models: Mapping[str, Path], adapters: Mapping[str, Path],
        drain_seconds: float, bounds: Bounds,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self.bounds = bounds
        self.state, self.models, self.adapters, self.drain_seconds = state, models, adapters, drain_seconds
        self.failure: Exception | None = None  # of loading; ends the server
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        state.starting = True

    async def startup(self, sockets: Any = None) -> None:
        # Begun before the port is open: nobody is told that a model does not exist which only is not there yet.
        self._loop = asyncio.get_running_loop()
        quiet(self._loop, self.bounds)
        loading = asyncio.ensure_future(self._load())
        try:
            await super().startup(sockets)
        except SystemExit:  # another program took the port since it was checked
            loading.cancel()
            self.failure = ConfigError(
                "the server cannot listen there: another program has taken the port", field="port",
                found=f"{self.config.host}:{self.config.port}", fix="choose another with --port, 0 for any free one",
            )  # fmt: skip
            self.should_exit = self.started = True
            self.servers = []
            return
        self._tasks.add(asyncio.create_task(self._announce(loading)))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first SIGTERM drains; a second one, and Ctrl-C, end the server at once."""
        if sig == signal.SIGTERM and self._loop is not None and not self.state.draining:
            self.state.draining = True
            self._loop.call_soon_threadsafe(lambda: self._tasks.add(asyncio.create_task(self._drain())))
        else:
            super().handle_exit(sig, frame)

    async def _load(self) -> list[Served]:
        served = await asyncio.gather(*(self.state.models.load(name, path) for name, path in self.models.items()))
        for name, path in self.adapters.items():
            served.append(await self.state.models.adapt(name, path, served[0].name))
        return served

    async def _announce(self, loading: asyncio.Future[list[Served]]) -> None:
        try:
            for served in await loading:
                worn = f", {served.base.name} with an adapter" if isinstance(served, Adapted) else ""
                say(f"serving {served.name} ({served.engine.context_length} tokens of context{worn}) at {self._url()}/v1")
            self.state.starting = False
        except Exception as error:
            self.failure, self.should_exit = error, True

    def _url(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def _drain(self) -> None:
        say(f"finishing what runs, for at most {self.drain_seconds:g} s; no new requests are taken")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.drain_seconds):
                await self.state.models.idle()
        await self.state.models.close()
        self.should_exit = True
