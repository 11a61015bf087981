"""Tool calls in generated text: the inverse of what a chat template writes, whole or piece by piece.

One state machine reads both ways, so a streamed answer and the same answer read at once have the same content and calls.
A call is given out when it is complete: JSON that breaks off or is wrong stays content, and content once sent can't be unsent.
Where calls are forced there is no content.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from tutelage.tokenizer.detokenize import Vocabulary

MAX_NESTING = 100  # of brackets in the arguments of a call


def _new_id() -> str:
    return secrets.token_hex(5)[:9]  # nine letters and digits: Mistral's own templates refuse any other


@dataclass(slots=True, frozen=True)
class ToolCall:
    """A call that a model made. Calls are equal when they do the same; the id only ties the answer to the call.

    Example:
        >>> ToolCall("add", '{"a": 2, "b": 2}').to_json()["function"]
        {'name': 'add', 'arguments': '{"a": 2, "b": 2}'}
    """

    name: str
    arguments: str  # a JSON object, character for character as the model wrote it
    id: str = field(default_factory=_new_id, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The call in OpenAI's shape, as in a message's `tool_calls`."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(slots=True, frozen=True)
class CallStyle:
    """How a family of templates writes calls: content, `gap`, then `opening` JSON `closing` for each, `between` them."""

    name: str
    opening: str
    closing: str
    gap: str = ""  # between content and the first call
    between: str = ""
    key: str = "arguments"  # of the arguments in a call's JSON object
    listed: bool = False  # one JSON list holds all calls
    many: bool = True  # whether a turn may hold several
    most: int | None = None  # calls to give out of one answer, where the client wants no more; those beyond are left out
    forced: bool = False  # an answer is nothing but calls: what is none, as a call that was cut off, is left out
    control: tuple[tuple[str, int], ...] = ()  # marks that are control tokens in a tokenizer, with their ids

    @property
    def mark(self) -> str:
        """What tells a call from content."""
        return self.opening.strip() or '{"name"'

    @property
    def bare(self) -> bool:
        """A call without marks: a JSON object that begins a line and ends the turn."""
        return not self.opening

    @property
    def visible(self) -> frozenset[int]:
        """Control tokens that the text given to `ToolCallStream` and `parse_calls` must show, see `showing`."""
        return frozenset(i for _, i in self.control)


STYLES = (
    CallStyle("tagged", "<tool_call>", "</tool_call>"),
    CallStyle("qwen", "<tool_call>\n", "\n</tool_call>", gap="\n", between="\n"),
    CallStyle("mistral", "[TOOL_CALLS]", "", listed=True),
    CallStyle("llama3", "", "", gap="\n", key="parameters", many=False),
)
"""`tagged` is written by our templates `default` and `chatml`, the others by the templates of their name."""


def showing(vocabulary: Vocabulary, ids: Iterable[int]) -> Vocabulary:
    """The vocabulary with these control tokens shown by name: a stream of its text has the marks of calls in it."""
    if not (ids := tuple(ids)):
        return vocabulary
    shown = copy(vocabulary)
    shown.bytes = list(vocabulary.bytes)
    for i in ids:
        shown.bytes[i] = vocabulary.names[i].encode()
    return shown


def parse_calls(text: str, style: CallStyle) -> tuple[str, list[ToolCall]]:
    """Content and calls of a whole answer. Never raises: what is no complete call is content."""
    stream = ToolCallStream(style)
    stream.feed(text)
    stream.finish()
    return stream.content, stream.calls


def finish_reason(reason: str, calls: Iterable[ToolCall]) -> str:
    """OpenAI's reason: `tool_calls` only for calls in an answer that ended by itself; one cut off keeps its `length`."""
    return "tool_calls" if reason == "stop" and any(True for _ in calls) else reason


@dataclass(slots=True, frozen=True)
class Delta:
    """A piece of an answer: content, the beginning of a call (`name` and `id` set, no arguments yet), or its arguments."""

    content: str = ""
    index: int | None = None  # of the call; None for content
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    at: int = field(default=0, compare=False)  # where content begins in the text that was fed, calls included

    def to_json(self) -> dict[str, Any]:
        """The `delta` of a streamed chat completion."""
        if self.index is None:
            return {"content": self.content}
        if self.name is None:
            return {"tool_calls": [{"index": self.index, "function": {"arguments": self.arguments}}]}
        function = {"name": self.name, "arguments": ""}
        return {"tool_calls": [{"index": self.index, "id": self.id, "type": "function", "function": function}]}


