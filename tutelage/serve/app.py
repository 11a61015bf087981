"""The OpenAI-compatible server: models, chat completions, text completions.

Everything in a request is honoured or refused with 400 and the parameter's name (`schema.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from tutelage import __version__
from tutelage.engine import Engine, Sampling, TokenScore
from tutelage.engine.engine import ContextOverflow
from tutelage.errors import ConfigError, MissingExtra, UserError
from tutelage.serve.gate import Gate
from tutelage.serve.replies import LegacyLogprobs, Reply, chat_logprobs, sse, usage
from tutelage.serve.schema import ApiError, ChatRequest, CompletionRequest, parse
from tutelage.serve.stream import EngineThread, Ticket

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise MissingExtra("fastapi", "serve", "the server") from error


def create_app(engine: Engine, renderer: Any, name: str, *, api_keys: Sequence[str] = (), max_body: int = 4 << 20) -> FastAPI:
    """The application that serves `engine` as model `name`. The engine runs in a thread of its own from start-up to shutdown.

    api_keys: where given, every request under /v1 must carry one as a Bearer token. max_body: bytes of a request at most.
    """
    thread = EngineThread(engine)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        thread.start()
        yield
        await asyncio.to_thread(thread.stop)

    app = FastAPI(title="Tutelage", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, api_keys=tuple(api_keys), max_body=max_body)
    _add_errors(app)
    _add_facts(app, name, int(time.time()), engine.context_length)
    service = Service(thread, renderer, name)
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", service.complete, methods=["POST"], response_model=None)
    return app


def _add_facts(app: FastAPI, name: str, created: int, context: int) -> None:
    card = {"id": name, "object": "model", "created": created, "owned_by": "tutelage", "max_model_len": context}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        _check_model(model, name)
        return card

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return JSONResponse(ApiError(error.status_code, str(error.detail)).body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> Response:
        return JSONResponse(_server_error().body, 500)


def _server_error() -> ApiError:
    return ApiError(500, "the server failed on this request; its log says why", kind="server_error")


def _check_model(asked: str, name: str) -> None:
    if asked != name:
        raise ApiError(
            404, f"the model {asked!r} does not exist; this server has {name!r}", param="model", code="model_not_found"
        )


@contextlib.contextmanager
def _as_api_errors(param: str) -> Any:
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


class Service:
    """The two endpoints that generate."""

    def __init__(self, thread: EngineThread, renderer: Any, name: str) -> None:
        self.thread, self.renderer, self.name = thread, renderer, name
        self.engine = thread.engine

    async def chat(self, request: Request) -> Response:
        asked: ChatRequest = parse(ChatRequest, await _json(request))
        _check_model(asked.model, self.name)
        asked.refuse_unsupported()
        sampling = asked.sampling(self.engine.vocab_size)
        turns = asked.turns()
        with _as_api_errors("messages"):
            ids = await asyncio.to_thread(self.renderer.prompt, turns)
        job = Job(self, Reply("chat.completion", self.name), [ids], sampling)
        return await job.answer(request, asked, "messages")

    async def complete(self, request: Request) -> Response:
        asked: CompletionRequest = parse(CompletionRequest, await _json(request))
        _check_model(asked.model, self.name)
        sampling = asked.sampling(self.engine.vocab_size)
        prompts = asked.prompts()
        with _as_api_errors("prompt"):
            ids = [self.engine.encode(prompt) for prompt in prompts]
        job = Job(self, Reply("text_completion", self.name), ids, sampling)
        if asked.echo:
            with _as_api_errors("prompt"):
                await job.read_prompts(prompts)
        return await job.answer(request, asked, "prompt")


class Job:
    """One request on its way: prompts in, answers out."""

    def __init__(self, service: Service, reply: Reply, prompts: list[list[int]], sampling: Sampling) -> None:
        self.thread, self.reply, self.prompts, self.sampling = service.thread, reply, prompts, sampling
        vocabulary = service.engine.vocabulary
        assert vocabulary is not None, "a server needs a tokenizer"
        self.vocabulary = vocabulary
        self.legacy = [LegacyLogprobs(vocabulary) for _ in range(len(prompts) * sampling.n)]
        self.echoes = [""] * len(prompts)
        self.prompt_scores: list[list[TokenScore | int]] = [[] for _ in prompts]

    async def read_prompts(self, prompts: Sequence[str | list[int]]) -> None:
        """For `echo`: the prompts' texts, and their log-probabilities where asked for."""
        for i, (prompt, ids) in enumerate(zip(prompts, self.prompts, strict=True)):
            text = b"".join(self.vocabulary.of(t) for t in ids).decode("utf-8", "replace")
            self.echoes[i] = prompt if isinstance(prompt, str) else text
        top = self.sampling.logprobs
        if top is None:
            return
        scored = await asyncio.wrap_future(self.thread.call(lambda e: e.score_top([(p, 1) for p in self.prompts], top)))
        for i, (ids, s) in enumerate(zip(self.prompts, scored, strict=True)):
            rest = [
                TokenScore(t, float(p), tuple(zip(a.tolist(), b.tolist(), strict=True)))
                for t, p, a, b in zip(ids[1:], s.logprobs, s.top_ids, s.top_logprobs, strict=True)
            ]
            self.prompt_scores[i] = [ids[0], *rest]

    async def answer(self, request: Request, asked: ChatRequest | CompletionRequest, param: str) -> Response:
        wanted = [(ids, self.sampling, j) for ids in self.prompts for j in range(self.sampling.n)]
        with _as_api_errors(param):
            ticket = await self.thread.submit(wanted)
        if asked.stream:
            options = asked.stream_options
            pieces = self._pieces(ticket, bool(options and options.include_usage))
            return StreamingResponse(pieces, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        return await self._whole(request, ticket)

    async def _whole(self, request: Request, ticket: Ticket) -> Response:
        """The reply in one. A client that leaves ends its sequences."""
        work = asyncio.ensure_future(self._collect(ticket))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(work.result()) if work.done() else Response(status_code=499)
        finally:
            for task in (work, gone):
                task.cancel()
            self.thread.cancel(ticket)

    async def _collect(self, ticket: Ticket) -> dict[str, Any]:
        async for _ in ticket.events():
            pass
        choices = []
        for number, sequence in enumerate(ticket.sequences):
            done = sequence.completion()
            scores = [s for s in done.scores if s.id not in sequence.ends]
            text = self.echoes[number // self.sampling.n] + done.text
            logprobs = self._logprobs(number, scores, first=True)
            choices.append(self.reply.choice(number, text, done.finish_reason, logprobs))
        return self.reply.whole(choices, self._usage(ticket))

    async def _pieces(self, ticket: Ticket, include_usage: bool) -> AsyncIterator[bytes]:
        """The reply as server-sent events. Closed by the client's leaving, which ends its sequences."""
        extra = {"usage": None} if include_usage else {}
        try:
            for number in range(len(ticket.sequences)):
                if self.reply.chat:
                    yield self.reply.piece([self.reply.delta(number, "", None, None, first=True)], **extra)
                elif self.echoes[number // self.sampling.n]:
                    logprobs = self._logprobs(number, [], first=True)
                    yield self.reply.piece(
                        [self.reply.delta(number, self.echoes[number // self.sampling.n], None, logprobs)], **extra
                    )
            async for number, event in ticket.events():
                scores = [s for s in event.scores if s.id not in event.sequence.ends]
                if event.text or scores:
                    logprobs = self._logprobs(number, scores) if scores else None
                    yield self.reply.piece([self.reply.delta(number, event.text, None, logprobs)], **extra)
                if event.finish_reason:
                    yield self.reply.piece([self.reply.delta(number, "", event.finish_reason, None)], **extra)
            if include_usage:
                yield self.reply.piece([], usage=self._usage(ticket))
            yield b"data: [DONE]\n\n"
        except Exception:
            yield sse(_server_error().body)
            raise
        finally:
            self.thread.cancel(ticket)

    def _logprobs(self, number: int, scores: list[TokenScore], first: bool = False) -> dict[str, Any] | None:
        if self.sampling.logprobs is None:
            return None
        if self.reply.chat:
            return chat_logprobs(self.vocabulary, scores)
        before = self.prompt_scores[number // self.sampling.n] if first else []
        return self.legacy[number].of([*before, *scores])

    def _usage(self, ticket: Ticket) -> dict[str, Any]:
        return usage(sum(map(len, self.prompts)), sum(s.made for s in ticket.sequences))


async def _json(request: Request) -> Any:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A page of another site can send anything to this machine, but not JSON under its own name.
        raise ApiError(415, "the content type must be application/json")
    body = await request.body()
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON ({error})") from error


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def check_binding(host: str, api_keys: Sequence[str], insecure: bool) -> None:
    """Raises `ConfigError` when others could reach the server and nothing would stop them."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not (local or api_keys or insecure):
        raise ConfigError(
            "others could use this server: it would listen beyond this machine without an API key", field="host", found=host,
            expected="a loopback address, or an API key", fix="give --api-key KEY, or --insecure if the network is trusted",
        )  # fmt: skip


def serve(
    model_folder: Path | str, host: str = "127.0.0.1", port: int = 8000, *, name: str | None = None, api_keys: Sequence[str] = (),
    insecure: bool = False, slots: int = 16, max_length: int | None = None, device: str = "cpu", dtype: str = "float32",
    max_body: int = 4 << 20,
) -> None:  # fmt: skip
    """Serves a model folder until interrupted. `name` is what clients call the model; the folder's name where None.

    Raises `ConfigError` for a host beyond this machine without an API key, `ArtifactError` for a folder that is no model.
    """
    check_binding(host, api_keys, insecure)
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtra("uvicorn", "serve", "the server") from error
    from tutelage.data.render import Renderer
    from tutelage.log import say
    from tutelage.models.load import load

    folder = Path(model_folder)
    renderer = Renderer(folder)
    model = load(folder, device=device, dtype=dtype)
    engine = Engine(model, renderer, slots, max_length, seed=secrets.randbits(31))
    known = name or folder.resolve().name
    app = create_app(engine, renderer, known, api_keys=api_keys, max_body=max_body)
    say(f"serving {known} ({engine.context_length} tokens of context) at http://{host}:{port}/v1")
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=5)
