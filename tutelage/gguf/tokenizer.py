"""The tokenizer of a GGUF file as a Hugging Face tokenizer folder's files. Imports without torch.

Ids are those of llama.cpp, but for one thing: text that only looks like a control token never becomes one by merging.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from tutelage.gguf.reader import Gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # enum llama_token_type
PREFIX = "tokenizer.ggml."
SPACE = "\u2581"  # stands for a space in SentencePiece
ENDS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>",
)  # fmt: skip
"""Control tokens that end an answer, by their text, as llama.cpp takes them: few files name more than one."""


@dataclass(slots=True, frozen=True)
class Vocabulary:
    """What the metadata says of tokens, checked."""

    file: Gguf
    model: str  # gpt2: byte-level BPE; llama: SentencePiece
    tokens: list[str]
    kinds: list[int]

    @classmethod
    def of(cls, file: Gguf) -> Vocabulary:
        """Raises `ArtifactError` for a tokenizer that is missing, damaged or of a kind that is not read."""
        model = file.metadata.get(f"{PREFIX}model")
        if model not in ("gpt2", "llama"):
            raise file.wrong("a tokenizer that is not read", f"{PREFIX}model", model, "gpt2 (BPE) or llama (SentencePiece)")
        tokens = _list(file, "tokens", str)
        if not tokens:
            raise file.wrong("the file has no tokens", f"{PREFIX}tokens", None, "a list of texts")
        own = cls(file, model, tokens, list(_list(file, "token_type", int, len(tokens))) or [NORMAL] * len(tokens))
        for i in {own.id_of(name) for name in NAMED} | {i for i, text in enumerate(tokens) if text in ENDS}:
            if i is not None and own.kinds[i] != UNKNOWN:
                own.kinds[i] = CONTROL  # some files call them ordinary tokens, which any text could contain then
        return own

    def id_of(self, name: str) -> int | None:
        """The id of the token that the metadata names for a purpose. Raises `ArtifactError` where there is no such token."""
        key = f"{PREFIX}{name}_token_id"
        found = self.file.metadata.get(key, SENTENCEPIECE.get(name) if self.model == "llama" else None)
        if found is None or found == 0xFFFFFFFF:  # llama.cpp's "none"
            return None
        if not isinstance(found, int) or not 0 <= found < len(self.tokens):
            raise self.file.wrong("the tokenizer has no such token", key, found, f"an id below {len(self.tokens)}")
        return found

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.file.metadata.get(f"{PREFIX}{name}", default))

    @property
    def pre(self) -> dict[str, Any]:
        """How words are cut. Raises `ArtifactError` for a way that is not known."""
        name = self.file.metadata.get(f"{PREFIX}pre", "default")
        known = pretokenizers()
        if name not in known:
            raise self.file.wrong(
                "the tokenizer cuts words in a way that is not known here", f"{PREFIX}pre", name, f"one of {', '.join(known)}",
                fix="use the model's Hugging Face folder (tokenizer.json)",
            )  # fmt: skip
        return known[name]

    @property
    def adds_bos(self) -> bool:
        """Whether a text begins with BOS."""
        default = self.model == "llama" or bool(self.pre.get("add_bos"))
        return self.id_of("bos") is not None and self.flag("add_bos_token", default)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer, the end of a text first."""
        named = [self.id_of(name) for name in ("eos", "eot", "eom")]
        known = [i for i, kind in enumerate(self.kinds) if kind == CONTROL and self.tokens[i] in ENDS]
        return list(dict.fromkeys([*(i for i in named if i is not None), *known]))


NAMED = ("bos", "eos", "eot", "eom", "padding", "mask", "seperator")
"""Purposes of control tokens that the metadata names (sic)."""
SENTENCEPIECE = {"bos": 1, "eos": 2, "unknown": 0}
"""What llama.cpp takes where a file of this kind does not say."""


@cache
def pretokenizers() -> dict[str, dict[str, Any]]:
    """Ways to cut words, by every name that they have."""
    text = files("tutelage.gguf").joinpath("pretokenizers.yaml").read_text(encoding="utf-8")
    rows: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return {name: row for main, row in rows.items() for name in (main, *row.get("also", ()))}


def _list(file: Gguf, name: str, kind: type, length: int | None = None) -> list[Any]:
    """A list of the metadata; empty where there is none."""
    key, found = f"{PREFIX}{name}", file.metadata.get(f"{PREFIX}{name}", [])
    if not isinstance(found, list) or not all(isinstance(x, kind) for x in found):
        raise file.wrong("not a list of the right kind", key, found, f"a list of {kind.__name__}")
    if length is not None and found and len(found) != length:
        raise file.wrong("a list of another length than the tokens", key, f"{len(found)} entries", f"{length}")
    return found


# Files


