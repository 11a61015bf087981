"""From a row's fields to what the model is asked: a text to continue, or messages to answer."""

from __future__ import annotations

import difflib
import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tutelage.data.sources.conversations import to_messages
from tutelage.errors import ConfigError, DataError
from tutelage.unicode import HALF, is_whole

ADDED = ("completion", "completions", "finish_reason", "usage", "error")
"""Fields that an output row has beside those of its input."""


@dataclass(slots=True, frozen=True)
class PromptRow:
    """What one row asks.

    Example:
        Asked([{"role": "user", "content": "2+2?"}], tools=[])
    """

    prompt: str | list[dict[str, Any]]  # a text to continue, or OpenAI messages to answer
    tools: list[dict[str, Any]]  # schemas offered with the messages

    @property
    def chat(self) -> bool:
        return not isinstance(self.prompt, str)


class Prompting:
    """How rows become prompts. Raises `ConfigError` for a template that is none.

    column: the field with the prompt; None takes `prompt` or `messages`, whichever the row has. template: a text with {field}s.
    chat: prompts that are texts are asked as a user's message. system: the first message of every row; implies chat.
    """

    def __init__(self, column: str | None = None, template: str | None = None, chat: bool = False, system: str | None = None):
        if column is not None and template is not None:
            raise ConfigError("`column` and `prompt_template` exclude each other", field="column", found=column)
        self.column, self.system, self.chat = column, system, chat or system is not None
        self.template = None if template is None else parse_template(template)

    def ask(self, fields: Mapping[str, Any]) -> PromptRow:
        """Raises `DataError` naming the field that is missing or of another kind, or that the output would overwrite."""
        if taken := [name for name in ADDED if name in fields]:
            raise DataError(
                f"the row has a field `{taken[0]}`, which the output would overwrite", field=taken[0], found=fields[taken[0]],
                fix="rename the field",
            )  # fmt: skip
        name, value = self._value(fields)
        system = self._system(fields)
        if isinstance(value, str):
            check_text(value, name)
            if not self.chat:
                return PromptRow(f"{system}\n\n{value}" if system else value, [])
            value = [{"role": "user", "content": value}]
        elif not isinstance(value, list):
            raise DataError("not a prompt", field=name, found=value, expected="a text, or a list of messages")
        return PromptRow(self._messages(value, name, system), _tools(fields.get("tools")))

    def _value(self, fields: Mapping[str, Any]) -> tuple[str, Any]:
        """The field that holds the prompt, and its value."""
        if self.template is not None:
            return "prompt_template", "".join(literal + _filled(name, fields) for literal, name in self.template)
        if self.column is not None:
            return self.column, _field(self.column, fields)
        found = [name for name in ("messages", "prompt") if name in fields]
        if len(found) != 1:
            raise DataError(
                "the row has both `prompt` and `messages`" if found else "the row has neither `prompt` nor `messages`",
                found=f"fields {', '.join(map(str, fields))}", expected='{"prompt": "…"} or {"messages": […]}',
                fix="name the field with --column, or make a prompt with --prompt-template",
            )  # fmt: skip
        return found[0], fields[found[0]]

    def _system(self, fields: Mapping[str, Any]) -> str | None:
        """The instructions to this row: `--system`, or its own `system`, which is read as `tutelage data` reads it where the row
        itself says what is the prompt."""
        own = fields.get("system") if self.template is None and self.column is None else None
        if not own:
            return self.system
        if not isinstance(own, str):
            raise DataError("the system prompt is not text", field="system", found=own, expected="a text", fix="write it as text")
        check_text(own, "system")
        if self.system is not None:
            raise DataError(
                "the row has a system prompt of its own", field="system", found=own, fix="leave out --system, or the row's"
            )
        return own

    def _messages(self, rows: list[Any], name: str, system: str | None) -> list[dict[str, Any]]:
        messages = [message.to_json() for message in to_messages(rows, name)]
        for i, message in enumerate(messages):
            check_text(message["content"], f"{name}[{i}].content")
        if messages[-1]["role"] == "assistant":
            raise DataError(
                "the conversation ends with the assistant: there is nothing to answer", field=f"{name}[{len(messages) - 1}].role",
                found="assistant", expected="user or tool", fix="leave out the last message",
            )  # fmt: skip
        if system is None:
            return messages
        if messages[0]["role"] == "system":
            raise DataError(
                "the row has a system prompt of its own", field=f"{name}[0]", found=messages[0]["content"],
                fix="leave out the other one, --system or `system`, or the row's system message",
            )  # fmt: skip
        return [{"role": "system", "content": system}, *messages]


def parse_template(text: str) -> list[tuple[str, str | None]]:
    """(literal, name of the field after it) of `Describe {name}: {text}`; `{{` and `}}` are braces. Raises `ConfigError`."""
    wrong: dict[str, Any] = {
        "field": "prompt_template", "found": text, "expected": "'Describe {name}: {text}', and {{ }} for braces in the text"
    }  # fmt: skip
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"not a template ({error})", **wrong) from None
    if any(name is not None and (not name or spec or conversion) for _, name, spec, conversion in parts):
        raise ConfigError("a template has plain names of fields in braces", **wrong)
    if all(name is None for _, name, _, _ in parts):
        raise ConfigError("the template names no field, so all prompts would be equal", **wrong)
    return [(literal, name) for literal, name, _, _ in parts]


def _filled(name: str | None, fields: Mapping[str, Any]) -> str:
    if name is None:
        return ""
    value = _field(name, fields)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _field(name: str, fields: Mapping[str, Any]) -> Any:
    value = fields.get(name)
    if value is None:
        near = difflib.get_close_matches(name, map(str, fields), 1)
        raise DataError(
            f"the row has no `{name}`", field=name, found=f"fields {', '.join(map(str, fields))}",
            fix=f"did you mean `{near[0]}`?" if near else None,
        )  # fmt: skip
    return value


def _tools(value: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError("tools are not a list of functions", field="tools", found=value, expected='[{"type": "function", …}]')
    return value


def check_text(text: str, name: str) -> None:
    """Raises `DataError` for a text that can't be encoded."""
    if not is_whole(text):
        raise DataError(HALF, field=name, found=text, fix="write the row as valid Unicode")
