"""The engine as what answers in a tool loop: conversations in, replies out, with every token that was made kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tutelage.chat.tool_calls import finish_reason, parse_calls
from tutelage.engine.engine import Engine
from tutelage.engine.sequence import Completion, Sampling
from tutelage.engine.tools import Reply
from tutelage.errors import ConfigError
from tutelage.models.adapters.lora import Lora
from tutelage.structured.tool_choice import call_style, tool_grammar


class Assistant:
    """A `Generate` for `run_with_tools`. `completions` has the ids and scores of each answer, in the order they were given.

    call_first: whether what follows a message of the user must be a call: of any tool, or of the one named. What follows a
    tool's result is free. Raises `ConfigError` for a template whose calls cannot be read back, and for several answers a turn.

    Example:
        done = run_with_tools(Assistant(engine, Sampling(200, seed=1), call_first="calculator"), messages, [calculator])
    """

    def __init__(self, engine: Engine, sampling: Sampling, *, call_first: bool | str = False, lora: Lora | None = None) -> None:
        if sampling.n != 1:
            raise ConfigError("a conversation goes on with one answer", field="n", found=sampling.n, expected="1")
        self.engine, self.call_first, self.lora = engine, call_first, lora
        self.style = call_style(engine.renderer)
        self.sampling = replace(sampling, shown_ids=tuple(sorted({*sampling.shown_ids, *self.style.visible})))
        self.completions: list[Completion] = []

    def __call__(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Reply:
        """Raises `ContextOverflow` for a conversation that has grown too long, `ConfigError` for tools that cannot be forced."""
        sampling = self.sampling
        if self.call_first and messages[-1]["role"] != "tool":
            name = self.call_first if isinstance(self.call_first, str) else None
            sampling = replace(sampling, grammar=tool_grammar(self.style, tools, name))
        ids = self.engine.renderer.prompt(messages, tools)
        (answer,) = self.engine.generate([ids], sampling, self.lora)
        self.completions.append(answer)
        content, calls = parse_calls(answer.text, self.style) if tools else (answer.text, [])
        return Reply(content, tuple(calls), finish_reason(answer.finish_reason, calls))
