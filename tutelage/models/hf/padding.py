"""The token that pads the texts of a model whose scores `transformers` reads at the last token that is not padding.

Such a token must never end a text. Many checkpoints pad with their end token: there the score would be read one token early.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.files import write_json


@dataclass(slots=True, frozen=True)
class Padding:
    """A token for padding."""

    id: int
    token: str | None  # None where no tokenizer is known
    known: bool  # False: a token of text, since there was nothing better


def choose_padding(config: Any, ends: Collection[int], tokenizer: Path | None) -> Padding:
    """The tokenizer's own padding token, else the configuration's, else another special token that ends no text (`ends` do, and
    the configuration's end tokens), else the last token of the vocabulary that does not."""
    taken = {*ends, *config.eos_token_ids}
    named, special, pad = ({}, [], None) if tokenizer is None else _tokens(tokenizer)
    own = config.pad_token_id if tokenizer is None or config.pad_token_id in named else None
    chosen = next((i for i in (pad, own, *special) if i is not None and i not in taken), None)
    last = next(i for i in reversed(range(config.vocab_size)) if i not in taken)
    number = last if chosen is None else chosen
    return Padding(number, named.get(number), chosen is not None)


def _tokens(folder: Path) -> tuple[dict[int, str], list[int], int | None]:
    """All tokens by id; the special ones among them, those first that nobody writes; the padding token."""
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file():
        return {}, [], None
    raw = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = raw.get("model", {}).get("vocab") or {}
    named = {i: token for token, i in vocabulary.items()} if isinstance(vocabulary, dict) else {}
    added = {row["id"]: row for row in raw.get("added_tokens") or []}
    named |= {i: row["content"] for i, row in added.items()}
    pad = json.loads(settings.read_text(encoding="utf-8")).get("pad_token") if settings.is_file() else None
    pad = pad["content"] if isinstance(pad, dict) else pad
    special = [i for i, row in added.items() if row.get("special")]
    special.sort(key=lambda i: ("pad" not in named[i], "reserved" not in named[i], i))
    return named, special, next((i for i, token in named.items() if token == pad), None)


def write_padding(folder: Path, padding: Padding) -> None:
    """Has the tokenizer in `folder` pad with it."""
    if padding.token is None:
        return
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if file.is_file():
            write_json(file, json.loads(file.read_text(encoding="utf-8")) | {"pad_token": padding.token})
