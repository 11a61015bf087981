"""What goes into a model and what comes out: one record each, the same for every model.

Shapes: B rows, T tokens, H hidden width, V vocabulary, S sequences being generated, L places in a cache.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor


class KVCache:
    """Keys and values of sequences being generated: `slots` places for sequences of up to `length` tokens.

    One tensor [slots, L, Hkv, D] a layer for keys and one for values, allocated once. Who fills a slot keeps its length. On a CPU
    memory comes as places are written to, and goes with `trim`; what was never written may be anything.
    """

    def __init__(
        self, layers: int, slots: int, length: int, heads: int, width: int, *, device: str | torch.device, dtype: torch.dtype
    ) -> None:
        shape = (slots, length, heads, width)
        make = torch.empty if torch.device(device).type == "cpu" else torch.zeros
        self.k, self.v = ([make(shape, device=device, dtype=dtype) for _ in range(layers)] for _ in "kv")
        self.slots, self.length = slots, length

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.k) + sum(x.nbytes for x in self.v)

    def trim(self, slot: int, tokens: int) -> None:
        """Gives the system back the memory of a slot behind so many tokens, whole pages of it. Of no effect but on Linux."""
        if _madvise is None or self.k[0].device.type != "cpu":
            return
        for held in (*self.k, *self.v):
            row = held[slot]
            first, last = row.data_ptr() + tokens * row.stride(0) * row.element_size(), row.data_ptr() + row.nbytes
            first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                _madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONTNEED)


_DONTNEED = 4
_madvise = ctypes.CDLL(None).madvise if sys.platform == "linux" else None


@dataclass(slots=True, frozen=True)
class CacheView:
    """The slots that the rows of a batch continue."""

    cache: KVCache
    slots: Tensor  # [S] int64: the slot of each row
    lengths: Tensor  # [S] int64: tokens already in the slot before this call
    longest: int | None = None  # places to read of each slot, where a step of one token a row must not depend on the lengths

    def to(self, device: str | torch.device) -> CacheView:
        return CacheView(self.cache, self.slots.to(device), self.lengths.to(device), self.longest)


@dataclass(slots=True, frozen=True)
class Tree:
    """Texts that share their beginnings, each token once. What a layer does to one token is done once for all texts; attention
    runs over the texts, E tokens laid end to end.

    Example:
        texts a b c and a b d e: tokens a b c d e, index 0 1 2 0 1 3 4, segments 1 1 1 2 2 2 2, back 0 1 2 5 6
    """

    index: Tensor  # [E] int64: the token at each place of the texts
    segments: Tensor  # [1,E] int32: the text of each place
    back: Tensor  # [T] int64: one place of each token

    def to(self, device: str | torch.device) -> Tree:
        return Tree(self.index.to(device), self.segments.to(device), self.back.to(device))


@dataclass(slots=True, frozen=True)
class Answers:
    """The S completions of a batch that an objective scores, with their N supervised tokens in order.

    Example:
        the prompt a b with the completions c d and e in one row a b c d e:
        positions 1 2 1, targets c d e, completion_of 0 0 1, last_position 3 4
    """

    positions: Tensor  # [N] int64: index into the flattened batch of the token whose hidden state predicts the target
    targets: Tensor  # [N] int64
    completion_of: Tensor  # [N] int64, ascending: index of the completion that each token belongs to
    last_position: Tensor  # [S] int64: index into the flattened batch of each completion's last token
    tokens: Mapping[str, Tensor] = field(default_factory=dict)  # named values per token, [N] or [N,k]
    per_completion: Mapping[str, Tensor] = field(default_factory=dict)  # named values per completion, [S] or [S,k]
    shared: Mapping[str, float] = field(default_factory=dict)  # named values of the global batch, from its preparing pass

    @property
    def count(self) -> int:
        return len(self.last_position)

    def sums(self, values: Tensor) -> Tensor:
        """[N] -> [S]: sums over the tokens of each completion."""
        return values.new_zeros(self.count).index_add(0, self.completion_of, values)

    @property
    def lengths(self) -> Tensor:
        """[S] float32: supervised tokens of each completion."""
        return self.sums(torch.ones_like(self.positions, dtype=torch.float32))

    def to(self, device: str | torch.device) -> Answers:
        moved: dict[str, Any] = {
            n: getattr(self, n).to(device) for n in ("positions", "targets", "completion_of", "last_position")
        }
        for name in ("tokens", "per_completion"):
            moved[name] = {k: v.to(device) for k, v in getattr(self, name).items()}
        return replace(self, **moved)


@dataclass(slots=True, frozen=True)
class Batch:
    """Rows of tokens.

    With `cache`, row s holds the next tokens of the sequence in slot `cache.slots[s]`: one segment a row, padding only at the
    right, positions counted from the start of the sequence. Tokens of the row see those in the slot and those before them in the
    row; the forward pass writes their keys and values to the slot. Padding is never written.

    With `tree`, the only row holds prompt groups, one segment each: a prompt once, then its completions. Only our own decoder
    supports trees.

    With `source_ids`, for encoder-decoders, row b is a target that begins with the decoder's start token, after source b.

    Example:
        two pieces of 3 and 2 tokens and 1 place of padding in a row of 6:
        segments 1 1 1 2 2 0, positions 0 1 2 0 1 0, targets a1 a2 0 b1 0 0, weights 1 1 0 1 0 0
    """

    ids: Tensor  # [B,T] int64
    segments: Tensor  # [B,T] int32: 0 = padding, else 1..n inside a row
    positions: Tensor  # [B,T] int64: restart at 0 in each piece
    targets: Tensor  # [B,T] int64: the next token of the same segment
    weights: Tensor  # [B,T] float32: supervision of the target; 0 on the last token of a segment
    cache: CacheView | None = None
    tree: Tree | None = None
    embeds: Tensor | None = None  # [B,T,H] in place of the embeddings of `ids`
    attention: str = "causal"
    rows: tuple[tuple[str, ...], ...] | None = None  # names of the records in each row
    answers: Answers | None = None  # completions to score, for objectives that do not use `targets` and `weights`
    source_ids: Tensor | None = None  # [B,S] int64
    source_segments: Tensor | None = None  # [B,S] int32: 0 = padding, else 1
    replay: bool = False  # rows of plain text beside what the objective is about (objectives/replay.py)

    @property
    def shape(self) -> tuple[int, int]:
        return self.ids.shape[0], self.ids.shape[1]

    @classmethod
    def of_groups(
        cls, prompt_groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], device: str | torch.device = "cpu"
    ) -> Batch:
        """Prompts and their completions in one row: each prompt once, then its completions one after the other. There are no
        targets. `tree` is None unless some prompt has several completions."""
        ids: list[int] = []
        segments: list[int] = []
        positions: list[int] = []
        index: list[int] = []
        texts: list[int] = []  # their lengths
        back: list[int] = []
        for number, (prompt, completions) in enumerate(prompt_groups, 1):
            first = len(ids)
            ids += prompt
            positions += range(len(prompt))
            back += range(len(index), len(index) + len(prompt))
            for completion in completions or ((),):
                index += range(first, first + len(prompt))
                back += range(len(index), len(index) + len(completion))
                index += range(len(ids), len(ids) + len(completion))
                ids += completion
                positions += range(len(prompt), len(prompt) + len(completion))
                texts.append(len(prompt) + len(completion))
            segments += [number] * (len(ids) - first)
        row, marks = torch.tensor([ids, positions]), torch.tensor([segments], dtype=torch.int32)
        tree = None
        if len(texts) > len(prompt_groups):
            of = torch.arange(1, len(texts) + 1, dtype=torch.int32).repeat_interleave(torch.tensor(texts))
            tree = Tree(torch.tensor(index), of[None], torch.tensor(back))
        nothing = torch.zeros(1, len(ids))
        return cls(row[:1], marks, row[1:], nothing.long(), nothing, tree=tree).to(device)

    def to(self, device: str | torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        names = ("ids", "segments", "positions", "targets", "weights", "embeds", "cache", "tree", "answers", "source_ids",
                 "source_segments")  # fmt: skip
        moved: dict[str, Any] = {n: getattr(self, n).to(device) for n in names if getattr(self, n) is not None}
        return replace(self, **moved)

    @classmethod
    def of(
        cls,
        texts: Sequence[Sequence[int]],
        *,
        supervised: Sequence[Sequence[float]] | None = None,
        pad: int = 0,
        cache: CacheView | None = None,
        device: str | torch.device = "cpu",
    ) -> Batch:
        """One text a row, padded at the right. `supervised` gives each token's own weight as a target (1 where left out).

        With `cache`, positions count on from the lengths in it.
        """
        rows, length = len(texts), max((len(t) for t in texts), default=0)
        ids = torch.full((rows, length), pad, dtype=torch.int64)
        segments = torch.zeros((rows, length), dtype=torch.int32)
        weights = torch.zeros((rows, length), dtype=torch.float32)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.as_tensor(text, dtype=torch.int64)
            segments[row, : len(text)] = 1
            if len(text) > 1:
                weights[row, : len(text) - 1] = 1.0 if supervised is None else torch.as_tensor(supervised[row][1:]).float()
        targets = torch.zeros_like(ids)
        targets[:, :-1] = torch.where(segments[:, 1:] != 0, ids[:, 1:], 0)
        before = torch.zeros(rows, dtype=torch.int64) if cache is None else cache.lengths.cpu()
        positions = torch.where(segments != 0, before[:, None] + torch.arange(length), 0)
        return cls(ids, segments, positions, targets, weights, cache=cache).to(device)


@dataclass(slots=True, frozen=True)
class Output:
    """What a model makes of a batch. The head is not run: hand `hidden` to it."""

    hidden: Tensor  # [B,T,H], after the last norm
    layers: tuple[Tensor, ...] | None = None  # [B,T,H] each: the embeddings, then the output of every layer
    aux: Mapping[str, Tensor] = field(default_factory=dict)  # named sums that an objective may add (router loss)


@dataclass(slots=True, frozen=True)
class Traits:
    """What a model can do. Code that has to choose reads this instead of asking for a model's class."""

    cache: bool = False  # reads and fills `batch.cache`, our key-value cache
    cache_limit: int | None = None  # tokens of the longest text whose cached keys stay right while it grows; None: any length
    trees: bool = False  # reads a beginning that several texts of a batch share once (`batch.tree`)
    encoder_decoder: bool = False  # writes a target after a source: `begin`, `read`, `start` and `ends`
    virtual_tokens: int = 0  # positions of the context that an adapter's virtual tokens take
    virtual_sources: bool = False  # of an encoder-decoder: whether they come before the source, not before the target


class Model(Protocol):
    """Our decoder, and any model of `transformers` with the same interface."""

    config: Any  # vocab_size, hidden_size, num_hidden_layers, ...; `to_hf()`
    lm_head: Any  # heads.LmHead, or one with the same methods

    @property
    def traits(self) -> Traits: ...

    def __call__(self, batch: Batch) -> Output: ...

    def logits(self, batch: Batch) -> Tensor: ...
