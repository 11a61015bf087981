"""Encodes a corpus several times faster than `tokenizers`, with the same ids.

Byte-level BPE cuts a text into words by a regular expression and merges inside each word alone, so the ids of a word never
change and real text repeats its words: here `re` cuts, a dictionary answers, and `tokenizers` itself encodes each new word once.
The expression's character classes (`\\p{L}`, `\\s`, ...) are read out of the engine that `tokenizers` uses, so both cut alike
whatever Unicode version each was built with.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, pre_tokenizers

Ids = npt.NDArray[np.unsignedinteger[Any]]

CACHED_WORDS = 400_000  # about 60 MB
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what `ByteLevel(use_regex=True)` cuts by
# Every code point with a meaning: surrogates are no text, planes 4 to 13 are unassigned, 15 and 16 private.
PLANES = [
    range(0xD800),
    range(0xE000, 0x10000),
    range(0x10000, 0x20000),
    range(0x20000, 0x30000),
    range(0x30000, 0x40000),
    range(0xE0000, 0xE1000),
]
INTERVAL_WITH_MARK = re.compile(r"\{\d*,?\d*\}[+?]")
OUTSIDE = re.compile("[\U00040000-\U000dffff\U000e1000-\U0010ffff]")
PROBE = (
    "It's we'LL 'ſ don’t  two   three\t\n\n x \r\n\r\n 12345 ½Ⅷ٣ ünï 漢字かな 😀🏽 …—“q” #!?\n\n  "
    "_a-b.c(d) \u00a0\u2003\u200b\u3000.\u0085é́ <|x|> "
    "'S'T'RE 'D\n \n  \n\t\tdef f(x): return x**2  \u1e9e\u0130 ́a 1st a1b2 $5.00  "
)


class CorpusEncoder:
    """Encodes content (never control tokens) with `plain`. Each process makes its own; one instance is for one thread at a time.

    `fast` tells whether words are cached; if not (another kind of tokenizer, or a probe that differs) `tokenizers` does all.
    """

    def __init__(self, plain: Tokenizer, vocab_size: int) -> None:
        self.dtype: type[np.unsignedinteger[Any]] = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self._plain = plain
        self._words: dict[str, bytes] = {}
        plan = _word_plan(plain)
        self.fast = plan is not None
        if plan is not None:
            self._split, self._merge, self._foreign = plan
            alike = [i.tolist() for i in self._encode_words([PROBE, PROBE[::-1]])] == [
                i.tolist() for i in self._encode_plain([PROBE, PROBE[::-1]])
            ]
            self.fast = alike

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text."""
        if not self.fast:
            return self._encode_plain(texts)
        mine = [i for i, text in enumerate(texts) if not self._must_stay_whole(text)]
        if len(mine) == len(texts):
            return self._encode_words(texts)
        out: dict[int, Ids] = dict(zip(mine, self._encode_words([texts[i] for i in mine]), strict=True))
        rest = [i for i in range(len(texts)) if i not in out]
        out.update(zip(rest, self._encode_plain([texts[i] for i in rest]), strict=True))
        return [out[i] for i in range(len(texts))]

    def _must_stay_whole(self, text: str) -> bool:
        return any(token in text for token in self._foreign) or (not text.isascii() and OUTSIDE.search(text) is not None)

    def encode_joined(self, texts: Sequence[str]) -> tuple[Ids, npt.NDArray[np.int64]]:
        """The ids of all texts in one array, and how many belong to each."""
        parts = self.encode_batch(texts)
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return (np.concatenate(parts) if parts else np.empty(0, self.dtype)), lengths

    def count_words(self, texts: Sequence[str]) -> Counter[tuple[int, ...]]:
        """How often each word occurs in the texts. A word is the ids of what no merge reaches across."""
        out: Counter[tuple[int, ...]] = Counter()
        cut = [text for text in texts if self.fast and not self._must_stay_whole(text)]
        found = Counter(word for text in cut for word in self._split(text))
        if found:
            encodings = self._merge.encode_batch_fast(list(found), add_special_tokens=False)
            out.update({tuple(e.ids): n for e, n in zip(encodings, found.values(), strict=True)})
        rest = [text for text in texts if not self.fast or self._must_stay_whole(text)]
        for encoding in self._plain.encode_batch(list(rest), add_special_tokens=False):
            pairs = zip(encoding.word_ids, encoding.ids, strict=True)
            out.update(tuple(i for _, i in word) for _, word in groupby(pairs, lambda pair: pair[0]))
        return out

    def _encode_plain(self, texts: Sequence[str]) -> list[Ids]:
        return [np.array(e.ids, self.dtype) for e in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _encode_words(self, texts: Sequence[str]) -> list[Ids]:
        words = [self._split(text) for text in texts]
        known = self._words
        new = list(set(chain.from_iterable(words)).difference(known))
        if new:
            if len(known) + len(new) > CACHED_WORDS:
                known.clear()  # rare words fill it; the common ones are back within a batch
                new = list(set(chain.from_iterable(words)))
            ids = (np.array(e.ids, self.dtype).tobytes() for e in self._merge.encode_batch_fast(new, add_special_tokens=False))
            known.update(zip(new, ids, strict=True))
        look = known.__getitem__
        return [np.frombuffer(b"".join(map(look, w)), self.dtype) for w in words]


def _word_plan(plain: Tokenizer) -> tuple[Any, Tokenizer, list[str]] | None:
    """(splitter, encoder of single words, added tokens that are no control tokens), or None for another kind of tokenizer."""
    described = json.loads(plain.to_str())
    pattern = _pattern(described["pre_tokenizer"])
    model = described["model"]
    if pattern is None or described["normalizer"] is not None or model.get("type", "BPE") != "BPE" or model.get("dropout"):
        return None
    translated = _translate(pattern)
    if translated is None:
        return None
    merge = Tokenizer.from_str(plain.to_str())
    merge.encode_special_tokens = True
    merge.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return re.compile(translated).findall, merge, [t["content"] for t in described["added_tokens"] if not t["special"]]


def _pattern(described: dict[str, Any] | None) -> str | None:
    """The expression that cuts words, if the pre-tokenizer is one that cuts by it and then maps bytes, and does nothing else."""
    steps = [] if described is None else described.get("pretokenizers", [described])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return GPT2 if steps[0]["use_regex"] else None
    first = steps[0]
    by_regex = (
        first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"] and "Regex" in first["pattern"]
    )
    return first["pattern"]["Regex"] if len(steps) == 2 and by_regex and not steps[1]["use_regex"] else None


def _translate(pattern: str) -> str | None:
    """The pattern for `re`, with every class spelt out; None if it uses other escapes, leaves characters unmatched, or has an
    interval with a mark behind it: `{1,3}+` is possessive in `re`, and a repetition of the repetition in the engine of
    `tokenizers`; `{3}?` is lazy in one and optional in the other."""
    if INTERVAL_WITH_MARK.search(pattern):
        return None
    out: list[str] = []
    inside = False
    for part in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL):
        if part.startswith("\\p") or part in (r"\s", r"\d"):
            ranges = _ranges(part)
            out.append(ranges if inside else f"[{ranges}]")
        elif part == r"\S" and not inside:
            out.append(f"[^{_ranges(chr(92) + 's')}]")
        elif part[0] == "\\" and part[1].isalnum() and part not in (r"\r", r"\n", r"\t"):
            return None
        else:
            inside = part == "[" or (inside and part != "]")
            out.append(part)
    translated = "".join(out)
    sample = _characters(PLANES[0]) + _characters(PLANES[1])  # they hold members of every class
    return translated if len("".join(re.findall(translated, sample))) == len(sample) else None


def _characters(codes: range) -> str:
    return "".join(map(chr, codes))


@functools.cache
def _ranges(escape: str) -> str:
    """The characters of a class such as `\\p{L}`, as ranges for `re`, read from the engine that `tokenizers` uses."""
    others = pre_tokenizers.Split(Regex(f"{escape}+"), behavior="removed", invert=True)
    runs = [text for codes in PLANES for text, _ in others.pre_tokenize_str(_characters(codes))]
    return "".join(f"\\U{ord(run[0]):08x}-\\U{ord(run[-1]):08x}" for run in runs)
