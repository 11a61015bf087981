"""OpenAI batch files: every row is a request, answered by the server's own application in this process, without a socket.

So a body means here what it means to the server, whatever it asks for; nothing about requests is written down twice.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from tutelage import log
from tutelage.engine.protocol import EngineProtocol
from tutelage.errors import DataError, UserError
from tutelage.inference.batch import Job, one_line, row_seed
from tutelage.inference.input_file import InputRow
from tutelage.serve.app import create_app
from tutelage.serve.responses.request import ResponsesRequest
from tutelage.serve.routes.embeddings import EmbeddingRequest
from tutelage.serve.schema import ApiError, ChatRequest, CompletionRequest, parse


@dataclass(slots=True, frozen=True)
class Endpoint:
    """What the rows of one URL are."""

    request: type[BaseModel]
    read: str = "prompt_tokens"  # the key of `usage` for tokens that were read
    made: str = "completion_tokens"  # for those that were made; 0 where it is not there
    seeded: bool = True  # a request may bring a seed, and gets its row's where it does not


URLS = {
    "/v1/chat/completions": Endpoint(ChatRequest),
    "/v1/completions": Endpoint(CompletionRequest),
    "/v1/responses": Endpoint(ResponsesRequest, "input_tokens", "output_tokens"),
    "/v1/embeddings": Endpoint(EmbeddingRequest, seeded=False),
}
MAX_BODY = 1 << 30  # bytes of a request: the file is the user's own


class Requests:
    """Rows of `{"custom_id", "method", "url", "body"}`; the output has OpenAI's shape, one object a row.

    name: of the model, in the replies. seed: of requests that bring none.
    """

    says = "the requests of an OpenAI batch file"

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed = name, seed
        self.renamed: set[str] = set()  # other models that the rows asked for
        self.first: dict[str, int] = {}  # by custom_id, the row that has it first

    def check(self, entry: InputRow) -> None:
        body = self._body(entry)
        try:
            parse(URLS[entry.fields["url"]].request, body)
        except ApiError as error:
            raise _refusal(error.body) from None

    def _body(self, entry: InputRow) -> dict[str, Any]:
        """The row's body with our model's name and the row's seed. Raises `DataError`."""
        fields = entry.fields
        for name, wanted, right in (
            ("custom_id", "a text", isinstance(fields.get("custom_id"), str)),
            ("method", "POST", fields.get("method") == "POST"),
            ("url", " or ".join(URLS), fields.get("url") in URLS),
            ("body", "an object", isinstance(fields.get("body"), dict)),
        ):
            if not right:
                raise DataError("not a row of a batch file", field=name, found=fields.get(name), expected=wanted)
        if (earlier := self.first.setdefault(fields["custom_id"], entry.index)) != entry.index:
            raise DataError(
                "a custom_id comes twice, so that its answers could not be told apart", field="custom_id",
                found=f"{fields['custom_id']}, as in row {earlier + 1}", expected="one of its own for each row", fix="rename it",
            )  # fmt: skip
        body = fields["body"]
        if body.get("stream"):
            raise DataError("a batch is not streamed", field="body.stream", found=True, expected="false")
        if isinstance(body.get("model"), str) and body["model"] != self.name:
            self.renamed.add(body["model"])
        body = {**body, "model": self.name}
        if URLS[fields["url"]].seeded and body.get("seed") is None:
            body["seed"] = row_seed(self.seed, entry.index)
        return body

    def failed(self, entry: InputRow, error: UserError) -> dict[str, Any]:
        return _output(entry, None, {"code": "invalid_row", "message": one_line(error)})

    def answer(self, job: Job, engine: EngineProtocol, slots: int) -> None:
        for entry in job.archive.entries():  # all of them: rows that are answered already are not seen again
            if isinstance(entry.fields.get("custom_id"), str):
                self.first.setdefault(entry.fields["custom_id"], entry.index)
        asyncio.run(self._answer(job, engine, 2 * slots))
        if self.renamed:
            log.say(f"rows that asked for {', '.join(sorted(self.renamed))} were answered by {self.name}")

    async def _answer(self, job: Job, engine: EngineProtocol, at_once: int) -> None:
        app = create_app(engine, engine.renderer, self.name, max_body=MAX_BODY)
        running = app.router.lifespan_context(app)
        tasks: set[asyncio.Task[None]] = set()
        await running.__aenter__()
        try:
            for entry in job.todo():
                tasks.add(asyncio.create_task(self._one(job, app, entry)))
                if len(tasks) >= at_once:
                    tasks = await _some(tasks)
            while tasks:
                tasks = await _some(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await running.__aexit__(None, None, None)  # not told of an error: it stops the engine's thread either way

    async def _one(self, job: Job, app: Any, entry: InputRow) -> None:
        try:
            body = self._body(entry)
        except DataError as error:
            job.refuse(entry, error)
            return
        status, request_id, reply = await post(app, entry.fields["url"], body)
        row = _output(entry, {"status_code": status, "request_id": request_id, "body": reply}, None)
        if status == 200:
            endpoint, usage = URLS[entry.fields["url"]], reply["usage"]
            job.take(entry, row, usage[endpoint.read], usage.get(endpoint.made, 0))
        else:
            job.refuse(entry, _refusal(reply), row)


async def _some(tasks: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Waits for at least one task, and gives back the unfinished ones. Raises what a task raised."""
    done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return left


async def post(app: Any, path: str, body: dict[str, Any]) -> tuple[int, str, Any]:
    """(status, request id, reply) of a request to an ASGI application. Raises what the application raised."""
    payload = json.dumps(body).encode()
    sent: list[dict[str, Any]] = []
    arriving = [{"type": "http.request", "body": payload, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if arriving:
            return arriving.pop()
        await asyncio.get_running_loop().create_future()  # this client does not leave
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(payload)).encode())]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
        "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers, "client": None, "server": None,
    }  # fmt: skip
    await app(scope, receive, send)
    start, *rest = sent
    reply = json.loads(b"".join(message.get("body", b"") for message in rest))
    return start["status"], dict(start["headers"])[b"x-request-id"].decode(), reply


def _refusal(reply: dict[str, Any]) -> DataError:
    """The error that a reply describes."""
    error = reply["error"]
    return DataError(error["message"], field=f"body.{error['param']}" if error["param"] else "body")


def _output(entry: InputRow, response: dict[str, Any] | None, error: dict[str, Any] | None) -> dict[str, Any]:
    custom_id = entry.fields.get("custom_id")
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}
