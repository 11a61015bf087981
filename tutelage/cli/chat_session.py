"""A conversation with one engine, and the commands that a line beginning with `/` gives to it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.errors import ConfigError, DataError
from tutelage.log import say
from tutelage.unicode import HALF, half_character

if TYPE_CHECKING:
    from tutelage.engine import Engine, Sampling

PARAMETERS = (
    "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
NARROW = "/undo takes the last exchange back, /reset forgets all, /save FILE keeps it first"


@dataclass(slots=True, frozen=True)
class Answer:
    """What the model said to one message."""

    text: str
    tokens: int  # made
    seconds: float
    context: int  # tokens of the conversation now

    def line(self, context_length: int) -> str:
        speed = self.tokens / self.seconds
        return f"{self.tokens} tokens, {speed:,.0f} tokens/s; {self.context:,} of {context_length:,} tokens of context used"


class Chat:
    """What was said so far, and how to go on. Nothing of it is ever cut to fit the model."""

    def __init__(self, engine: Engine, system: str | None, sampling: Sampling) -> None:
        self.engine, self.sampling = engine, sampling
        self.messages: list[dict[str, Any]] = []
        self.system = system
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str, write: Callable[[str], Any]) -> Answer:
        """Says `text`, writes the answer as it comes. An interrupted one is kept as far as it got.

        Raises `DataError` when the conversation fills the context, or is no valid Unicode, which leaves it as it was.
        """
        turns = [*self.messages, {"role": "user", "content": text}]
        if at := half_character(turns):
            raise DataError(HALF, field=f"messages{at}", expected="valid Unicode", fix="type it again, or /reset")
        used, started = len(self.engine.encode(turns)), time.monotonic()
        sampling, room = self._sampling(used)
        pieces: list[str] = []
        tokens, reason = 0, None
        events = self.engine.stream(turns, sampling)
        with contextlib.closing(events):  # type: ignore[type-var]
            try:
                for event in events:
                    pieces.append(event.text)
                    tokens, reason = tokens + len(event.ids), event.finish_reason
                    write(event.text)
            except KeyboardInterrupt:
                say(" (stopped)", style="dim")
        if tokens:
            self.messages = [*turns, {"role": "assistant", "content": "".join(pieces)}]
        if reason == "length":
            self._say_cut(tokens == room)
        return Answer("".join(pieces), tokens, time.monotonic() - started, used + tokens)

    def _sampling(self, used: int) -> tuple[Sampling, int]:
        """The sampling that the context has room for, and that room in tokens."""
        context = self.engine.context_length
        room = context - used
        if room < 1:
            raise DataError(
                "the conversation is longer than the context of the model", found=f"{used} tokens with this message",
                expected=f"fewer than {context}", fix=NARROW,
            )  # fmt: skip
        wanted = self.sampling.max_tokens
        return (self.sampling if wanted is not None and wanted <= room else replace(self.sampling, max_tokens=room)), room

    def _say_cut(self, full: bool) -> None:
        if full:
            say(f" (cut: the context of {self.engine.context_length} tokens is full; {NARROW})", style="yellow")
        else:
            say(f" (cut at max_tokens={self.sampling.max_tokens}; /params max_tokens=N for longer answers)", style="dim")

    def undo(self) -> str | None:
        """Removes the last exchange. Returns its question, or None where there is none."""
        last = next((i for i in range(len(self.messages) - 1, -1, -1) if self.messages[i]["role"] == "user"), None)
        if last is None:
            return None
        question = str(self.messages[last]["content"])
        del self.messages[last:]
        return question

    def set(self, settings: list[str]) -> None:
        """Changes sampling parameters given as `name=value`. Raises `ConfigError`, and then changes none."""
        from tutelage.config.base import nearest, parse_set

        values: dict[str, Any] = {}
        for setting in settings:
            name, value = parse_set(setting)
            if name not in PARAMETERS:
                near = nearest(name, list(PARAMETERS))
                raise ConfigError(
                    f"unknown parameter `{name}`", expected=f"one of: {', '.join(PARAMETERS)}",
                    fix=f"did you mean `{near}`?" if near else None,
                )  # fmt: skip
            if name == "seed" and not (value is None or type(value) is int):
                raise ConfigError(
                    "not a seed", field="seed", found=value, expected="a whole number, or null for another each time"
                )
            values[name] = value
        self.sampling = replace(self.sampling, **values)

    def save(self, path: Path) -> int:
        """Writes the conversation as a line of OpenAI messages, which `tutelage data --kind conversations` reads; returns
        how many the file has now.

        A file that ends with the beginning of this conversation gets the whole of it there; else it gets one line more.
        Raises `DataError` for a conversation that could not be trained on, and for a file that holds something else.
        """
        from tutelage.data.sources.conversations import to_conversation
        from tutelage.files import whole_file

        to_conversation({"messages": self.messages}, file=path)
        kept = read_conversations(path) if path.exists() else []
        if kept and kept[-1].fields.keys() == {"messages"} and kept[-1].messages == self.messages[: len(kept[-1].messages)]:
            kept.pop()
        with whole_file(path, option="/save FILE") as f:
            for row in [*(k.fields for k in kept), {"messages": self.messages}]:
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
        return len(kept) + 1

    def load(self, path: Path) -> int:
        """Goes on with the last conversation of a file; returns how many the file has. Raises `DataError`."""
        found = read_conversations(path)
        if not found:
            raise DataError("no conversation in this file", file=path, expected='a line such as {"messages": […]}')
        if found[-1].tools:
            raise DataError(
                "this conversation has tools, which a chat cannot offer", file=path, field="tools", found=len(found[-1].tools),
                expected="a conversation without tools", fix="serve the model and send it the tools",
            )  # fmt: skip
        self.messages = found[-1].messages
        self.system = self.messages[0]["content"] if self.messages[0]["role"] == "system" else None
        return len(found)


@dataclass(slots=True, frozen=True)
class Saved:
    """A row of a file of conversations."""

    fields: dict[str, Any]  # as the file has them
    messages: list[dict[str, Any]]
    tools: tuple[dict[str, Any], ...]


def read_conversations(path: Path) -> list[Saved]:
    """The conversation of each line of a JSONL file, as `tutelage sft` reads it. Raises `DataError`."""
    from tutelage.data.sources.conversations import to_conversation
    from tutelage.data.sources.readers_base import ReadOptions, Rejections, Row
    from tutelage.data.sources.readers_files import read_jsonl

    if not path.is_file():
        raise DataError("no such file", file=path, fix="check the path; /save FILE makes one")
    out = []
    for row in read_jsonl(path, ReadOptions(kind="conversations"), Rejections()):
        if isinstance(row, Row):
            made = to_conversation(row.fields, file=path, line=row.line)
            out.append(Saved(row.fields, [message.to_json() for message in made.messages], made.tools))
    return out


def command(talk: Chat, line: str) -> bool:
    """Does what a line beginning with `/` says; False to leave. Raises `UserError`s."""
    from tutelage.config.base import nearest

    word, _, rest = line.partition(" ")
    if word not in COMMANDS:
        near = nearest(word, list(COMMANDS))
        hint = f"did you mean {near}? " if near else ""
        raise ConfigError(
            f"no command {word}", fix=f"{hint}/help lists them; a message that begins with / needs a space before it"
        )
    return COMMANDS[word][1](talk, rest.strip()) is not False


def _help(talk: Chat, _: str) -> None:
    for name, (text, _do) in COMMANDS.items():
        say(f"{name:<8} {text}")
    say(
        'A line that ends in \\ goes on in the next; """ begins and ends a block of lines. Ctrl-C stops an answer, Ctrl-D leaves.'
    )


