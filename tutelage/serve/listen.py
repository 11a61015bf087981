"""Listens on a port: loads the models, says when it is ready, and on SIGTERM finishes what runs before it ends."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import secrets
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tutelage.engine import Engine
from tutelage.errors import ConfigError, MissingExtra
from tutelage.log import say
from tutelage.serve.app import MAX_BODY, build_app
from tutelage.serve.keys import KeyRing
from tutelage.serve.models import Served
from tutelage.serve.responses.store import ResponseStore
from tutelage.serve.state import ServerState

try:
    import uvicorn
except ImportError as error:
    raise MissingExtra("uvicorn", "serve", "the server") from error


@dataclass(slots=True, frozen=True, kw_only=True)
class Options:
    """How a server listens and what it lets in."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    insecure: bool = False  # listen beyond this machine without keys
    api_keys: tuple[str, ...] = ()  # unlimited keys for inference
    keys: Path | None = None  # a file of `tutelage keys`
    allow_models: tuple[Path, ...] = ()  # folders that POST /admin/models may load from
    max_waiting: int = 256  # answers of one model that may wait; more are refused with 429
    max_body: int = MAX_BODY  # bytes of a request
    drain_seconds: float = 30.0  # how long answers may go on after SIGTERM
    slots: int = 16  # answers of one model that run at a time
    max_length: int | None = None  # tokens of prompt and answer; the model's context where None
    device: str = "cpu"
    dtype: str = "float32"  # of the weights: float32, or int8 through our kernels
    prefix_cache: bool = True  # prompts start from what they have in common with earlier ones
    speculate: int = 0  # guesses at the next tokens that are checked per step
    draft: Path | None = None  # a smaller model with the same tokens, which makes the guesses
    batch_invariant: bool = False  # bitwise equal answers whatever else runs
    store: Path | None = None  # a file that keeps responses; made where there is none
    store_days: int = 30  # how long a response is kept after it was made or last continued


def serve(models: Mapping[str, Path], options: Options, adapters: Mapping[str, Path] | None = None) -> None:
    """Serves model folders by name until it is stopped: SIGTERM drains, Ctrl-C does not wait. `adapters` are of the first model.

    Raises `ConfigError` for a host beyond this machine without keys, `ArtifactError` for a folder that is no model,
    `StorageError` for a store that cannot be used.
    """
    check_binding(options)
    check_port(options)
    state = ServerState(
        KeyRing(options.api_keys, options.keys), max_waiting=options.max_waiting, allowed=options.allow_models,
        loader=lambda folder: open_engine(folder, options),
        store=None if options.store is None else ResponseStore(options.store, options.store_days),
    )  # fmt: skip
    config = uvicorn.Config(
        build_app(state, options.max_body), host=options.host, port=options.port, log_level="warning",
        timeout_graceful_shutdown=5,
    )  # fmt: skip
    listener = Listener(config, state, models, adapters or {}, options.drain_seconds)
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


def open_engine(folder: Path, options: Options) -> tuple[Engine, Any]:
    """The engine of a model folder, and its renderer. Raises `ArtifactError` for a folder that is no model, or a draft whose
    tokens are others."""
    from tutelage.data.render import Renderer
    from tutelage.models.load import load

    renderer, draft = Renderer(folder), None
    if options.draft is not None:
        renderer.tokenizer.check_same(Renderer(options.draft).tokenizer)
        draft = load(options.draft, device=options.device)
    engine = Engine(
        load(folder, device=options.device), renderer, options.slots, options.max_length, seed=secrets.randbits(31),
        dtype=options.dtype, prefix_cache=options.prefix_cache, speculate=options.speculate, draft=draft,
        batch_invariant=options.batch_invariant,
    )  # fmt: skip
    return engine, renderer


class Listener(uvicorn.Server):
    """Listens first and loads then, so that /health and /ready answer meanwhile."""

    def __init__(
        self, config: uvicorn.Config, state: ServerState, models: Mapping[str, Path], adapters: Mapping[str, Path],
        drain_seconds: float,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self.state, self.models, self.adapters, self.drain_seconds = state, models, adapters, drain_seconds
        self.failure: Exception | None = None  # of loading; ends the server
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        state.starting = True

    async def startup(self, sockets: Any = None) -> None:
        # Begun before the port is open: nobody is told that a model does not exist which only is not there yet.
        loading = asyncio.ensure_future(self._load())
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
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
                say(f"serving {served.name} ({served.engine.context_length} tokens of context) at {self._url()}/v1")
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
