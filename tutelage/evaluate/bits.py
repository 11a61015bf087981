"""Bits per byte and perplexity of a model on held-out documents, streaming.

Each document is read on its own, from its begin mark: no document sees another. A document longer than the context is read
through windows that advance by `stride` tokens. Every token after the begin mark is predicted exactly once, the
end-of-document token included: the model pays for predicting where a text ends. Where a tokenizer has no begin mark, nothing
predicts the first token, and it costs ln(vocabulary) nats. Bits per byte = nats / ln 2 / UTF-8 bytes of the document's
text (marks have no bytes), so models with different tokenizers can be compared, and `xz` too.

The head computes only log-probabilities of the predicted tokens, chunk by chunk; two numbers per document are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tutelage.data.tokens.pack import Pieces, eval_rows
from tutelage.errors import DataError, TrainingStopped
from tutelage.evaluate.intervals import Estimate, ratio
from tutelage.models.interface import Batch

GROUP_TOKENS = 4_000_000  # ids of documents held in memory at a time


@dataclass(slots=True, frozen=True)
class Encoded:
    """An encoded document: `ids` begins with the begin mark, where there is one, and ends with the end mark."""

    ids: NDArray[np.integer]
    bytes: int  # UTF-8 bytes of its text
    name: str = ""  # record id
    first_nats: float = 0.0  # cost of ids[0]: 0 for a begin mark, which is given


@dataclass(slots=True)
class DocumentSums:
    """Per document: the nats that the model needs. Parallel lists, in the order of the documents."""

    nats: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # predicted
    bytes: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @property
    def bits(self) -> NDArray[np.float64]:
        return np.asarray(self.nats, np.float64) / math.log(2)

    def bits_per_byte(self, seed: int = 0) -> Estimate:
        return ratio(self.bits, self.bytes, seed=seed)

    def perplexity(self, seed: int = 0) -> Estimate:
        """exp(nats per predicted token). It depends on the tokenizer: compare models with the same one only."""
        return ratio(self.nats, self.tokens, seed=seed, transform=np.exp)

    def bytes_per_token(self) -> float:
        """Text bytes per predicted token, end marks counted as tokens."""
        return sum(self.bytes) / sum(self.tokens)

    def to_json(self) -> list[dict[str, Any]]:
        rows = zip(self.names, self.nats, self.tokens, self.bytes, strict=True)
        return [{"document": d, "nats": n, "tokens": t, "bytes": b} for d, n, t, b in rows]


@torch.no_grad()
def measure(
    model: Any,
    documents: Iterable[Encoded],
    *,
    row_length: int,
    stride: int | None = None,
    batch_tokens: int = 8192,
    device: str | torch.device = "cpu",
) -> DocumentSums:
    """The nats that `model` needs for each document; its training mode is restored afterwards.

    `row_length` is the context in tokens, `stride` (default: half of it) how far a window advances: each predicted token sees
    at least `row_length - stride` tokens before it, or all there are. A batch has at most `batch_tokens` tokens.
    Raises `DataError` for a document without tokens to predict, `TrainingStopped` for a log-probability that is not finite.
    """
    stride = stride if stride is not None else max(1, row_length // 2)
    sums = DocumentSums()
    was_training = model.training
    model.train(False)
    try:
        for group in _groups(documents):
            _measure_group(model, group, sums, row_length, stride, max(1, batch_tokens // row_length), device)
    finally:
        model.train(was_training)
    if not sums.nats:
        raise DataError("no held-out document to measure", fix="check that the validation file is not empty")
    return sums


def _groups(documents: Iterable[Encoded]) -> Iterator[list[Encoded]]:
    group, held = [], 0
    for document in documents:
        if len(document.ids) < 2 or document.bytes < 1:
            raise DataError("a document has no token to predict", field="text", found=document.name, expected="some text")
        group.append(document)
        held += len(document.ids)
        if held >= GROUP_TOKENS:
            yield group
            group, held = [], 0
    if group:
        yield group


def _measure_group(
    model: Any,
    group: list[Encoded],
    sums: DocumentSums,
    row_length: int,
    stride: int,
    rows_per_batch: int,
    device: str | torch.device,
) -> None:
    plan = eval_rows(np.array([len(d.ids) for d in group], np.int64), row_length, stride)
    nats, tokens = np.zeros(len(group)), np.zeros(len(group), np.int64)
    longest_first = np.argsort(-plan.row_tokens(), kind="stable")  # the largest batch first: no late out-of-memory
    for start in range(0, len(plan), rows_per_batch):
        rows = [plan.row(int(r)) for r in longest_first[start : start + rows_per_batch]]
        batch, owner = make_batch([d.ids for d in group], rows, device)
        picked = batch.weights.flatten().nonzero().squeeze(1)
        hidden = model(batch).hidden.flatten(0, 1)[picked]
        logprobs = model.lm_head.logprobs(hidden, batch.targets.flatten()[picked]).double().cpu().numpy()
        owners = owner.reshape(-1)[picked.cpu().numpy()]
        if not np.isfinite(logprobs).all():
            names = sorted({group[i].name or f"document {i}" for i in owners[~np.isfinite(logprobs)]})
            raise TrainingStopped(
                "a log-probability is not finite",
                found=", ".join(names[:3]),
                fix="the weights are damaged: use an earlier checkpoint",
            )
        np.add.at(nats, owners, -logprobs)
        np.add.at(tokens, owners, 1)
    assert (tokens == [len(d.ids) - 1 for d in group]).all(), "each token is predicted exactly once"
    sums.nats += (nats + [d.first_nats for d in group]).tolist()
    sums.tokens += (tokens + [d.first_nats > 0 for d in group]).tolist()
    sums.bytes += [d.bytes for d in group]
    sums.names += [d.name for d in group]


def make_batch(
    ids: list[NDArray[np.integer]], rows: list[Pieces], device: str | torch.device = "cpu"
) -> tuple[Batch, NDArray[np.int64]]:
    """The batch of some evaluation rows, and the document of each position: [B,T], -1 for padding."""
    width = max(int(row.tokens.sum()) for row in rows)
    shape = (len(rows), width)
    tokens, targets, positions = (np.zeros(shape, np.int64) for _ in range(3))
    segments, weights, owner = np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.full(shape, -1, np.int64)
    for r, row in enumerate(rows):
        at = 0
        pieces = zip(row.segment.tolist(), row.start.tolist(), row.stop.tolist(), row.context.tolist(), strict=True)
        for k, (document, start, stop, context) in enumerate(pieces, 1):
            length = stop - start
            part = slice(at, at + length)
            tokens[r, part] = ids[document][start:stop]
            targets[r, at : at + length - 1] = ids[document][start + 1 : stop]
            weights[r, at + context : at + length - 1] = 1.0
            segments[r, part], owner[r, part] = k, document
            positions[r, part] = np.arange(length)
            at += length
    ids_BT, segments_BT, positions_BT, targets_BT, weights_BT = (
        torch.from_numpy(x) for x in (tokens, segments, positions, targets, weights)
    )
    return Batch(ids_BT, segments_BT, positions_BT, targets_BT, weights_BT).to(device), owner
