"""How well a tokenizer fits a text: compression, words, unused vocabulary, and whether every text comes back unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.errors import DataError
from tutelage.tokenizer.load import TokenizerFolder

# GPT-2 (vocabulary 50,257) on OpenWebText: 39.77 GB of text (size on the data set's card) are 9,040,017,095 tokens (nanoGPT's
# data/openwebtext/readme.md, training + validation, one end token a document). English web text: a baseline, not the same text.
GPT2_OPENWEBTEXT_BYTES_PER_TOKEN = 4.4


def describe(report: Mapping[str, Any], held_out: str) -> str:
    """The compression report in one line for people. `held_out` names the text that was measured."""
    ours, gpt2 = report["bytes_per_token"], report["gpt2_openwebtext_bytes_per_token"]
    return (
        f"{ours:.2f} bytes per token on {held_out} ({report['bytes']:,} bytes, {report['tokens']:,} tokens); GPT-2's tokenizer "
        f"(50,257 tokens) reaches {gpt2} on OpenWebText, which is other text"
    )


def measure(folder: Path | TokenizerFolder, texts: Iterable[str]) -> dict[str, Any]:
    """The compression report of the tokenizer in `folder` on `texts` (held out from its training, to be honest).

    Returns `bytes`, `characters`, `words` (separated by white space), `tokens`, `bytes_per_token`, `tokens_per_word`,
    `unused_share` (of the learnt tokens: those that the texts never use), `single_byte_share` (of the tokens used: bytes that no
    merge covered), `round_trip_failures` (texts that decoding does not give back) and `vocab_size`, and GPT-2's published
    figure on other text.
    Raises `DataError` when there is no text.
    """
    tokenizer = folder if isinstance(folder, TokenizerFolder) else TokenizerFolder.open(folder)
    encoder, source = tokenizer.encoder(), iter(texts)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    sizes = np.zeros(3, np.int64)  # bytes, characters, words
    failures = 0
    while batch := list(islice(source, 256)):
        ids = encoder.encode_batch(batch)
        for text, one in zip(batch, ids, strict=True):
            sizes += (len(text.encode()), len(text), len(text.split()))
            failures += tokenizer.decode(one.tolist()) != text
        counts += np.bincount(np.concatenate(ids), minlength=len(counts))
    tokens = int(counts.sum())
    if not tokens:
        raise DataError(
            "no text to measure the tokenizer on", expected="a held-out text", fix="keep a larger share for validation"
        )
    lengths = tokenizer.token_bytes()
    learnt = lengths > 1
    return {
        "bytes": int(sizes[0]),
        "characters": int(sizes[1]),
        "words": int(sizes[2]),
        "tokens": tokens,
        "bytes_per_token": round(float(sizes[0]) / tokens, 4),
        "tokens_per_word": round(tokens / max(1, int(sizes[2])), 4),
        "unused_share": round(float((counts[learnt] == 0).mean()) if learnt.any() else 0.0, 4),
        "single_byte_share": round(float(counts[lengths == 1].sum()) / tokens, 4),
        "round_trip_failures": failures,
        "vocab_size": tokenizer.vocab_size,
        "gpt2_openwebtext_bytes_per_token": GPT2_OPENWEBTEXT_BYTES_PER_TOKEN,
    }
