"""Pieces of rendered text and their token ids: cutting at proven borders, and keeping content from becoming control tokens."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import AddedToken

from tutelage.chat.message_keys import REASONING
from tutelage.errors import ArtifactError, DataError, Setting
from tutelage.tokenizer.load import TokenizerFolder

MARKS = range(
    0xE000, 0xF8FF
)  # Unicode's private-use characters: one that a conversation does not use marks a broken control token


@dataclass(slots=True, frozen=True)
class Region:
    """Where one answer stands in the text that ends with it: `after[start:end]`, its control token included."""

    turn: int
    before: str  # the prompt: the text up to the answer
    after: str  # the text up to the end of the turn, and what the template writes behind it
    end: int | None  # None: no control token ends it

    @property
    def start(self) -> int:
        return len(self.before)


@dataclass(slots=True, frozen=True)
class Piece:
    text: str
    supervised: bool
    content: bool = False  # True: nothing in it is a template's word (prompt/completion rows)


@dataclass(slots=True, frozen=True)
class Sample:
    """A rendered text in pieces, before it is tokenized."""

    pieces: tuple[Piece, ...]
    mark: str = ""  # the character that breaks control tokens inside content; "" where there were none
    turn: int | None = None
    document: bool = False  # True: stands between BOS and EOS

    @property
    def text(self) -> str:
        return "".join(p.text for p in self.pieces)


def cut(text: str, regions: Sequence[Region], train: Sequence[bool], mark: str, turn: int | None = None) -> Sample:
    """`text` cut at the start and end of each region, which are supervised where `train` says so."""
    pieces, at = [], 0
    for region, supervised in zip(regions, train, strict=True):
        assert region.end is not None and at <= region.start < region.end <= len(text)
        pieces += [Piece(text[at : region.start], False), Piece(text[region.start : region.end], supervised)]
        at = region.end
    pieces.append(Piece(text[at:], False))
    return Sample(tuple(p for p in pieces if p.text), mark, turn)


def completion(prompt: str, answer: str) -> Sample:
    return Sample((Piece(prompt, False, content=True), Piece(answer, True, content=True)), document=True)


def supervised_spans(sample: Sample) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text without marks, and its supervised parts in characters."""
    parts: list[str] = []
    borders: list[tuple[int, int]] = []
    at = 0
    for piece in sample.pieces:
        text = piece.text.replace(sample.mark, "") if sample.mark else piece.text
        if piece.supervised and text:
            borders.append((at, at + len(text)))
        parts.append(text)
        at += len(text)
    return "".join(parts), tuple(borders)


