"""Chat and text completions: prompts in, answers out, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request, Response

from tutelage.engine import Event, Sampling, TokenScore
from tutelage.engine.protocol import EngineProtocol
from tutelage.engine.scoring import Scored
from tutelage.engine.tool_calls import CallStyle, ToolCallStream, finish_reason, parse_calls
from tutelage.serve.models import Served
from tutelage.serve.replies import LegacyLogprobs, Reply, chat_logprobs, sse, usage
from tutelage.serve.schema import ApiError, ChatRequest, CompletionRequest, server_error
from tutelage.serve.work import Work


class Job:
    """The prompts of one request, and how they are to be answered. `param`: the request's parameter that the prompts came in."""

    def __init__(
        self, request: Request, served: Served, reply: Reply, prompts: list[list[int]], sampling: Sampling, param: str,
        style: CallStyle | None = None,
    ) -> None:  # fmt: skip
        self.work = Work(request, served, prompts, sampling, param)
        self.thread, self.reply = served.thread, reply
        self.prompts, self.sampling = prompts, sampling
        self.style = style  # of tool calls, where the model may make some
        self.vocabulary = self.work.vocabulary
        self.legacy = [LegacyLogprobs(self.vocabulary) for _ in range(len(prompts) * sampling.n)]
        self.echoes = [""] * len(prompts)
        self.prompt_scores: list[list[TokenScore | int]] = [[] for _ in prompts]

    async def answer(self, asked: ChatRequest | CompletionRequest, echo: Sequence[str | list[int]] = ()) -> Response:
        """The reply. `echo`: prompts that it begins with."""
        await self.work.submit((lambda: self._read_prompts(echo)) if echo else None)
        include_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return await self.work.respond(bool(asked.stream), lambda: self._pieces(include_usage), self._collect)

    async def _read_prompts(self, prompts: Sequence[str | list[int]]) -> None:
        """For `echo`: the prompts' texts, and their log-probabilities where asked for."""
        for i, (prompt, ids) in enumerate(zip(prompts, self.prompts, strict=True)):
            text = b"".join(self.vocabulary.of(t) for t in ids).decode("utf-8", "replace")
            self.echoes[i] = prompt if isinstance(prompt, str) else text
        top = self.sampling.logprobs
        if top is None:
            return

        def score(engine: EngineProtocol, prompts: list[list[int]], lora: Any) -> list[Scored]:
            return engine.score_top([(p, 1) for p in prompts], top, lora)

        scored = await self.thread.grouped(self.prompts, score)
        for i, (ids, s) in enumerate(zip(self.prompts, scored, strict=True)):
            rest = [
                TokenScore(t, float(p), tuple(zip(a.tolist(), b.tolist(), strict=True)))
                for t, p, a, b in zip(ids[1:], s.logprobs, s.top_ids, s.top_logprobs, strict=True)
            ]
            self.prompt_scores[i] = [ids[0], *rest]

    async def _collect(self) -> dict[str, Any]:
        """The reply in one."""
        async for _ in self.work.events(whole=True):
            pass
        choices = []
        for number, sequence in enumerate(self.work.sequences):
            done = sequence.completion()
            scores = [s for s in done.scores if s.id not in sequence.ends]
            text = self.echoes[number // self.sampling.n] + done.text
            logprobs = self._logprobs(number, scores, first=True)
            text, calls = parse_calls(text, self.style) if self.style else (text, [])
            choices.append(self.reply.choice(number, text, finish_reason(done.finish_reason, calls), logprobs, calls))
        return self.reply.whole(choices, self._usage())

    async def _pieces(self, include_usage: bool) -> AsyncIterator[bytes]:
        """The reply as server-sent events."""
        extra = {"usage": None} if include_usage else {}
        try:
            for number in range(len(self.work.sequences)):
                if self.reply.chat:
                    yield self.reply.piece([self.reply.delta(number, "", None, None, first=True)], **extra)
                elif self.echoes[number // self.sampling.n]:
                    logprobs = self._logprobs(number, [], first=True)
                    yield self.reply.piece(
                        [self.reply.delta(number, self.echoes[number // self.sampling.n], None, logprobs)], **extra
                    )
            readers = {n: ToolCallStream(self.style) for n in range(len(self.work.sequences))} if self.style else {}
            async for number, event in self.work.events():
                scores = [s for s in event.scores if s.id not in event.sequence.ends]
                logprobs = self._logprobs(number, scores) if scores else None
                for text in self._texts(readers.get(number), event) or ([""] if logprobs else []):
                    yield self.reply.piece([self.reply.delta(number, text, None, logprobs)], **extra)
                    logprobs = None
                if event.finish_reason:
                    reason = finish_reason(event.finish_reason, readers[number].calls if readers else ())
                    yield self.reply.piece([self.reply.delta(number, "", reason, None)], **extra)
            if include_usage:
                yield self.reply.piece([], usage=self._usage())
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield sse(error.body)
        except Exception:
            yield sse(server_error().body)
            raise

    @staticmethod
    def _texts(reader: ToolCallStream | None, event: Event) -> list[str | dict[str, Any]]:
        """What an event adds: text, or deltas where the model may call tools."""
        if reader is None:
            return [event.text] if event.text else []
        found = reader.feed(event.text) + (reader.finish() if event.finish_reason else [])
        return [delta.to_json() for delta in found]

    def _logprobs(self, number: int, scores: list[TokenScore], first: bool = False) -> dict[str, Any] | None:
        if self.sampling.logprobs is None:
            return None
        if self.reply.chat:
            return chat_logprobs(self.vocabulary, scores)
        before = self.prompt_scores[number // self.sampling.n] if first else []
        return self.legacy[number].of([*before, *scores])

    def _usage(self) -> dict[str, Any]:
        cached = sum(s.shared for s in self.work.sequences[:: self.sampling.n])  # the n answers of a prompt count it once
        return usage(sum(map(len, self.prompts)), sum(s.made for s in self.work.sequences), cached)