def tokenizer_json(words: Vocabulary) -> dict[str, Any]:
    """The object of a tokenizer.json. Raises `ArtifactError`."""
    added = [_added(i, text, words.kinds[i]) for i, text in enumerate(words.tokens) if words.kinds[i] in (CONTROL, USER_DEFINED)]
    parts = _byte_level(words) if words.model == "gpt2" else _sentencepiece(words)
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts,
            "post_processor": _post_processor(words)}  # fmt: skip


def tokenizer_config(words: Vocabulary, longest: int) -> dict[str, Any]:
    """The object of a tokenizer_config.json."""
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {key: words.id_of(name) for key, name in names.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: words.tokens[i] for key, i in ids.items() if i is not None},
        "add_bos_token": words.adds_bos,
        "add_eos_token": words.flag("add_eos_token", False),
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    }


def chat_template(file: Gguf) -> str | None:
    """The Jinja source of the file's chat template, if it has one."""
    found = file.metadata.get("tokenizer.chat_template")
    if found is not None and not isinstance(found, str):
        raise file.wrong("not a chat template", "tokenizer.chat_template", found, "a text")
    return found or None


def _added(index: int, text: str, kind: int) -> dict[str, Any]:
    return {"id": index, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": kind == CONTROL}  # fmt: skip


def _post_processor(words: Vocabulary) -> dict[str, Any] | None:
    """BOS before and EOS after a text, where the file wants them."""
    ends = {
        name: words.id_of(name)
        for name, wanted in (("bos", words.adds_bos), ("eos", words.flag("add_eos_token", False)))
        if wanted and words.id_of(name) is not None
    }
    if not ends:
        return None
    tokens = {name: words.tokens[i] for name, i in ends.items() if i is not None}

    def row(letter: str, segment: int) -> list[dict[str, Any]]:
        special = {name: [{"SpecialToken": {"id": text, "type_id": segment}}] for name, text in tokens.items()}
        return [*special.get("bos", []), {"Sequence": {"id": letter, "type_id": segment}}, *special.get("eos", [])]

    return {
        "type": "TemplateProcessing", "single": row("A", 0), "pair": [*row("A", 0), *row("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [ends[name]], "tokens": [text]} for name, text in tokens.items()},
    }  # fmt: skip


# Byte-level BPE


def _byte_level(words: Vocabulary) -> dict[str, Any]:
    pre = words.pre
    vocabulary = {text: i for i, text in enumerate(words.tokens)}
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} for pattern in pre["patterns"]
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
        "decoder": level,
        "model": _bpe(vocabulary, list(_merges(words, vocabulary)), ignore_merges=bool(pre.get("ignore_merges"))),
    }


def _bpe(vocabulary: Mapping[str, int], merges: list[list[str]], **changed: Any) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocabulary, "merges": merges, **changed,
    }  # fmt: skip


def _merges(words: Vocabulary, vocabulary: Mapping[str, int]) -> Iterator[list[str]]:
    rows = _list(words.file, "merges", str)
    if not rows:
        raise words.file.wrong("the tokenizer has no merges", f"{PREFIX}merges", None, "a list of texts")
    for row in rows:
        at = row.find(" ", 1)
        left, right = row[:at], row[at + 1 :]
        if at < 0 or not (left in vocabulary and right in vocabulary and left + right in vocabulary):
            raise words.file.wrong("a merge of what are no tokens", f"{PREFIX}merges", row, "two tokens that make a third")
        yield [left, right]


# SentencePiece


def _sentencepiece(words: Vocabulary) -> dict[str, Any]:
    vocabulary = {text: i for i, text in enumerate(words.tokens)}
    unknown = words.id_of("unknown")
    prefix = words.flag("add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    strip: list[dict[str, Any]] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*steps, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe(
            vocabulary, _scored_merges(words), byte_fallback=BYTE in words.kinds,
            unk_token=None if unknown is None else words.tokens[unknown], fuse_unk=True,
        ),
    }  # fmt: skip


def _scored_merges(words: Vocabulary) -> list[list[str]]:
    """The merges that do what SentencePiece does with scores: of all pairs that make a token, that of the best score first.
    Pairs that make the same token are in the order of their parts."""
    scores = _list(words.file, "scores", float, len(words.tokens))
    if not scores:
        raise words.file.wrong("the tokenizer has no scores", f"{PREFIX}scores", None, "a number for each token")
    made = {text: i for i, text in enumerate(words.tokens) if words.kinds[i] in (NORMAL, USER_DEFINED, UNUSED)}
    order = sorted((i for text, i in made.items() if len(text) > 1), key=lambda i: -scores[i])
    merges: list[list[str]] = []
    for i in order:
        text = words.tokens[i]
        pairs = [(text[:at], text[at:]) for at in range(1, len(text)) if text[:at] in made and text[at:] in made]
        pairs.sort(key=lambda pair: (made[pair[0]], made[pair[1]]))
        merges += map(list, pairs)
    return merges
