"""Replies in OpenAI's shapes, whole and in pieces."""

from __future__ import annotations

import codecs
import json
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from tutelage.chat.tool_calls import ToolCall
from tutelage.engine import TokenScore
from tutelage.tokenizer.detokenize import Vocabulary


class Reply:
    """One request's reply: the same id, time and model name in every piece."""

    def __init__(self, kind: str, model: str) -> None:
        self.chat = kind == "chat.completion"
        self.kind = kind
        prefix = "chatcmpl" if self.chat else "cmpl"
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {**self.head, "choices": choices, "usage": usage, **more}

    def piece(self, choices: list[dict[str, Any]], **rest: Any) -> bytes:
        kind = "chat.completion.chunk" if self.chat else self.kind
        return sse({**self.head, "object": kind, "choices": choices, **rest})

    def choice(
        self,
        index: int,
        text: str,
        finish_reason: str | None,
        logprobs: dict[str, Any] | None,
        calls: Sequence[ToolCall] = (),
        **more: Any,
    ) -> dict[str, Any]:
        """One answer; `more` are fields beyond OpenAI's."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [call.to_json() for call in calls]}
        body: dict[str, Any] = {"message": message} if self.chat else {"text": text}
        return {"index": index, **body, "logprobs": logprobs, "finish_reason": finish_reason, **more}

    def delta(
        self,
        index: int,
        text: str | dict[str, Any],
        finish_reason: str | None,
        logprobs: dict[str, Any] | None,
        first: bool = False,
        **more: Any,
    ) -> dict[str, Any]:
        """A piece of one answer: text, or the delta itself; `more` are fields beyond OpenAI's."""
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {}
        if isinstance(text, dict):
            delta = text
        elif text or logprobs:
            delta = {"content": text}
        body = {"delta": delta} if self.chat else {"text": text}
        return {"index": index, **body, "logprobs": logprobs, "finish_reason": finish_reason, **more}


def sse(value: object) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }  # fmt: skip


def token_name(vocabulary: Vocabulary, token: int) -> str:
    """The text of a token; `bytes:\\xNN` where it is part of a character, so that two tokens never share a name."""
    raw = vocabulary.raw(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)


def chat_logprobs(vocabulary: Vocabulary, scores: Iterable[TokenScore]) -> dict[str, Any]:
    def item(token: int, logprob: float) -> dict[str, Any]:
        raw = vocabulary.raw(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    content = [item(s.id, s.logprob) | {"top_logprobs": [item(i, p) for i, p in s.top]} for s in scores]
    return {"content": content, "refusal": None}


class LegacyLogprobs:
    """Log-probabilities as the text completions have them. Offsets count characters of the choice's text; kept between pieces."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.offset = 0

    def of(self, scores: Iterable[TokenScore | int]) -> dict[str, Any]:
        """`scores` may begin with a bare token: the first of a prompt, which nothing predicts."""
        out: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for score in scores:
            token = score if isinstance(score, int) else score.id
            out["tokens"].append(token_name(self.vocabulary, token))
            out["text_offset"].append(self.offset)
            self.offset += len(self.decoder.decode(self.vocabulary.of(token)))
            if isinstance(score, int):
                out["token_logprobs"].append(None)
                out["top_logprobs"].append(None)
                continue
            out["token_logprobs"].append(max(score.logprob, -9999.0))
            # The token itself is always listed, with the very same number: clients compare it with the largest.
            top = {token_name(self.vocabulary, i): max(p, -9999.0) for i, p in score.top}
            out["top_logprobs"].append(top | {token_name(self.vocabulary, token): max(score.logprob, -9999.0)})
        return out
