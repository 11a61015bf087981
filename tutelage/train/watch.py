"""Proof that a run trains what it should: every trainable tensor moves, no frozen one does (promise 13)."""

from __future__ import annotations

import torch
from torch import nn

from tutelage.errors import TrainingStopped
from tutelage.models.shard import local
from tutelage.train import distributed

CHUNK = 1 << 18  # values whose digest is made at a time: the temporaries stay in the cache, and small on a GPU
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def digest(x: torch.Tensor) -> int:
    """64 bits of a tensor's bits and their places, made where the tensor is.

    `torch.hash_tensor` is the exclusive or of all values: an even number of equal changes, as in AdamW's first step on weights
    that are all 1, leaves it as it was.
    """
    flat, total = x.detach().reshape(-1).view(BITS[x.element_size()]), 0
    for at in range(0, flat.numel(), CHUNK):
        part = flat[at : at + CHUNK].long()
        mixed = part + torch.arange(at + 1, at + 1 + part.numel(), device=x.device) * -0x61C8864680B583EB  # as in splitmix64
        mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
        mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
        total += int((mixed ^ (mixed >> 31)).sum())
    return total


class UpdateWatch:
    """Compares digests of all tensors before the first step with those some steps later."""

    def __init__(self, parts: dict[str, nn.Module], within: int = 5) -> None:
        self.parts, self.within, self.steps = parts, within, 0
        self.before = self._digests()
        self.pending = {n for n, (trainable, _) in self.before.items() if trainable}
        self.done = not self.pending

    def _digests(self) -> dict[str, tuple[bool, int]]:
        return {
            f"{part}.{name}": (p.requires_grad, digest(local(p)))
            for part, module in self.parts.items()
            for name, p in module.named_parameters()
        }

    def _changed(self) -> set[str]:
        """The tensors that are not what they were, on any rank: of a shard no rank may hold the rows that moved."""
        changed = distributed.any_rank(**{n: now != self.before[n] for n, now in self._digests().items()})
        return {n for n in changed if changed[n]}

    def check_frozen(self) -> set[str]:
        """The tensors that have changed. Raises `TrainingStopped` when a frozen one has."""
        changed = self._changed()
        frozen = [n for n, (trainable, _) in self.before.items() if n in changed and not trainable]
        if frozen:
            raise TrainingStopped(
                f"{len(frozen)} frozen tensors changed", found=", ".join(frozen[:5]), fix="report this as a bug"
            )
        return changed

    def after_step(self) -> None:
        """Call after each step whose learning rate was above zero. Raises `TrainingStopped` and names the tensors."""
        if self.done:
            return
        self.steps += 1
        self.pending -= self.check_frozen()
        if not self.pending:
            self.done = True
        elif self.steps >= self.within and not (self.steps == 1 and all(n.endswith(".change.a") for n in self.pending)):
            # The first step of a low-rank change moves its zero factor alone: the other one's gradient is a multiple of that.
            raise TrainingStopped(
                f"{len(self.pending)} of {len(self.before)} tensors should have been trained and did not change in "
                f"{self.steps} steps",
                found=", ".join(sorted(self.pending)[:5]),
                expected="a finite, non-zero update of each",
                fix="raise the learning rate (an update below float32 resolution is lost), or freeze these tensors",
            )
