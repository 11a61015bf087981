"""How long a text can be and still fit a context, told from its bytes: what cannot fit is never tokenized."""

from __future__ import annotations

import json
from typing import Any

from tutelage.engine.limits import ContextOverflow
from tutelage.tokenizer.detokenize import Vocabulary

SHRINKS = 4  # bytes of text that Unicode's composition (NFC) makes one byte of, at most: three for Hangul
UTF8 = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]
"""The bytes that texts are made of."""
PARTS = frozenset({"ByteLevel", "Digits", "Metaspace", "Punctuation", "Sequence", "Split", "UnicodeScripts"})
"""Pre-tokenizers that keep every character, `Split` and `Punctuation` unless they are told to remove."""


class TextLimit:
    """What `context_length` tokens can say at most. `most` is None for a tokenizer that leaves out some of a text or shortens it
    (unknown words, lower case, white space): there its bytes tell nothing."""

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary | None, context_length: int) -> None:
        """tokenizer: a `TokenizerFolder`."""
        self.context_length, self.most = context_length, None
        if vocabulary is not None:
            self.most = _most(json.loads(tokenizer.tokenizer.to_str()), vocabulary, context_length)

    def check(self, text: str) -> None:
        """Raises `ContextOverflow` for a text that is too long whatever its tokens are."""
        if self.most is None or len(text) * 4 <= self.most:
            return
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > self.most:
            raise ContextOverflow(
                "longer than the context", found=f"{size} bytes of text",
                expected=f"at most {self.context_length} tokens, which are at most {self.most} bytes",
            )  # fmt: skip


def _most(spec: dict[str, Any], vocabulary: Vocabulary, context_length: int) -> int | None:
    shrinks = _shrinks(spec.get("normalizer"))
    swallows = any(token.get("lstrip") or token.get("rstrip") for token in spec.get("added_tokens", ()))
    # A character whose bytes are no tokens is left out, or a whole word of them is one token.
    pieces = {vocabulary.raw(i) for i in range(len(vocabulary))}
    whole = pieces.issuperset(bytes([byte]) for byte in UTF8)
    if shrinks is None or swallows or not whole or not _keeps(spec.get("pre_tokenizer")):
        return None
    return context_length * shrinks * max(map(len, pieces))


def _shrinks(node: Any) -> int | None:
    """How many bytes a normalizer may make one byte of; None where there is no bound."""
    if node is None:
        return 1
    kind = node.get("type")
    if kind == "Sequence":
        inner = [_shrinks(each) for each in node.get("normalizers", ())]
        return None if None in inner else max((each for each in inner if each is not None), default=1)
    if kind == "Replace":  # SentencePiece's space, whose bytes are counted as the space's
        return 1 if node.get("pattern") == {"String": " "} and node.get("content") == "▁" else None
    return {"Prepend": 1, "NFC": SHRINKS, "NFD": SHRINKS}.get(kind)


def _keeps(node: Any) -> bool:
    """Whether a pre-tokenizer keeps every character."""
    if node is None:
        return True
    if node.get("type") not in PARTS or node.get("behavior") == "Removed":
        return False
    return all(_keeps(each) for each in node.get("pretokenizers", ()))
