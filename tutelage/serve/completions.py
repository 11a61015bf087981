"""Chat and text completions: prompts in, answers out, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq
from typing import Any

from fastapi import Request, Response

from tutelage.chat.tool_calls import CallStyle, ToolCallStream, finish_reason, parse_calls, showing
from tutelage.engine import Completion, Event, Sampling, TokenScore
from tutelage.errors import ConfigError
from tutelage.serve.generation import GenerationRequest
from tutelage.serve.prompt_scores import PromptScores, score_prompts
from tutelage.serve.registry import Served
from tutelage.serve.replies import LegacyLogprobs, Reply, chat_logprobs, sse, usage
from tutelage.serve.schema import ApiError, ChatRequest, CompletionRequest, server_error

NOTHING = Completion(prompt=(), ids=(), text="", finish_reason="length")
"""The answer to a request for none: `max_tokens` is 0."""


class CompletionHandler:
    """The prompts of one request, and how they are to be answered. `param`: the request's parameter that the prompts came in."""

    def __init__(
        self, request: Request, served: Served, reply: Reply, prompts: list[list[int]], sampling: Sampling, param: str,
        style: CallStyle | None = None,
    ) -> None:  # fmt: skip
        self.work = GenerationRequest(request, served, prompts, sampling, param)
        self.served, self.reply = served, reply
        self.prompts, self.sampling = prompts, sampling
        self.style = style  # of tool calls, where the model may make some
        self.vocabulary = showing(self.work.vocabulary, sampling.shown_ids)
        self.count = len(prompts) * sampling.n  # of answers
        self.legacy = [LegacyLogprobs(self.vocabulary) for _ in range(self.count)]
        self.echoes = [""] * len(prompts)
        self.prompt_scores: list[PromptScores] = []
        self.echoed = self.gives_ids = False
        self.prompt_logprobs: int | None = None

    async def answer(self, asked: ChatRequest | CompletionRequest, echo: Seq[str | list[int]] = ()) -> Response:
        """The reply. `echo`: prompts that it begins with."""
        self.gives_ids, self.prompt_logprobs = bool(asked.return_token_ids), asked.prompt_logprobs
        only_prompts = isinstance(asked, CompletionRequest) and asked.prompt_only
        await self.work.submit(lambda: self._read_prompts(echo), answers=not only_prompts)
        if only_prompts:
            self.work.served.meter.scored(sum(map(len, self.prompts)))
        include_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return await self.work.respond(bool(asked.stream), lambda: self._pieces(include_usage), self._collect)

    async def _read_prompts(self, echo: Seq[str | list[int]]) -> None:
        """The prompts' texts for `echo`, and their log-probabilities where asked for."""
        for i, (prompt, ids) in enumerate(zip(echo, self.prompts, strict=bool(echo))):
            text = b"".join(self.vocabulary.of(t) for t in ids).decode("utf-8", "replace")
            self.echoes[i] = prompt if isinstance(prompt, str) else text
        self.echoed = bool(echo) and self.sampling.logprobs is not None
        if not self.echoed and self.prompt_logprobs is None:
            return
        ranked = 0 if self.prompt_logprobs is None else max(self.prompt_logprobs, 1)  # ranks come with alternatives
        try:
            top = max(self.sampling.logprobs or 0, ranked)
            self.prompt_scores = await score_prompts(self.served.thread, self.prompts, top, self.served.adapter)
        except ConfigError as error:  # an encoder-decoder
            raise ApiError(400, str(error), param="prompt_logprobs" if ranked else self.work.param) from error

    async def _collect(self) -> dict[str, Any]:
        """The reply in one."""
        async for _ in self.work.events(whole=True):
            pass
        choices = []
        for number in range(self.count):
            done = self.work.sequences[number].completion() if self.work.sequences else NOTHING
            text = self.echoes[number // self.sampling.n] + done.text
            logprobs = self._logprobs(number, done.scores, first=True)
            text, calls = parse_calls(text, self.style) if self.style else (text, [])
            reason = finish_reason(done.finish_reason, calls)
            more = self._of_prompt(number) | ({"token_ids": list(done.ids)} if self.gives_ids else {})
            choices.append(self.reply.choice(number, text, reason, logprobs, calls, **more))
        return self.reply.whole(choices, self._usage(), **self._of_prompt(None))

    async def _pieces(self, include_usage: bool) -> AsyncIterator[bytes]:
        """The reply as server-sent events."""
        extra = {"usage": None} if include_usage else {}
        no_ids: dict[str, Any] = {"token_ids": []} if self.gives_ids else {}
        try:
            for number in range(self.count):
                echo, more = self.echoes[number // self.sampling.n], self._of_prompt(number) | no_ids
                if self.reply.chat:
                    top = self._of_prompt(None) if number == 0 else {}
                    yield self.reply.piece([self.reply.delta(number, "", None, None, first=True, **more)], **extra, **top)
                elif echo or more:
                    logprobs = self._logprobs(number, (), first=True) if echo else None
                    yield self.reply.piece([self.reply.delta(number, echo, None, logprobs, **more)], **extra)
                if not self.work.sequences:
                    yield self.reply.piece([self.reply.delta(number, "", NOTHING.finish_reason, None, **no_ids)], **extra)
            readers = {n: ToolCallStream(self.style) for n in range(len(self.work.sequences))} if self.style else {}
            async for number, event in self.work.events():
                logprobs = self._logprobs(number, event.scores) if event.scores else None
                more = {"token_ids": list(event.ids)} if self.gives_ids else {}
                for text in self._texts(readers.get(number), event) or ([""] if logprobs or more else []):
                    yield self.reply.piece([self.reply.delta(number, text, None, logprobs, **more)], **extra)
                    logprobs, more = None, no_ids
                if event.finish_reason:
                    reason = finish_reason(event.finish_reason, readers[number].calls if readers else ())
                    yield self.reply.piece([self.reply.delta(number, "", reason, None, **no_ids)], **extra)
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

    def _logprobs(self, number: int, scores: Seq[TokenScore], first: bool = False) -> dict[str, Any] | None:
        """An entry for every token made, the end token too, as `usage` counts them: lm-eval drops the last entry as that of the
        one token it asks for, whatever that token is."""
        if self.sampling.logprobs is None:
            return None
        if self.reply.chat:
            return chat_logprobs(self.vocabulary, scores)
        if not (first and self.echoed):
            return self.legacy[number].of(scores)
        return self.legacy[number].of([*self.prompt_scores[number // self.sampling.n].echoed(self.sampling.logprobs), *scores])

    def _of_prompt(self, number: int | None) -> dict[str, Any]:
        """What was asked for of an answer's prompt. vLLM puts it beside a text's answer, but beside all answers of a chat."""
        if (number is None) != self.reply.chat:
            return {}
        at = (number or 0) // self.sampling.n
        out: dict[str, Any] = {"prompt_token_ids": self.prompts[at]} if self.gives_ids else {}
        if self.prompt_logprobs is not None:
            out["prompt_logprobs"] = self.prompt_scores[at].listed(self.prompt_logprobs, self.vocabulary)
        return out

    def _usage(self) -> dict[str, Any]:
        cached = sum(s.shared for s in self.work.sequences[:: self.sampling.n])  # the n answers of a prompt count it once
        return usage(sum(map(len, self.prompts)), sum(s.made for s in self.work.sequences), cached)
