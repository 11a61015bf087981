"""Records: what travels between stages. Plain frozen dataclasses, one JSON object a line on disk.

A record's `id` comes from its content, so equal content has an equal id wherever it was read. `parents` holds the
ids of the records it was made from: that chain is what later answers "why did it say that?".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from tutelage.errors import DataError

SCHEMA_VERSION = 1
RECORD_TYPES = {
    "documents": "Document",
    "conversations": "Conversation",
    "preferences": "Preference",
    "ratings": "Rating",
    "prompts": "Prompt",
    "examples": "Example",
}
"""The type of records of a `kind`."""


def content_id(value: object) -> str:
    """16 hex digits (64 bits of SHA-256) of the canonical JSON of `value`."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(slots=True, frozen=True, kw_only=True)
class Document:
    """A text to learn from.

    Example:
        >>> Document.make("A text.", source="notes.txt").id
        '4d57ee97f1174f55'
    """

    id: str  # from the text
    text: str  # Unicode, never empty
    source: str  # file, URL or reader name, with "#" and a position inside it where there is one
    parents: tuple[str, ...] = ()  # ids of the records it was made from
    licence: str | None = None  # SPDX id where known
    meta: dict[str, Any] = field(default_factory=dict)  # title, language, ...; never part of the id

    @classmethod
    def make(cls, text: str, *, source: str, **rest: Any) -> Document:
        return cls(id=content_id(text), text=text, source=source, **rest)


