"""Baselines that a language model has to beat: `xz`, and Kneser-Ney n-grams over bytes and over the model's tokens. No torch.

Every baseline gets the same training text and is scored on the same validation documents as the model, in bits per byte of
their UTF-8 text, the end of each document included (the model pays for predicting where a text ends, and so do these).

Every choice is made in favour of the baseline:

- `xz` compresses the training text followed by all validation documents as one stream and pays only for what the second
  part adds, so it also learns from the validation documents already read; the better of two settings counts, the dictionary
  holds the whole stream, and headers are free.
- The n-gram order is chosen on a tenth of the training documents held out, then the model is fitted on all of them.
"""

from __future__ import annotations

import hashlib
import lzma
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tutelage.evaluate.intervals import Estimate, ratio
from tutelage.evaluate.kneser_ney import KneserNey

BYTE_ORDER = 12  # longest byte n-gram tried; one more costs 0.4 s per 2 MB and gains under 1.5% on Python's documentation
TOKEN_ORDER = 7
XZ_GROUPS = 8  # the stream is cut here to learn what each part of the validation documents adds
XZ_SETTINGS: tuple[dict[str, int], ...] = ({"lc": 3, "lp": 0, "pb": 2}, {"lc": 4, "lp": 0, "pb": 0})
SEPARATOR = b"\xff"  # never occurs in UTF-8: marks the end of a document for xz

Encode = Callable[[str], Sequence[int]]


@dataclass(slots=True, frozen=True)
class Baseline:
    """Scores of one baseline on the validation documents."""

    name: str  # xz | kn-bytes | kn-tokens
    label: str  # for people: "Kneser-Ney, bytes, order 10"
    bits: NDArray[np.float64]  # per unit
    bytes: NDArray[np.float64]  # per unit, UTF-8
    unit: str  # what an entry of `bits` is: "document", or "group of documents" for xz
    members: NDArray[np.int64]  # per validation document: the unit that it belongs to
    details: dict[str, Any] = field(default_factory=dict)  # chosen order, bits with each order, settings, sizes

    def bits_per_byte(self, seed: int = 0) -> Estimate:
        return ratio(self.bits, self.bytes, seed=seed)


def measure(
    train: Sequence[str],
    validation: Sequence[str],
    *,
    encode: Encode | None = None,
    vocabulary: int = 0,
    max_train_bytes: int = 32_000_000,
    byte_order: int = BYTE_ORDER,
    token_order: int = TOKEN_ORDER,
) -> list[Baseline]:
    """All baselines on the same texts; the token n-gram only where `encode` (text to ids below `vocabulary`) is given.

    Above `max_train_bytes` they get a random subset of the training documents of that size, recorded in `details`
    (`train_bytes`, `train_bytes_given`): the memory of the n-gram model grows with order times bytes.
    """
    if not train or not validation:
        raise ValueError("baselines need training and validation documents")
    given = sum(len(x.encode()) for x in train)
    train = _subset(train, max_train_bytes / given) if given > max_train_bytes else train
    sizes = {"train_bytes": sum(len(x.encode()) for x in train), "train_bytes_given": given, "train_documents": len(train)}
    with ThreadPoolExecutor(1) as background:  # xz runs outside Python's lock
        compressed = background.submit(xz, train, validation)
        results = [kn_bytes(train, validation, byte_order)]
        if encode is not None:
            results.append(kn_tokens(train, validation, encode, vocabulary, token_order))
        results.insert(0, compressed.result())
    for result in results:
        result.details.update(sizes)
    return results


