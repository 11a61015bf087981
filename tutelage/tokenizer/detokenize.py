"""From tokens to text, one token at a time: whole characters only, and nothing that a stop text may still swallow."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """The inverse of the byte-level alphabet: printable bytes stand for themselves, the others for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _decoders(node: Any) -> set[str]:
    """Names of all decoders in the `decoder` part of a tokenizer.json."""
    if not isinstance(node, dict):
        return set()
    inner: set[str] = set().union(*(_decoders(d) for d in node.get("decoders", ())))
    return inner | {str(node.get("type"))}


class Vocabulary:
    """The bytes of each token. `spec` is the content of a tokenizer.json.

    Special tokens and the ids in `control` have no bytes: they are not text. A byte-level tokenizer gives its pieces,
    a SentencePiece one (Llama 2, Gemma) gives a space for "▁" and one byte for "<0xNN>". A leading space is kept: what is decoded
    here continues a text.
    """

    def __init__(self, spec: dict[str, Any], control: Iterable[int] = ()) -> None:
        vocab: dict[str, int] | list[list[Any]] = spec["model"]["vocab"]
        pieces = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        byte_level = "ByteLevel" in _decoders(spec.get("decoder"))
        size = 1 + max((*pieces.values(), *(t["id"] for t in spec.get("added_tokens", ()))), default=-1)
        self.names = [""] * size  # what a token is called
        self.bytes = [b""] * size
        for piece, i in pieces.items():
            self.names[i] = piece
            self.bytes[i] = _byte_level(piece) if byte_level else _sentencepiece(piece)
        for token in spec.get("added_tokens", ()):
            self.names[token["id"]] = token["content"]
            self.bytes[token["id"]] = b"" if token.get("special") else token["content"].encode()
        for i in control:
            self.bytes[i] = b""

    def __len__(self) -> int:
        return len(self.bytes)

    def of(self, token: int) -> bytes:
        """Bytes of a token; none for one the tokenizer does not know (a model's vocabulary may be padded)."""
        return self.bytes[token] if 0 <= token < len(self.bytes) else b""

    def shown(self, token: int) -> str:
        """The token for a reader: its text, or its name where it has none."""
        if 0 <= token < len(self.bytes):
            return self.bytes[token].decode("utf-8", "replace") or self.names[token]
        return f"<{token}>"

    def raw(self, token: int) -> bytes:
        """Like `of`, but a special token gives its name."""
        return self.of(token) or (self.names[token].encode() if 0 <= token < len(self.names) else b"")


def drops_first_space(tokenizer: Any, vocabulary: Vocabulary) -> bool:
    """Whether the space of a first word is no part of the text for this tokenizer (SentencePiece), found by decoding a word."""
    word = next((i for i, b in enumerate(vocabulary.bytes) if b.startswith(b" ") and b.strip()), None)
    return word is not None and not tokenizer.decode([word]).startswith(" ")


def _byte_level(piece: str) -> bytes:
    table = _byte_of_char()
    if all(c in table for c in piece):
        return bytes(table[c] for c in piece)
    return piece.encode()


def _sentencepiece(piece: str) -> bytes:
    if match := _BYTE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace("▁", " ").encode()


class TextStream:
    """The text of one sequence as it grows. Pieces given out, laid end to end, are `text`.

    `fresh`: it continues nothing, and the space that SentencePiece puts before a first word is left out.
    `include`: the stop text that ended it is part of it.
    """

    __slots__ = ("_decoder", "_fresh", "_held", "_include", "_longest", "_out", "_stop", "_vocabulary", "stopped")

    def __init__(
        self, vocabulary: Vocabulary | None, stop: Sequence[str] = (), fresh: bool = False, include: bool = False
    ) -> None:
        self._fresh, self._include = fresh, include
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=1)
        self._held = ""  # decoded, but it may be the beginning of a stop text
        self._out: list[str] = []
        self.stopped = False  # a stop text was completed

    @property
    def text(self) -> str:
        return "".join(self._out)

    def add(self, token: int, stops: bool = True) -> str:
        """What can be shown after this token. `stops`: a stop text that it completes ends the text."""
        if self._vocabulary is None:
            return ""
        return self._take(self._decoder.decode(self._vocabulary.of(token)), stops)

    def flush(self) -> str:
        """What is left at the end: held text, and U+FFFD for half a character."""
        if self.stopped:
            return ""
        out = self._take(self._decoder.decode(b"", final=True)) + self._held
        if self._held and not self.stopped:
            self._out.append(self._held)
        self._held = ""
        return out

    def _take(self, new: str, stops: bool = True) -> str:
        if self._fresh and new:
            self._fresh, new = False, new.removeprefix(" ")
        if not self._stop:
            if new:
                self._out.append(new)
            return new
        held = self._held + new
        # Only what the new text completes: held text may have one in it that was not to end anything.
        ends = ((held.find(s, max(0, len(self._held) - len(s) + 1)), len(s)) for s in self._stop)
        found = min(((at, size) for at, size in ends if at >= 0), default=None) if stops else None
        if found is not None:
            self.stopped, keep, self._held = True, found[0] + found[1] * self._include, ""
        else:
            keep = len(held) - self._possible_start(held)
            self._held = held[keep:]
        if keep:
            self._out.append(held[:keep])
        return held[:keep]

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop text."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-size:]
            if any(s.startswith(end) for s in self._stop):
                return size
        return 0
