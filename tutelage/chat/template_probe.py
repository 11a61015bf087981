"""Tries a chat template in a worker process before it runs here: a template is a program, and one from a stranger may run without
end or write gigabytes. The shipped ones are not tried."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tutelage.chat.templates import compile_template, styles
from tutelage.errors import ArtifactError
from tutelage.workers import Workers

SECONDS = 10.0  # of processor time for the conversations below
MAX_CHARS = 10_000_000  # of text for one of them
_TURNS = [("system", "a"), ("user", "b"), ("assistant", "<think>\nc\n</think>\n\nd"), ("user", "e"), ("assistant", "f")]


def probe_template(source: str, variables: Mapping[str, Any], file: Path) -> None:
    """Raises `ArtifactError` naming `file` for a template that takes more than `SECONDS` of processor time, 1 GiB of memory or
    `MAX_CHARS` of text for short conversations. What it refuses in another way is for the caller to find out."""
    if any(source == each.source for each in styles().values()):
        return
    found = _tried(source, tuple(sorted((name, value) for name, value in variables.items() if isinstance(value, str))))
    if found:
        raise ArtifactError(
            "the chat template takes too long, or too much memory", file=file, found=found,
            expected=f"short conversations within {SECONDS:g} s of processor time, 1 GiB and {MAX_CHARS:,} characters",
            fix="mend the template, or take it out and fine-tune with a style",
        )  # fmt: skip


@functools.lru_cache(64)
def _tried(source: str, variables: tuple[tuple[str, str], ...]) -> str:
    """What was too much; empty if nothing was."""
    workers = Workers(f"{__name__}:longest_text", dict(variables), seconds=SECONDS, bounded=True)
    try:
        answer = workers.ask(source)
    finally:
        workers.close()
    return answer.lost or (f"{answer.value:,} characters" if (answer.value or 0) > MAX_CHARS else "")


def longest_text(variables: dict[str, Any]) -> Callable[[str], int]:
    """The worker's side: the characters of the longest text that a template makes of short conversations."""
    messages = [{"role": role, "content": content} for role, content in _TURNS]

    def longest(source: str) -> int:
        render, size = compile_template(source), 0
        for turns, prompt in ((messages[1:2], True), (messages[:2], True), (messages[1:], False), (messages, False)):
            try:
                text = render(messages=turns, tools=None, documents=None, add_generation_prompt=prompt, **variables)
            except MemoryError:
                raise
            except Exception:  # a template may refuse some conversations, by any exception
                continue
            size = max(size, len(text))
        return size

    return longest
