"""The slotted key-value cache: a fixed number of places for sequences of a fixed length, allocated once.

A place that is given back keeps its tokens until it is needed. A prompt that begins like a text in one of the places starts from
there: in the same place, or in a copy of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.errors import ConfigError
from tutelage.models.adapters.lora import Lora
from tutelage.models.interface import KVCache

CACHE_BYTES = 2 << 30
"""Default bound of the cache's memory: 2 GiB."""

SHARED_FROM = 8
"""Tokens from which a common beginning is worth a copy."""


@dataclass(slots=True, frozen=True)
class Place:
    """Where a prompt goes: `shared` tokens of it are in `source` already (the slot itself, or one to copy them from)."""

    slot: int
    source: int
    shared: int


@dataclass(slots=True, frozen=True)
class Held:
    """Tokens whose keys and values a place has, made by the model with an adapter or without, for one owner."""

    tokens: list[int]
    lora: Lora | None = None
    owner: str = ""


_NOTHING = Held([])


class Slots:
    """Which places of the cache are free, and what the free ones still hold."""

    def __init__(self, count: int, keep: bool = True) -> None:
        self.count, self.keep = count, keep
        self._free: dict[int, Held] = dict.fromkeys(range(count), _NOTHING)  # by slot, longest unused first

    def __len__(self) -> int:
        """Free places."""
        return len(self._free)

    @property
    def used(self) -> int:
        return self.count - len(self._free)

    @property
    def lowest(self) -> int:
        return min(self._free)

    def place(
        self, prompt: list[int], running: Iterable[tuple[int, Held]] = (), lora: Lora | None = None, owner: str = ""
    ) -> Place:
        """Takes a free place for a prompt. `running` gives slots in use with what they hold. Only texts with the same adapter and
        of the same owner are shared: how much of a prompt was there already, and how soon its answer begins, would tell one what
        another has asked.

        At least the prompt's last token is left to read: its logits are wanted.
        """
        source, shared = -1, 0
        if self.keep:
            for slot, held in (*self._free.items(), *running):
                same = held.lora is lora and held.owner == owner
                common = common_length(prompt, held.tokens, len(prompt) - 1) if same else 0
                if common > shared:
                    source, shared = slot, common
        if shared < SHARED_FROM:
            slot = next((s for s, held in self._free.items() if not held.tokens), next(iter(self._free)))
            return Place(self.take(slot), slot, 0)
        # A text that is mostly this prompt's beginning goes on in place; a longer one is copied, for others that begin like it.
        if source in self._free and (len(self._free) == 1 or 2 * shared >= len(self._free[source].tokens)):
            return Place(self.take(source), source, shared)
        others = [s for s in self._free if s != source]
        slot = next((s for s in others if not self._free[s].tokens), others[0])
        return Place(self.take(slot), source, shared)

    def take(self, slot: int) -> int:
        del self._free[slot]
        return slot

    def give(self, slot: int, held: Held = _NOTHING) -> None:
        """Gives a place back, and says what it holds."""
        assert 0 <= slot < self.count and slot not in self._free, f"slot {slot} is not in use"
        self._free[slot] = held if self.keep else _NOTHING

    def oldest(self) -> list[int]:
        """Free places, longest unused first."""
        return list(self._free)

    def empty(self, slot: int) -> None:
        """A free place holds nothing any more."""
        self._free[slot] = _NOTHING

    def forget(self, lora: Lora | None = None) -> None:
        """Free places hold nothing any more (with `lora`, nothing of that adapter): the weights have changed."""
        self._free = {s: held if lora is not None and held.lora is not lora else _NOTHING for s, held in self._free.items()}


def common_length(a: Sequence[int], b: Sequence[int], most: int) -> int:
    """Length of the common beginning of two lists of tokens, at most `most`. By halves: comparing slices is one call."""
    low, high = 0, min(len(a), len(b), most)
    if high <= 0 or a[0] != b[0]:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def caches(model: Any, length: int) -> bool:
    """Whether our cache is for texts of `length` tokens of this model."""
    traits = model.traits
    return traits.cache and (traits.cache_limit is None or length <= traits.cache_limit)  # type: ignore[no-any-return]


def token_bytes(model: Any) -> int:
    """Of the keys and values of one token; 0 for a model that does not say."""
    c = model.config
    try:
        return int(2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * next(model.parameters()).element_size())
    except AttributeError:
        return 0


def make_cache(model: Any, slots: int, length: int, limit_bytes: int = CACHE_BYTES) -> KVCache | None:
    """A cache of `slots` places for texts of `length` tokens; None for a model without one, or whose keys of a text's beginning
    do not stay the same as it grows to `length`. On a CPU places are made of memory only as they are written to (`memory.py`); on
    a GPU at once, and there are as many as `limit_bytes` has room for.

    Raises `ConfigError` when not even one sequence of `length` tokens fits.
    """
    if not caches(model, length):
        return None
    one = token_bytes(model) * length
    fit = limit_bytes // max(one, 1)
    if fit < 1:
        raise ConfigError(
            f"the key-value cache of one sequence of {length} tokens takes {one / 2**20:.0f} MiB",
            field="max_length", found=length, expected=f"at most {limit_bytes * length // one} tokens",
            fix="set a smaller max_length, or give the cache more memory (cache_gib)",
        )  # fmt: skip
    cache: KVCache = model.new_cache(slots if model.device.type == "cpu" else min(slots, fit), length)
    return cache
