"""The slotted key-value cache: a fixed number of places for sequences of a fixed length, allocated once."""

from __future__ import annotations

import heapq
from typing import Any

from tutelage.errors import ConfigError
from tutelage.models.interface import KVCache

CACHE_BYTES = 2 << 30
"""Default bound of the cache: 2 GiB."""


class Slots:
    """Which places of the cache are free. The lowest free place is taken first, so that those in use lie together."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))

    def __len__(self) -> int:
        """Free places."""
        return len(self._free)

    @property
    def used(self) -> int:
        return self.count - len(self._free)

    @property
    def lowest(self) -> int:
        """The free place that `take` would give."""
        return self._free[0]

    def take(self) -> int:
        return heapq.heappop(self._free)

    def give(self, slot: int) -> None:
        assert 0 <= slot < self.count and slot not in self._free, f"slot {slot} is not in use"
        heapq.heappush(self._free, slot)


def make_cache(model: Any, slots: int, length: int, limit_bytes: int = CACHE_BYTES) -> KVCache | None:
    """A cache of at most `slots` places within `limit_bytes`, fewer where they would not fit; None for a model without one.

    Raises `ConfigError` when not even one sequence of `length` tokens fits.
    """
    if not getattr(model, "supports_cache", False):
        return None
    one: int = model.new_cache(1, 1).nbytes * length
    fit = min(slots, limit_bytes // max(one, 1))
    if fit < 1:
        raise ConfigError(
            f"the key-value cache of one sequence of {length} tokens takes {one / 2**20:.0f} MiB",
            field="max_length", found=length, expected=f"at most {limit_bytes * length // one} tokens",
            fix="set a smaller max_length",
        )  # fmt: skip
    cache: KVCache = model.new_cache(fit, length)
    return cache