class ToolCallStream:
    """Reads an answer as it comes. `content` and `calls` are what was given out so far."""

    def __init__(self, style: CallStyle) -> None:
        self.style = style
        self.calls: list[ToolCall] = []
        self._content: list[str] = []
        self._held = ""  # not given out: it may be a call, or white space around one
        self._fed = 0  # characters so far
        self._json: _JsonEnd | None = None  # inside what may be a call
        self._start = 0  # where its JSON begins in the held text
        self._read: list[ToolCall] = []  # of the JSON that was just completed
        self._line_start = True
        self._after_call = False

    @property
    def content(self) -> str:
        return "".join(self._content)

    def feed(self, text: str) -> list[Delta]:
        """What can be given out after this piece of text."""
        self._held += text
        self._fed += len(text)
        return list(self._advance(final=False))

    def finish(self) -> list[Delta]:
        """What is left at the end of the answer."""
        return list(self._advance(final=True))

    def _advance(self, final: bool) -> Iterator[Delta]:
        while self._held:
            before = len(self._held), self._json
            yield from self._read_call(final) if self._json else self._read_text(final)
            if (len(self._held), self._json) == before:
                return

    def _read_text(self, final: bool) -> Iterator[Delta]:
        """Gives content out up to where a call may begin."""
        at = self._find_mark()
        if at < 0:
            keep = self._may_belong_to_call(final)
            yield from self._give(len(self._held) - keep)
            if final:
                self._held = ""  # white space behind the last call
            return
        yield from self._give(at - self._gap_before(at))
        self._start = self._held.index(self.style.mark) + (0 if self.style.bare else len(self.style.mark))
        self._json = _JsonEnd(self._start, "[" if self.style.listed else "{")

    def _find_mark(self) -> int:
        at = self._held.find(self.style.mark)
        while self.style.bare and at >= 0 and not (self._held[at - 1] == "\n" if at else self._line_start):
            at = self._held.find(self.style.mark, at + 1)
        return at

    def _gap_before(self, at: int) -> int:
        """Length of the white space before `at` that belongs to the call and not to the content."""
        text = self._held[:at]
        if self._after_call and not text.strip():
            return at
        return len(self.style.gap) if text.endswith(self.style.gap) else 0

    def _may_belong_to_call(self, final: bool) -> int:
        """Length of the end of the held text that may be the beginning of a call, its gap included."""
        if final:
            return len(self._held) if self._after_call and not self._held.strip() else 0
        mark, held = self.style.mark, self._held
        begun = next((n for n in range(min(len(mark) - 1, len(held)), 0, -1) if held.endswith(mark[:n])), 0)
        return begun + self._gap_before(len(held) - begun)

    def _read_call(self, final: bool) -> Iterator[Delta]:
        """Gives a complete call out, or what can't become one as content."""
        try:
            end = self._call_end(final)
        except _BrokenError as broken:
            self._json = None
            yield from self._give(broken.at)
            return
        if end is None:
            return
        self._json, self._held = None, self._held[end:]
        self._after_call = True
        room = None if self.style.most is None else self.style.most - len(self.calls)
        for call in self._read[:room]:
            if call.id in {earlier.id for earlier in self.calls}:  # a model may write one twice
                call = ToolCall(call.name, call.arguments)
            index = len(self.calls)
            self.calls.append(call)
            yield Delta(index=index, id=call.id, name=call.name)
            yield Delta(index=index, arguments=call.arguments)

    def _call_end(self, final: bool) -> int | None:
        """The place behind the call, whose content is then in `_read`; None while it is not there. Raises `_BrokenError`.

        A closing mark that is missing at the end of the answer is forgiven: small models forget it.
        """
        assert self._json is not None
        end = self._json.find(self._held)
        if end is None:
            if final:
                raise _BrokenError(len(self._held))
            return None
        rest = self._held[end:].lstrip()
        at, closing = len(self._held) - len(rest), self.style.closing.strip()
        if (rest and self.style.bare) or not (rest.startswith(closing) or closing.startswith(rest)):
            raise _BrokenError(at)
        whole = rest.startswith(closing) and not self.style.bare
        if not whole and not final:
            return None
        self._read = _calls(self._held[self._start : end], self.style)
        after = (at + len(closing) if closing else end) if whole else len(self._held)
        if not self._read:
            raise _BrokenError(after)
        return after

    def _give(self, size: int) -> Iterator[Delta]:
        at = self._fed - len(self._held)
        text, self._held = self._held[:size], self._held[size:]
        if text:
            self._line_start = text[-1] == "\n"
            self._after_call = False
        if text and not self.style.forced:
            self._content.append(text)
            yield Delta(content=text, at=at)