@dataclass(slots=True, frozen=True, kw_only=True)
class Message:
    """One turn. `content` may be empty only for an assistant turn that calls tools."""

    role: str  # system | user | assistant | tool
    content: str
    reasoning_content: str | None = None  # what the assistant thought before it; learnt with the turn
    name: str | None = None  # of the tool that answers, or of the speaker
    tool_calls: tuple[dict[str, Any], ...] = ()  # OpenAI shape: {"id", "type": "function", "function": {...}}
    tool_call_id: str | None = None  # on a tool turn: the call it answers
    train: bool | None = None  # None: assistant turns are supervised; False leaves this one out

    def to_json(self) -> dict[str, Any]:
        """The OpenAI message: only the keys that say something (templates test for presence)."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        for key in ("reasoning_content", "name", "tool_call_id", "train"):
            if getattr(self, key) is not None:
                out[key] = getattr(self, key)
        if self.tool_calls:
            out["tool_calls"] = [dict(call) for call in self.tool_calls]
        return out

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Message:
        return cls(**{**row, "tool_calls": tuple(row.get("tool_calls") or ())})


@dataclass(slots=True, frozen=True, kw_only=True)
class Conversation:
    """A dialogue, or a prompt and its completion (`style="completion"`: rendered without a chat template).

    Example:
        {"id": "…", "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], …}
    """

    id: str  # from messages and tools
    messages: tuple[Message, ...]
    source: str
    tools: tuple[dict[str, Any], ...] = ()  # JSON schemas offered to the assistant, verbatim
    style: str = "chat"  # chat | completion
    parents: tuple[str, ...] = ()
    licence: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)  # task name, expected answer, ...; never part of the id

    @classmethod
    def make(cls, messages: Iterable[Message], *, source: str, tools: Iterable[dict[str, Any]] = (), **rest: Any) -> Conversation:
        turns, offered = tuple(messages), tuple(tools)
        key = [[m.to_json() for m in turns], list(offered)]
        return cls(id=content_id(key), messages=turns, tools=offered, source=source, **rest)


@dataclass(slots=True, frozen=True, kw_only=True)
class Preference:
    """Two answers to one prompt, and which of them is preferred.

    Example:
        {"id": "…", "prompt": [{"role": "user", "content": "2+2?"}], "chosen": [{"role": "assistant", "content": "4"}],
         "rejected": [{"role": "assistant", "content": "5"}], …}
    """

    id: str  # from prompt, answers and tools
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    source: str
    margin: float | None = None  # by how much the chosen one is better, where people said so
    tools: tuple[dict[str, Any], ...] = ()
    style: str = "chat"  # chat | completion
    parents: tuple[str, ...] = ()
    licence: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def make(
        cls, prompt: Iterable[Message], chosen: Iterable[Message], rejected: Iterable[Message], *, source: str,
        tools: Iterable[dict[str, Any]] = (), **rest: Any,
    ) -> Preference:  # fmt: skip
        parts, offered = [tuple(turns) for turns in (prompt, chosen, rejected)], tuple(tools)
        key = [[[m.to_json() for m in turns] for turns in parts], list(offered)]
        return cls(id=content_id(key), prompt=parts[0], chosen=parts[1], rejected=parts[2], tools=offered, source=source, **rest)


@dataclass(slots=True, frozen=True, kw_only=True)
class Rating:
    """One answer to a prompt, with what was said of it: of the whole (`scores`), or of each step (`step_scores`).

    Example:
        {"id": "…", "prompt": […], "answer": [{"role": "assistant", "content": "4"}], "scores": {"desirable": 1.0}, …}
    """

    id: str  # from prompt, answer and tools
    prompt: tuple[Message, ...]
    answer: tuple[Message, ...]
    source: str
    scores: dict[str, float] = field(default_factory=dict)  # by aspect; "desirable" is 1 or 0
    steps: tuple[str, ...] = ()  # parts of the last message, which joined give its content
    step_scores: tuple[float, ...] = ()  # one a step: 1 right, 0 wrong, or between
    tools: tuple[dict[str, Any], ...] = ()
    style: str = "chat"
    parents: tuple[str, ...] = ()
    licence: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def make(
        cls, prompt: Iterable[Message], answer: Iterable[Message], *, source: str, tools: Iterable[dict[str, Any]] = (),
        **rest: Any,
    ) -> Rating:  # fmt: skip
        parts, offered = [tuple(turns) for turns in (prompt, answer)], tuple(tools)
        key = [[[m.to_json() for m in turns] for turns in parts], list(offered)]
        return cls(id=content_id(key), prompt=parts[0], answer=parts[1], tools=offered, source=source, **rest)


@dataclass(slots=True, frozen=True, kw_only=True)
class Prompt:
    """What a model is asked, and what is known of a right answer.

    Example:
        {"id": "…", "messages": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4", …}
    """

    id: str  # from messages and tools
    messages: tuple[Message, ...]
    source: str
    answer: str | None = None  # what a verifier compares with
    tools: tuple[dict[str, Any], ...] = ()
    style: str = "chat"
    parents: tuple[str, ...] = ()
    licence: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)  # task name, unit tests, a JSON schema, …

    @classmethod
    def make(cls, messages: Iterable[Message], *, source: str, tools: Iterable[dict[str, Any]] = (), **rest: Any) -> Prompt:
        turns, offered = tuple(messages), tuple(tools)
        key = [[m.to_json() for m in turns], list(offered)]
        return cls(id=content_id(key), messages=turns, tools=offered, source=source, **rest)

    @classmethod
    def of(cls, conversation: Conversation) -> Prompt:
        """What a conversation asks last. The expected answer is `meta["answer"]`, or else what the assistant says."""
        *before, last = conversation.messages
        asked, said = (before, last.content) if last.role == "assistant" else (conversation.messages, None)
        return cls.make(
            asked, source=conversation.source, tools=conversation.tools, style=conversation.style,
            answer=conversation.meta.get("answer", said), parents=(conversation.id,), licence=conversation.licence,
            meta=conversation.meta,
        )  # fmt: skip


@dataclass(slots=True, frozen=True, kw_only=True)
class Span:
    """A part of a text, and what it is."""

    start: int  # characters of the text
    end: int  # the first character behind it
    label: str


@dataclass(slots=True, frozen=True, kw_only=True)
class Example:
    """A text, or a pair of texts, with what it is: one class, several or none of them, or parts of it that are something.

    Example:
        {"id": "…", "text": "Shares fell again.", "label": "Business", …}
        {"id": "…", "text": "Ada lives in Kent.", "spans": [{"start": 0, "end": 3, "label": "PERSON"}], …}
    """

    id: str  # from text and pair: one text has one answer
    text: str
    source: str
    pair: str | None = None  # the second text, where a question is about two
    label: str | None = None
    labels: tuple[str, ...] = ()  # where a text may have several
    spans: tuple[Span, ...] = ()  # ascending, apart from one another
    parents: tuple[str, ...] = ()
    licence: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def make(cls, text: str, *, source: str, pair: str | None = None, **rest: Any) -> Example:
        return cls(id=content_id(text if pair is None else [text, pair]), text=text, pair=pair, source=source, **rest)


@dataclass(slots=True, frozen=True, kw_only=True)
class Rollout:
    """An answer that a model gave while it learned: the very ids, and how each was judged.

    Example:
        {"id": "3/0f3a…/1", "prompt": "0f3a…", "step": 3, "sample": 1, "text": "4", "reward": 1.0, "terms": {"exact": 1.0}, …}
    """

    id: str  # step/prompt/sample
    prompt: str  # id of the prompt's record
    step: int  # of the optimizer, for which it was made
    sample: int  # which of the group
    version: int  # steps that the weights had made
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]  # of the answer; of several turns, with what stands between them
    mask: tuple[int, ...]  # 1: the model made this id; 0: a tool's or environment's words
    logprobs: tuple[float, ...]  # of each id by the engine; 0 where the mask is 0
    text: str
    finish_reason: str  # stop | length | …
    source: str | None = None  # of the prompt's record: file#line
    messages: tuple[Message, ...] = ()  # the answer as turns: the model's and the tools'
    answer: str | None = None  # what was expected
    reward: float | None = None
    terms: dict[str, float] = field(default_factory=dict)  # the reward's parts, before their weights
    advantage: float | None = None
    used: bool = True  # False: left out of training, for the reason in meta["left_out"]
    meta: dict[str, Any] = field(default_factory=dict)  # the prompt's own, and what rewards have to tell


Record = Document | Conversation | Preference | Rating | Prompt | Example | Rollout
R = TypeVar("R", bound=Record)
TYPES: dict[str, type] = {kind.__name__: kind for kind in (Document, Conversation, Preference, Rating, Prompt, Example, Rollout)}
TURNS = ("messages", "prompt", "chosen", "rejected", "answer")  # fields that hold messages, where they hold tuples or lists
_MADE: dict[str, Any] = {**dict.fromkeys(TURNS, Message.from_json), "spans": lambda row: Span(**row)}


def to_json(record: Record) -> dict[str, Any]:
    """The JSON object of a record, without empty optional fields."""
    out: dict[str, Any] = {}
    for f in fields(record):
        value = getattr(record, f.name)
        optional = f.default is not MISSING or f.default_factory is not MISSING
        if value in ((), {}, None) and optional:
            continue
        if isinstance(value, tuple) and value and isinstance(value[0], Message):
            value = [m.to_json() for m in value]
        elif isinstance(value, tuple) and value and isinstance(value[0], Span):
            value = [asdict(span) for span in value]
        out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def from_json(kind: type[R], row: dict[str, Any]) -> R:
    """The record of a JSON object that `to_json` made. Raises `TypeError` for a field that is missing or unknown."""
    row = dict(row)
    for key, value in row.items():
        if isinstance(value, list):
            row[key] = tuple(_MADE[key](m) for m in value) if key in _MADE else tuple(value)
    return kind(**row)


def dump_line(record: Record) -> str:
    return json.dumps(to_json(record), ensure_ascii=False)


def spread(records: list[Any], limit: int) -> list[Any]:
    """`limit` records evenly spread over the list; all where limit is 0."""
    if not limit or len(records) <= limit:
        return records
    return [records[i * len(records) // limit] for i in range(limit)]


def read_records(path: Path, kind: type[R]) -> Iterator[R]:
    """Records of a JSONL file that a stage wrote."""
    with path.open(encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                yield from_json(kind, json.loads(line))
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(
                    f"not a {kind.__name__} record ({error})",
                    file=path,
                    line=number,
                    found=line.strip(),
                    fix="rerun the stage that wrote this file with --force",
                ) from error