def xz(train: Sequence[str], validation: Sequence[str], *, groups: int = XZ_GROUPS) -> Baseline:
    """Bits that the validation documents add to the compressed training text, in `groups` consecutive parts."""
    before = b"".join(x.encode() + SEPARATOR for x in train)
    documents = [x.encode() for x in validation]
    after = b"".join(x + SEPARATOR for x in documents)
    if len(before) + len(after) > 16_000_000:
        groups = 1  # each cut compresses everything again, at about 1 MB/s
    # a group ends where the documents so far reach its equal share of the bytes
    reached = np.cumsum([len(x) + 1 for x in documents])
    _, members = np.unique((reached - 1) * groups // len(after), return_inverse=True)
    sizes = np.bincount(members, weights=[len(x) for x in documents]).astype(np.float64)
    ends = [int(reached[members == g].max()) for g in range(len(sizes))]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # each holds a match finder of about 11 dictionaries
        jobs = [(before, s) for s in XZ_SETTINGS] + [(before + after, s) for s in XZ_SETTINGS]
        lengths = list(pool.map(lambda job: _xz_bytes(*job), jobs))
        added = [b - a for a, b in zip(lengths[:2], lengths[2:], strict=True)]
        best = int(np.argmin(added))
        middle = list(pool.map(lambda end: _xz_bytes(before + after[:end], XZ_SETTINGS[best]), ends[:-1]))
    totals = np.array([lengths[best], *middle, lengths[2 + best]], np.float64)
    bits = np.diff(totals) * 8
    settings = {"preset": "9e", **XZ_SETTINGS[best]}
    details = {"settings": settings, "bits_per_byte_by_setting": [8 * x / sum(map(len, documents)) for x in added]}
    return Baseline("xz", "xz -9e after the training text", bits, sizes, "group of documents", members, details)


def kn_bytes(train: Sequence[str], validation: Sequence[str], max_order: int = BYTE_ORDER) -> Baseline:
    """Kneser-Ney over UTF-8 bytes."""
    bits, details = _kneser_ney(_as_bytes(train), _as_bytes(validation), 256, max_order)
    label = f"Kneser-Ney, bytes, order {details['order']}"
    return Baseline("kn-bytes", label, bits, _byte_counts(validation), "document", np.arange(len(validation)), details)


def kn_tokens(
    train: Sequence[str], validation: Sequence[str], encode: Encode, vocabulary: int, max_order: int = TOKEN_ORDER
) -> Baseline:
    """Kneser-Ney over the model's own tokens. Raises `ValueError` for an id outside the vocabulary."""
    before = [np.asarray(encode(x), np.int64) for x in train]
    after = [np.asarray(encode(x), np.int64) for x in validation]
    highest = max((int(x.max()) for x in (*before, *after) if len(x)), default=0)
    if highest >= vocabulary:
        raise ValueError(f"token id {highest} in a vocabulary of {vocabulary}")
    bits, details = _kneser_ney(before, after, vocabulary, max_order)
    details["tokens_per_document"] = float(np.mean([len(x) for x in after]))
    label = f"Kneser-Ney, the model's tokens, order {details['order']}"
    return Baseline("kn-tokens", label, bits, _byte_counts(validation), "document", np.arange(len(validation)), details)


def _kneser_ney(
    train: Sequence[NDArray[np.integer]], validation: Sequence[NDArray[np.integer]], size: int, max_order: int
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """Bits per validation document at the order that is best on a tenth of the training documents held out."""
    held = np.array([hashlib.sha256(x.tobytes()).digest()[0] < 26 for x in train])
    order, tried = max_order, []
    if held.any() and not held.all():
        part = KneserNey.fit([x for x, h in zip(train, held, strict=True) if not h], size=size, order=max_order)
        tried = part.bits([x for x, h in zip(train, held, strict=True) if h]).sum(axis=1).tolist()
        order = int(np.argmin(tried)) + 1
    model = KneserNey.fit(train, size=size, order=order)
    bits = model.bits(validation)[order - 1]
    details: dict[str, Any] = {"order": order, "orders_tried": max_order, "held_out_bits_by_order": tried}
    details["discounts"] = list(model.levels[-1].plain.discounts)
    return bits, details


def _xz_bytes(data: bytes, settings: dict[str, int]) -> int:
    size = max(1 << 16, 1 << (len(data) - 1).bit_length())  # the dictionary holds everything
    preset = 9 | lzma.PRESET_EXTREME
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": min(size, 1 << 30), **settings}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))


def _subset(texts: Sequence[str], share: float) -> list[str]:
    """About `share` of the texts, chosen by their hash."""
    limit = int(share * 2**64)
    kept = [x for x in texts if int.from_bytes(hashlib.sha256(x.encode()).digest()[:8], "big") < limit]
    return kept or list(texts[:1])


def _as_bytes(texts: Sequence[str]) -> list[NDArray[np.integer]]:
    return [np.frombuffer(x.encode(), np.uint8) for x in texts]


def _byte_counts(texts: Sequence[str]) -> NDArray[np.float64]:
    return np.array([len(x.encode()) for x in texts], np.float64)