class _BrokenError(Exception):
    """What looked like a call is none; `at` is where it breaks."""

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.at = at


class _JsonEnd:
    """Finds where a JSON value with brackets ends, in a text that grows; each character is looked at once."""

    _PLACE = re.compile(r'["\\{}\[\]]')

    def __init__(self, start: int, bracket: str) -> None:
        self._at, self._bracket = start, bracket
        self._depth = 0
        self._quoted = False
        self._end: int | None = None

    def find(self, text: str) -> int | None:
        """The place behind the value; None while it is not there. Raises `_BrokenError` for a text that is no such value."""
        if self._end is None and self._begun(text):
            self._end = self._scan(text)
        return self._end

    def _begun(self, text: str) -> bool:
        if not self._depth:
            while self._at < len(text) and text[self._at].isspace():
                self._at += 1
            if text[self._at : self._at + 1] not in ("", self._bracket):
                raise _BrokenError(self._at)
        return self._at < len(text)

    def _scan(self, text: str) -> int | None:
        while match := self._PLACE.search(text, self._at):
            self._at = match.end()
            if match[0] == "\\":
                self._at += self._quoted
            elif match[0] == '"':
                self._quoted = not self._quoted
            elif not self._quoted:
                self._depth += 1 if match[0] in "{[" else -1
                if self._depth > MAX_NESTING:
                    raise _BrokenError(self._at)
                if self._depth == 0:
                    return self._at
        self._at = max(self._at, len(text))
        return None


def _not_json(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_not_json)  # Python reads NaN and Infinity, which clients cannot
_SPACE = re.compile(r"[ \t\n\r]*")


def _calls(text: str, style: CallStyle) -> list[ToolCall]:
    """The calls that a JSON text says; none where any of them is not one."""
    try:
        calls = [_call(one, style) for one in (_items(text) if style.listed else [text])]
    except (ValueError, IndexError, RecursionError):
        return []
    return calls


def _call(text: str, style: CallStyle) -> ToolCall:
    """The call that a JSON object says. Raises `ValueError` or `IndexError` for anything else."""
    members = _members(text)
    name, _ = members.get("name", (None, ""))
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError("a call has a name")
    value, written = next((members[key] for key in (style.key, "arguments", "parameters") if key in members), (None, ""))
    if isinstance(value, str):  # some models write the object as a string
        value, written = _DECODER.decode(value), value
        written.encode()
    if not isinstance(value, dict):
        raise ValueError("arguments are an object")
    number, _ = members.get("id", (None, ""))
    return (
        ToolCall(name, written, number)
        if isinstance(number, str) and re.fullmatch(r"[\w-]+", number)
        else ToolCall(name, written)
    )


def _members(text: str) -> dict[str, tuple[Any, str]]:
    """The members of a JSON object: value, and text of the value."""
    out: dict[str, tuple[Any, str]] = {}
    at = _skip(text, _expect(text, _skip(text, 0), "{"))
    while text[at] != "}":
        if out:
            at = _skip(text, _expect(text, at, ","))
        key, at = _DECODER.raw_decode(text, at)
        at = _skip(text, _expect(text, _skip(text, at), ":"))
        value, end = _DECODER.raw_decode(text, at)
        if not isinstance(key, str):
            raise ValueError("a key is a text")
        out[key] = value, text[at:end]
        at = _skip(text, end)
    return out


def _items(text: str) -> list[str]:
    """The texts of a JSON list's items."""
    out: list[str] = []
    at = _skip(text, _expect(text, _skip(text, 0), "["))
    while text[at] != "]":
        if out:
            at = _skip(text, _expect(text, at, ","))
        _, end = _DECODER.raw_decode(text, at)
        out.append(text[at:end])
        at = _skip(text, end)
    return out


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _expect(text: str, at: int, character: str) -> int:
    if text[at] != character:
        raise ValueError(f"{character} is missing")
    return at + 1