def missing(region: Region, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str | None:
    """What the template left out, in words, or None: nothing of a conversation may vanish without being noticed."""
    if region.end is None:
        return "ends the assistant's turn without a control token, so a model could not learn to stop"
    answer = messages[region.turn]
    written = region.after[region.start : region.end]
    if not _holds(written, answer["content"]):
        return "changes or drops the assistant's answer"
    if not _holds(written, answer.get(REASONING[0]) or ""):
        return "changes or drops the assistant's reasoning"
    if any(call["function"]["name"] not in written for call in answer.get("tool_calls") or ()):
        return "drops the assistant's tool calls"
    for i in range(region.turn - 1, -1, -1):
        if messages[i]["role"] == "assistant":
            return None  # what stands before it was looked at with that answer
        if not _holds(region.before, messages[i]["content"]):
            return f"drops or changes the {messages[i]['role']} turn at messages[{i}]"
    names = [tool.get("function", tool).get("name", "") for tool in tools]
    if any(name not in region.before for name in names):
        return "drops the tools"
    return None


def _holds(text: str, content: str) -> bool:
    """Whether `content` stands in `text`: as it is, as a JSON string, or but for white space."""
    if content.strip() in text or json.dumps(content, ensure_ascii=False)[1:-1] in text:
        return True
    return "".join(content.split()) in "".join(text.split())


class PieceEncoder:
    """Token ids of pieces. Thread-safe after construction."""

    def __init__(self, tokenizer: TokenizerFolder) -> None:
        self.tokenizer = tokenizer
        tokens = sorted(tokenizer.control_tokens.items(), key=lambda item: -len(item[0]))
        self._control = re.compile("|".join(_pattern(token) for _, token in tokens) or r"(?!)")
        self._control_ids = {name: tokenizer.tokenizer.get_vocab()[name] for name, _ in tokens}
        self._names = re.compile("|".join(re.escape(name) for name, _ in tokens) or r"(?!)")

    def guard(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
        """Messages and tools with a mark inside every control token that their content spells; the mark, or ""."""
        if not self.spells_control([messages, tools]):
            return messages, tools, ""
        used = set().union(*_strings([messages, tools]))
        mark = next(chr(code) for code in MARKS if chr(code) not in used)

        def split(match: re.Match[str]) -> str:
            return match[0][:1] + mark + match[0][1:]

        def walk(value: Any) -> Any:
            if isinstance(value, str):
                while (broken := self._names.sub(split, value)) != value:  # one control token may stand inside another
                    value = broken
                return value
            if isinstance(value, dict):
                return {walk(k): walk(v) for k, v in value.items()}
            return [walk(v) for v in value] if isinstance(value, list | tuple) else value

        return walk(messages), walk(tools), mark

    def spells_control(self, value: Any) -> bool:
        return any(self._names.search(s) for s in _strings(value))

    def last_control(self, text: str, start: int) -> int | None:
        """Where the last control token of `text[start:]` ends (with the white space that the token swallows)."""
        end = None
        for match in self._control.finditer(text, start):
            end = match.end()
        return end

    def last_control_id(self, text: str) -> int:
        name = [match[0].strip() for match in self._control.finditer(text)][-1]
        return self._control_ids[name]

    @cached_property
    def cuttable(self) -> bool:
        """Whether a piece has the same ids alone as behind other text: not where a space is put before a text's first word."""
        tokenizer = self.tokenizer.tokenizer

        def ids(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

        alone = ids("y")
        after_control = all(ids(name + "y")[1:] == alone for name in list(self.tokenizer.control_tokens)[:1])
        return ids("\n\ny")[-len(alone) :] == alone and after_control

    def encode(self, samples: Sequence[Sample]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids (int32) and mask (uint8) of each sample."""
        if not self.cuttable:
            yield from (self._encode_whole(sample) for sample in samples)
            return
        pieces = [(piece, sample.mark) for sample in samples for piece in sample.pieces]
        encoded = iter(self.pieces(pieces))
        for sample in samples:
            parts = [next(encoded) for _ in sample.pieces]
            yield self._join(sample, parts, [p.supervised for p in sample.pieces])

    def _join(self, sample: Sample, parts: list[list[int]], supervised: list[bool]) -> tuple[np.ndarray, np.ndarray]:
        if sample.document:
            parts = [self.tokenizer.document_prefix, *parts, self.tokenizer.document_suffix]
            supervised = [False, *supervised, True]  # promise 4: the end token is supervised
        mask = np.repeat(np.array(supervised, dtype=np.uint8), [len(p) for p in parts])
        return np.fromiter((i for part in parts for i in part), dtype=np.int32, count=len(mask)), mask

    def pieces(self, pieces: Sequence[tuple[Piece, str]]) -> list[list[int]]:
        """Ids of (piece, mark) pairs. Control tokens come only from a template's own words."""
        out: list[list[int] | None] = [None] * len(pieces)
        simple = []
        for i, (piece, mark) in enumerate(pieces):
            if piece.content:
                out[i] = self._content(piece.text)
            elif mark and mark in piece.text:
                out[i] = self._guarded(piece.text, mark)
            else:
                simple.append(i)
        batch = self.tokenizer.tokenizer.encode_batch_fast([pieces[i][0].text for i in simple], add_special_tokens=False)
        for i, encoding in zip(simple, batch, strict=True):
            out[i] = encoding.ids
        return [ids for ids in out if ids is not None]

    def _guarded(self, text: str, mark: str) -> list[int]:
        """The template's control tokens one by one, what stands between them as content with its marks taken out."""
        ids: list[int] = []
        at = 0
        for match in self._control.finditer(text):
            ids += self._content(text[at : match.start()].replace(mark, ""))
            ids.append(self._control_ids[match[0].strip()])
            at = match.end()
        return ids + self._content(text[at:].replace(mark, ""))

    def _content(self, text: str) -> list[int]:
        ids = self.tokenizer.encode_text(text)
        if not self.tokenizer.control_ids.isdisjoint(ids):
            raise DataError(
                "this tokenizer turns the text of a message into a control token",
                found=text,
                expected="a tokenizer that can spell its control tokens",
                fix="remove the control token's text from the data",
            )
        return ids

    def _encode_whole(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """For tokenizers that are not cuttable: one call, borders by offsets, and proof that each prompt's ids come first."""
        text = sample.text
        if sample.mark:
            self._refuse_marks(text)
        encoder = self.tokenizer.plain if sample.document else self.tokenizer.tokenizer
        encoding = encoder.encode(text, add_special_tokens=False)
        starts = [a for a, _ in encoding.offsets]
        cuts, flags, at = [0], [], 0
        for piece in sample.pieces:
            at += len(piece.text)
            flags.append(piece.supervised)
            cuts.append(next((i for i in range(cuts[-1], len(starts)) if starts[i] >= at), len(starts)))
            if (
                not piece.supervised
                and encoder.encode(text[:at], add_special_tokens=False).ids != encoding.ids[: cuts[-1]]
                and at < len(text)
            ):
                raise ArtifactError(
                    "a token of this tokenizer reaches over the border between a prompt and its answer",
                    file=self.tokenizer.folder,
                    found=text[max(0, at - 20) : at + 20],
                    expected="the ids of the prompt to begin the ids of the whole text",
                    fix=f"choose a template with a control token before the answer ({Setting('template', 'NAME')})",
                )
        parts = [encoding.ids[a:b] for a, b in itertools.pairwise(cuts)]
        return self._join(sample, parts, flags)

    def prompt(self, text: str, regions: Sequence[Region], mark: str) -> list[int]:
        """Ids of a served prompt, cut where training cuts it."""
        if self.cuttable:
            sample = cut(text, regions, [False] * len(regions), mark)
            return [i for part in self.pieces([(p, mark) for p in sample.pieces]) for i in part]
        if mark:
            self._refuse_marks(text)
        return list(self.tokenizer.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def _refuse_marks(self, text: str) -> None:
        raise DataError(
            "a message spells a control token, which this tokenizer cannot write as plain text",
            found=text,
            expected="messages without " + ", ".join(list(self.tokenizer.control_tokens)[:6]),
            fix="remove the control token's text from the data",
        )


def _pattern(token: AddedToken) -> str:
    """How a control token is found in a text, with the white space it swallows."""
    return (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
