"""Reads any Hugging Face tokenizer folder (ours, or a model's) and encodes text so that content never becomes control.

A document or a message that contains the *characters* `<|im_end|>` is encoded as those characters. Only the renderer, from the
template's own words, and `document` write control tokens.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from tutelage.artifacts import tokenizer_folder
from tutelage.errors import ArtifactError
from tutelage.files import read_object, unreadable
from tutelage.plan.config_json import end_ids
from tutelage.tokenizer.fast import CorpusEncoder

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tutelage.json")
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # byte fallback of SentencePiece


class TokenizerFolder:
    """A tokenizer with its conventions. Picklable by its path; safe to use from several threads.

    Attributes:
        folder: where it was read from
        tokenizer: encodes control tokens where their text occurs (for template text); `plain` never does (for content)
        special_tokens: `{"eos_token": "<|endoftext|>", ...}` as a template sees them
        template: Jinja source of the folder's chat template, or None
        history: "whole" | "per_turn" | None (not proven yet: the renderer finds out)
        bos_id, eos_id, pad_id: or None
        adds_bos: whether a text of this tokenizer begins with BOS by its own convention
        end_of_turn_ids: ids that end an assistant turn, as far as the folder's files say
        stop_ids: `end_of_turn_ids` and `eos_id`, sorted: where generation stops
        control_ids: ids that no content may produce
        max_length: tokens of a text as the folder says, where it says it
        pattern: llama.cpp's name of the split pattern, where known
    """

    def __init__(self, folder: Path) -> None:
        self.folder = tokenizer_folder(folder)
        self._text, tokenizer = _read_tokenizer(self.folder)
        config = _optional(self.folder / "tokenizer_config.json")
        named = {**_optional(self.folder / "special_tokens_map.json"), **config}
        self.special_tokens = {key: _content(named[key], key, self.folder) for key in _NAMED if named.get(key)}
        self.tokenizer = _complete(tokenizer, config, self.folder)
        facts = _optional(self.folder / "tutelage.json")
        self.template: str | None = _template(self.folder, config)
        self.history: str | None = facts.get("history")
        self.pattern: str | None = facts.get("pattern")
        said = config.get("model_max_length")
        self.max_length: int | None = int(said) if isinstance(said, int | float) and 0 < said < 1e9 else None
        self.bos_id, self.eos_id, self.pad_id = (self._id(f"{name}_token") for name in ("bos", "eos", "pad"))
        adds = config.get("add_bos_token")
        self.adds_bos: bool = self.bos_id is not None and (self._processor_adds_bos() if adds is None else bool(adds))
        self.end_of_turn_ids = self._end_of_turn(facts)
        eos = [] if self.eos_id is None else [self.eos_id]
        self.stop_ids: tuple[int, ...] = tuple(sorted({*self.end_of_turn_ids, *eos}))
        added = self.tokenizer.get_added_tokens_decoder()
        self.control_ids = frozenset({i for i, token in added.items() if token.special} | set(self.stop_ids))
        self.control_tokens: dict[str, AddedToken] = {t.content: t for i, t in added.items() if i in self.control_ids}

    @classmethod
    def open(cls, folder: Path | str) -> TokenizerFolder:
        """The tokenizer in `folder`, or in a GGUF file. Raises `ArtifactError` when there is none or it cannot be read."""
        return cls(Path(folder))

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenizerFolder, (self.folder,)

    @property
    def vocab_size(self) -> int:
        """Highest id + 1: how many rows an embedding needs at least."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def vocabulary(self) -> int:
        return self.vocab_size

    def check_same(self, other: TokenizerFolder) -> None:
        """Raises `ArtifactError` where the other's tokens are not these."""
        mine, theirs = (x.tokenizer.get_vocab(with_added_tokens=True) for x in (self, other))
        if mine != theirs:
            different = sorted(mine.items() ^ theirs.items(), key=lambda item: item[1])
            raise ArtifactError(
                "two models that work together need the same tokens", file=other.folder, found=f"{different[0][0]!r} differs",
                expected=f"the tokens of {self.folder}", fix="take a model that was trained with the same tokenizer",
            )  # fmt: skip

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (64 hex digits) over the tokenizer's files; weights in the same folder do not count."""
        total = hashlib.sha256()
        for name in FILES:
            file = self.folder / name
            if file.is_file():
                total.update(f"{name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
        return total.hexdigest()

    @functools.cached_property
    def plain(self) -> Tokenizer:
        """The same tokenizer, to which control tokens are ordinary characters."""
        plain = _complete(Tokenizer.from_str(self._text), {}, self.folder)
        # `encode_special_tokens` turns off what is marked special; a folder may use an unmarked token as its end token
        plain.add_special_tokens(
            [AddedToken(str(t.content), special=True, normalized=t.normalized) for t in self.control_tokens.values()]
        )
        plain.encode_special_tokens = True
        return plain

    def encode_text(self, text: str, add_special: bool = False) -> list[int]:
        """Ids of content. With `add_special`, those of a whole document: BOS where the tokenizer wants one, then EOS."""
        # A batch of one: a single call keeps the interpreter's lock, for seconds where the text has megabytes.
        ids: list[int] = self.plain.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self.document(ids) if add_special else ids

    def encode_batch(self, texts: Sequence[str], add_special: bool = False) -> list[list[int]]:
        """`encode_text` of each, on all cores (rayon; `RAYON_NUM_THREADS` limits it)."""
        batch = [e.ids for e in self.plain.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [self.document(ids) for ids in batch] if add_special else batch

    def document(self, ids: Iterable[int]) -> list[int]:
        """`ids` of a text between the tokens that begin and end a document."""
        return [*self.document_prefix, *ids, *self.document_suffix]

    @property
    def start_id(self) -> int | None:
        """What a training document begins with, so that its first token is predicted too: BOS where texts have one, else EOS."""
        return self.bos_id if self.adds_bos and self.bos_id is not None else self.eos_id

    @property
    def document_prefix(self) -> list[int]:
        return [self.bos_id] if self.adds_bos and self.bos_id is not None else []

    @property
    def document_suffix(self) -> list[int]:
        return [] if self.eos_id is None else [self.eos_id]

    def encoder(self) -> CorpusEncoder:
        """A fast encoder of content for a whole corpus: same ids as `encode_batch`. Make one in each process or thread."""
        return CorpusEncoder(self.plain, self.vocab_size)

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: how many UTF-8 bytes of text each id decodes to; 0 for control tokens."""
        out = np.zeros(self.vocab_size, np.int32)
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self._text).get("decoder"))
        added = self.tokenizer.get_added_tokens_decoder()
        for token, i in self.tokenizer.get_vocab(with_added_tokens=True).items():
            if i in self.control_ids:
                continue
            # in a byte-level vocabulary one character is one byte; elsewhere a piece is text with U+2581 for a space
            plain = i in added or not byte_level
            out[i] = (
                1 if _BYTE.fullmatch(token) and plain else len(token.replace("\u2581", " ").encode()) if plain else len(token)
            )
        return out

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; control tokens shown unless `skip_special`. Invalid UTF-8 becomes U+FFFD."""
        return str(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special))

    def _id(self, key: str) -> int | None:
        token = self.special_tokens.get(key)
        return None if token is None else self.tokenizer.token_to_id(token)

    def _processor_adds_bos(self) -> bool:
        ids = self.tokenizer.encode("a", add_special_tokens=True).ids
        return bool(ids) and ids[0] == self.bos_id

    def _end_of_turn(self, facts: dict[str, Any]) -> tuple[int, ...]:
        """Ours say it; others say it in generation_config.json; otherwise it is EOS."""
        ends = facts.get("end_of_turn")
        if ends:
            if not isinstance(ends, list) or not all(isinstance(token, str) for token in ends):
                raise ArtifactError(
                    "not a list of tokens", file=self.folder / "tutelage.json", field="end_of_turn", found=ends,
                    expected='a list of texts: ["<|im_end|>"]', fix=COPY_FOLDER,
                )  # fmt: skip
            ids = [self.tokenizer.token_to_id(token) for token in ends]
            return tuple(i for i in ids if i is not None)
        file = self.folder / "generation_config.json"
        said = _optional(file)
        return end_ids(said, file) if "eos_token_id" in said else () if self.eos_id is None else (self.eos_id,)


def _read_tokenizer(folder: Path) -> tuple[str, Tokenizer]:
    """The text of tokenizer.json, and what it describes."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ArtifactError(
            "no tokenizer here",
            file=folder,
            expected="a Hugging Face tokenizer folder with tokenizer.json",
            fix="give the folder that `tutelage tokenizer` wrote, or save an older tokenizer as a fast one with `transformers`",
        )
    text = _read_text(file)
    try:
        return text, Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise ArtifactError(
            f"tokenizer.json cannot be read ({error})",
            file=file,
            expected="a file that `tokenizers` wrote",
            fix="copy it again, or train it again with --force",
        ) from error


def _optional(file: Path) -> dict[str, Any]:
    return read_object(file, COPY_FOLDER) if file.is_file() else {}


COPY_FOLDER = "copy the folder again"


def _read_text(file: Path) -> str:
    """The text of a file of the folder. Raises `ArtifactError`."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(file, error) from None
    except UnicodeDecodeError as error:
        raise ArtifactError(f"not UTF-8 text at byte {error.start}", file=file, fix=COPY_FOLDER) from None


def _content(token: Any, key: str, folder: Path) -> str:
    """A named token is a string, or the JSON of an AddedToken."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise ArtifactError(
            "a token's text is a text", file=folder / "tokenizer_config.json", field=key, found=token,
            expected='"<|endoftext|>", or {"content": "<|endoftext|>"}', fix=COPY_FOLDER,
        )  # fmt: skip
    return content


def _complete(tokenizer: Tokenizer, config: dict[str, Any], folder: Path) -> Tokenizer:
    """Adds what only tokenizer_config.json lists, and turns off truncation and padding, which some folders store."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict) or not all(
        str(i).isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str) for i, token in listed.items()
    ):
        raise ArtifactError(
            "not a list of added tokens", file=folder / "tokenizer_config.json", field="added_tokens_decoder", found=listed,
            expected='{"7": {"content": "<|im_end|>", …}, …}', fix=COPY_FOLDER,
        )  # fmt: skip
    for _, token in sorted(listed.items(), key=lambda item: int(item[0])):
        if tokenizer.token_to_id(token["content"]) is None:
            flags = {k: token[k] for k in ("lstrip", "rstrip", "single_word", "normalized", "special") if k in token}
            tokenizer.add_tokens([AddedToken(token["content"], **flags)])
    return tokenizer


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    given = config.get("chat_template")
    source = given
    if isinstance(given, list) and all(isinstance(row, dict) for row in given):  # several by name: the one for chats
        source = {str(row.get("name")): row.get("template") for row in given}.get("default")
    if source is None or isinstance(source, str):
        return source
    raise ArtifactError(
        "not a chat template", file=folder / "tokenizer_config.json", field="chat_template", found=given,
        expected="the text of a Jinja template, or a list of {name, template}", fix=COPY_FOLDER,
    )  # fmt: skip
