"""New tokens for a checkpoint's tokenizer, learnt from the texts of a field: its own byte-level BPE with more merges.

The new merges come after the old ones, so they join what the old ones leave: a text's new ids, each new one replaced by its
pieces, are its old ids. Nothing that was an id before means anything else. Other kinds of tokenizers are refused: an added token
would cut texts wherever its characters occur, in the middle of other words too, and change their ids.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tutelage.errors import ArtifactError, ConfigError, Setting
from tutelage.files import read_json, whole_folder, write_json
from tutelage.tokenizer.load import FILES, TokenizerFolder
from tutelage.tokenizer.merges import learn


@dataclass(frozen=True, slots=True)
class Extension:
    """The tokens that were added. Token `first + k` stands for the old ones `pieces[k]`, and is spelt `texts[k]`."""

    first: int
    pieces: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]

    @property
    def stop(self) -> int:
        """One more than the last new id."""
        return self.first + len(self.pieces)

    def old_ids(self, ids: Iterable[int]) -> list[int]:
        """`ids` as the tokenizer had them before."""
        return [old for i in ids for old in (self.pieces[i - self.first] if i >= self.first else (i,))]


def extend(folder: Path, texts: Iterable[str], count: int, out: Path) -> Extension:
    """Writes to `out` the tokenizer of `folder` with up to `count` new tokens that shorten `texts`, whole or not at all.

    Control tokens, chat template and all else stay as they are. New ids begin where the old ones end. Raises `ArtifactError` for
    a tokenizer that is no byte-level BPE, `ConfigError` where the texts give no token at all.
    """
    words = TokenizerFolder.open(folder)
    described: dict[str, Any] = json.loads(words.tokenizer.to_str())
    check(described, folder)
    model, first = described["model"], words.vocab_size
    for token in described["added_tokens"]:  # the library numbers those that the model lacks by the size of its vocabulary
        model["vocab"].setdefault(token["content"], token["id"])
    encoder, found, source = words.encoder(), Counter[tuple[int, ...]](), iter(texts)
    while batch := list(islice(source, 1024)):
        found.update(encoder.count_words(batch))
    names = {i: token for token, i in model["vocab"].items()}
    pieces: dict[int, tuple[int, ...]] = {}
    for new, pair in enumerate(learn(found, names, count), first):
        left, right = (names[i] for i in pair)
        pieces[new] = tuple(old for i in pair for old in pieces.get(i, (i,)))
        names[new] = left + right
        model["vocab"][names[new]] = new
        model["merges"].append([left, right])
    if not pieces:
        raise ConfigError(
            "these texts give no new tokens: no two adjacent tokens occur twice within a word", field="vocab_add",
            found=f"{len(found)} words", fix=f"set {Setting('vocab_add', '0')}, or give more text of the field",
        )  # fmt: skip
    described |= {key: read_json(folder / "tokenizer.json").get(key) for key in ("truncation", "padding")}
    with whole_folder(out) as partial:
        for name in FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
        write_json(partial / "tokenizer.json", described)
    made = TokenizerFolder.open(out)
    return Extension(first, tuple(pieces.values()), tuple(made.decode([i]) for i in pieces))


def check(described: dict[str, Any], file: Path) -> None:
    """Raises `ArtifactError` unless a tokenizer.json is byte-level BPE without variations."""
    model, steps = described["model"], described["pre_tokenizer"] or {}
    kinds = [step["type"] for step in steps.get("pretokenizers", [steps]) if step]
    marks = [k for k in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix") if model.get(k)]
    if model.get("type") == "BPE" and "ByteLevel" in kinds and not marks:
        return
    found = f"{model.get('type')}, cut by {', '.join(kinds) or 'nothing'}{', ' if marks else ''}{', '.join(marks)}"
    raise ArtifactError(
        "new tokens can be learnt for byte-level BPE alone", file=file, field="vocab_add", found=found,
        expected="a tokenizer.json of type BPE with ByteLevel, as of GPT-2, Llama 3, Qwen or ours",
        fix=f"set {Setting('vocab_add', '0')}: the model adapts with the tokens that it has",
    )  # fmt: skip
