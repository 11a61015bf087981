"""What `transformers` keeps of texts that are being generated, in its own cache objects: rows of equal length, read together.

Shapes: B rows, S tokens of the longest source, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(slots=True)
class State:
    """Keys and values of B rows that have read equally many tokens; of an encoder-decoder, their encoded sources too."""

    rows: int
    cache: Any  # DynamicCache; EncoderDecoderCache where there are sources
    source: Tensor | None = None  # [B,S,H] encoder states, padded at the right
    mask: Tensor | None = None  # [B,S] bool: which of them are real
    virtual: int = 0  # virtual tokens before what was read

    @classmethod
    def new(cls, rows: int, source: Tensor | None = None, mask: Tensor | None = None) -> State:
        """Nothing read yet."""
        from transformers import DynamicCache, EncoderDecoderCache

        cache = DynamicCache() if source is None else EncoderDecoderCache(DynamicCache(), DynamicCache())
        return cls(rows, cache, source, mask)

    @property
    def length(self) -> int:
        """Tokens that every row has read."""
        return int(self.cache.get_seq_length()) - self.virtual

    def crop(self, length: int) -> None:
        """Forgets what was read after the first `length` tokens."""
        if self.length > length:
            # Negative: counted from the end. What a positive number means changes between releases of `transformers`.
            self.cache.crop(length - self.length)

    @classmethod
    def of_rows(cls, parts: Sequence[tuple[State, int]], length: int) -> State:
        """A state of single rows of others, each cut to its first `length` tokens."""
        caches, virtual = [(state.cache, row) for state, row in parts], parts[0][0].virtual
        length += virtual
        sources = [(s.source, s.mask, row) for s, row in parts if s.source is not None and s.mask is not None]
        if not sources:
            return cls(len(parts), _rows_of_cache(caches, length), virtual=virtual)
        from transformers import EncoderDecoderCache

        width = max(int(mask[row].sum()) for _, mask, row in sources)
        cache = EncoderDecoderCache(
            _rows_of_cache([(c.self_attention_cache, row) for c, row in caches], length),
            _rows_of_cache([(c.cross_attention_cache, row) for c, row in caches], width),
        )
        source = _stack([states[row] for states, _, row in sources], width)
        mask = _stack([mask[row, :, None] for _, mask, row in sources], width).squeeze(-1)
        return cls(len(parts), cache, source, mask, virtual)


def _rows_of_cache(parts: Sequence[tuple[Any, int]], length: int) -> Any:
    """A DynamicCache of single rows of others."""
    from transformers import DynamicCache

    out = DynamicCache()
    for index in range(len(parts[0][0].layers)):
        layers = [(cache.layers[index], row) for cache, row in parts]
        keys = _stack([layer.keys[row] for layer, row in layers], length)
        values = _stack([layer.values[row] for layer, row in layers], length)
        out.update(keys, values, index)
    return out


def _stack(rows: list[Tensor], length: int) -> Tensor:
    """Rows [.., n, D] of any n as one tensor [B, .., length, D]: filled up with zeros, or cut (a negative padding)."""
    return torch.stack([F.pad(row, (0, 0, 0, length - row.shape[-2])) for row in rows])
