"""The response object: what was asked for, as it was honoured, and what came of it."""

from __future__ import annotations

import time
import uuid
from typing import Any

from tutelage.engine import Sampling, Sequence
from tutelage.serve.responses.items import Item
from tutelage.serve.responses.request import ResponsesRequest
from tutelage.serve.schema import ApiError


class Reply:
    """One response: the same id, time and settings in every event. `stored`: whether it is kept when it is finished."""

    def __init__(self, asked: ResponsesRequest, sampling: Sampling, model: str, stored: bool) -> None:
        self.id, self.created, self.stored = f"resp_{uuid.uuid4().hex}", int(time.time()), stored
        self._settings = {
            "model": model,
            "instructions": asked.instructions,
            "previous_response_id": asked.previous_response_id,
            "max_output_tokens": asked.max_output_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "top_logprobs": asked.top_logprobs or 0,
            "text": {"format": asked.format, "verbosity": "medium"},
            "tools": asked.functions,
            "tool_choice": asked.tool_choice or "auto",
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "max_tool_calls": asked.max_tool_calls,
            "reasoning": {"effort": None, "summary": None},
            "truncation": "disabled",
            "background": False,
            "service_tier": "default",
            "metadata": asked.metadata or {},
            "user": asked.user,
            "safety_identifier": asked.safety_identifier,
            "prompt_cache_key": asked.prompt_cache_key,
        }

    def running(self) -> dict[str, Any]:
        return self._body("in_progress", [])

    def finished(self, output: list[Item], cut: bool, usage: dict[str, Any]) -> dict[str, Any]:
        """cut: the answer reached `max_output_tokens`, or the end of the context."""
        if cut:
            return self._body("incomplete", output, incomplete_details={"reason": "max_output_tokens"}, usage=usage)
        return self._body("completed", output, completed_at=int(time.time()), usage=usage)

    def failed(self, output: list[Item], error: ApiError) -> dict[str, Any]:
        """What came before the error. It is never kept."""
        said = {"code": "server_error", "message": error.body["error"]["message"]}
        return self._body("failed", output, error=said, store=False)

    def _body(self, status: str, output: list[Item], **rest: Any) -> dict[str, Any]:
        return {
            "id": self.id, "object": "response", "created_at": self.created, "completed_at": None, "status": status,
            "error": None, "incomplete_details": None, **self._settings, "store": self.stored, "output": output, "usage": None,
            **rest,
        }  # fmt: skip


def usage(sequence: Sequence) -> dict[str, Any]:
    """Tokens of a finished answer. The prefix cache is no client's to write to: what it holds is a by-product, and may go."""
    read, made = len(sequence.prompt), sequence.made
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": sequence.shared, "cache_write_tokens": 0},
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + made,
    }
