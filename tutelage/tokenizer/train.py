"""Trains a byte-level BPE tokenizer (Sennrich et al. 2016, on bytes as in GPT-2) and writes a Hugging Face tokenizer folder.

All 256 bytes are in the alphabet and nothing is normalised, so every string that UTF-8 can hold survives a round trip.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tutelage.chat.templates import Style, style
from tutelage.errors import ConfigError, DataError
from tutelage.files import whole_folder, write_json

# How text is cut before merges are learnt. The names are llama.cpp's (`tokenizer.ggml.pre`): an export to GGUF names it.
PATTERNS: dict[str, str] = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
DEFAULT_PATTERN = "qwen2"  # single digits: arithmetic is learnt from place values, not from memorised numbers
BYTES = 256


def train(
    texts: Iterable[str],
    *,
    vocab_size: int,
    out: Path,
    pattern: str = DEFAULT_PATTERN,
    template: str = "default",
    specials: Iterable[str] = (),
    max_length: int | None = None,
) -> dict[str, Any]:
    """Learns merges from `texts` and writes the tokenizer folder `out`, whole or not at all.

    `vocab_size` counts bytes, control tokens and merges; a small corpus may give fewer. `specials` come after those that the
    style of `template` needs. `max_length` (tokens) is told to other tools as `model_max_length`.
    Equal texts in equal order give equal files. Returns facts: `vocab_size`, `merges`, `pattern`, `template`, `specials`,
    `bytes` and `texts` read. Raises `ConfigError` (size, pattern, template) and `DataError` (nothing to learn from).
    """
    chosen = style(template)
    names = list(dict.fromkeys([*chosen.specials, *specials]))
    _check(vocab_size, pattern, names)
    counts = {"texts": 0, "bytes": 0}
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERNS[pattern]), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a merge seen once is not worth a row of the embedding
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in names],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_batches(texts, counts), trainer=trainer)
    if counts["bytes"] == 0:
        raise DataError(
            "no text to train a tokenizer on",
            found=f"{counts['texts']} texts, all empty",
            expected="at least one text with a character",
            fix="check the data stage's report for what was rejected",
        )
    if chosen.bos:
        bos = tokenizer.token_to_id(chosen.bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{chosen.bos} $A", pair=f"{chosen.bos} $A $B", special_tokens=[(chosen.bos, bos)]
        )
    facts = {
        "vocab_size": tokenizer.get_vocab_size(),
        "merges": tokenizer.get_vocab_size() - BYTES - len(names),
        "pattern": pattern,
        "template": template,
        "specials": names,
        **counts,
    }
    with whole_folder(out) as folder:
        tokenizer.save(str(folder / "tokenizer.json"))
        _write_config(folder, chosen, names, pattern, max_length)
    return facts


def _check(vocab_size: int, pattern: str, names: list[str]) -> None:
    if pattern not in PATTERNS:
        near = difflib.get_close_matches(pattern, PATTERNS, n=1, cutoff=0.3)
        raise ConfigError(
            "unknown split pattern",
            field="pattern",
            found=pattern,
            expected=", ".join(PATTERNS),
            fix=f"did you mean {near[0]}?" if near else None,
        )
    least = BYTES + len(names)
    if vocab_size < least:
        raise ConfigError(
            "the vocabulary is too small for every byte and control token",
            field="vocab_size",
            found=vocab_size,
            expected=f"at least {least} ({BYTES} bytes + {len(names)} control tokens)",
            fix=f"set vocab_size to {max(1024, least)} or more",
        )
    if bad := [name for name in names if not name.strip()]:
        raise ConfigError("a control token must have visible characters", field="specials", found=bad)


def _batches(texts: Iterable[str], counts: dict[str, int]) -> Iterator[list[str]]:
    source = iter(texts)
    while batch := list(itertools.islice(source, 256)):
        counts["texts"] += len(batch)
        counts["bytes"] += sum(len(text.encode("utf-8", "surrogatepass")) for text in batch)
        yield batch


def _write_config(folder: Path, chosen: Style, names: list[str], pattern: str, max_length: int | None) -> None:
    """The small files next to tokenizer.json: what `transformers`, vLLM and llama.cpp read, and our own facts."""
    named = {"bos_token": chosen.bos, "eos_token": chosen.eos, "pad_token": chosen.pad}
    named = {key: value for key, value in named.items() if value}
    extra = [name for name in names if name not in named.values()]
    write_json(folder / "special_tokens_map.json", {**named, "additional_special_tokens": extra})
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            "additional_special_tokens": extra,
            "add_bos_token": chosen.bos is not None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length or int(1e30),
            "chat_template": chosen.source,
        },
    )
    (folder / "chat_template.jinja").write_text(chosen.source, encoding="utf-8")
    write_json(
        folder / "tutelage.json",
        {"version": 1, "pattern": pattern, "template": chosen.name, "history": "whole", "end_of_turn": list(chosen.end_of_turn)},
    )


def describe(facts: dict[str, Any]) -> str:
    """One line for the console."""
    return (
        f"{facts['vocab_size']:,} tokens = {BYTES} bytes + {len(facts['specials'])} control + {facts['merges']:,} merges, "
        f"learnt from {facts['bytes'] / 1e6:.1f} MB in {facts['texts']:,} texts; "
        f"pattern {facts['pattern']}, style {facts['template']}"
    )