def _system(talk: Chat, rest: str) -> None:
    talk.system = rest or None
    talk.reset()
    say("instructions set, conversation forgotten" if rest else "no instructions, conversation forgotten", style="dim")


def _params(talk: Chat, rest: str) -> None:
    talk.set(rest.split())
    say("  ".join(f"{name}={getattr(talk.sampling, name)}" for name in PARAMETERS), style="dim")


def _save(talk: Chat, rest: str) -> None:
    path = _path(rest, "/save")
    count = talk.save(path)
    say(f"saved; {path} has {count} conversation{'s' if count > 1 else ''}", style="dim")


def _load(talk: Chat, rest: str) -> None:
    path = _path(rest, "/load")
    count = talk.load(path)
    said = f"{len(talk.messages)} messages" + (f", the last of {count} conversations" if count > 1 else "")
    used, context = len(talk.engine.encode(talk.messages)), talk.engine.context_length
    say(f"loaded {said}; {used:,} of {context:,} tokens of context used", style="dim")


def _path(rest: str, word: str) -> Path:
    if not rest:
        raise ConfigError(f"{word} needs a file", expected=f"{word} talk.jsonl")
    return Path(rest).expanduser()


def _reset(talk: Chat, _: str) -> None:
    talk.reset()
    say("conversation forgotten", style="dim")


def _undo(talk: Chat, _: str) -> None:
    question = talk.undo()
    say("nothing to take back" if question is None else f"taken back: {question}", style="dim")


def _exit(_talk: Chat, _: str) -> bool:
    return False


COMMANDS: dict[str, tuple[str, Callable[[Chat, str], bool | None]]] = {
    "/system": ("TEXT sets the instructions, and forgets the conversation; without TEXT there are none", _system),
    "/params": ("shows how answers are sampled; temperature=0.2 top_p=0.9 max_tokens=200 changes it", _params),
    "/save": (
        "FILE writes the conversation as a line of OpenAI messages, which `tutelage data --kind conversations` reads",
        _save,
    ),
    "/load": ("FILE goes on with the last conversation of such a file", _load),
    "/undo": ("takes the last exchange back", _undo),
    "/reset": ("forgets the conversation, not the instructions", _reset),
    "/help": ("this list", _help),
    "/exit": ("leaves", _exit),
    "/quit": ("leaves", _exit),
}
