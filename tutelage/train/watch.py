"""Proof that a run trains what it should: every trainable tensor moves, no frozen one does (promise 13)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from tutelage.errors import TrainingStopped
from tutelage.models.shard import local
from tutelage.train import distributed

if TYPE_CHECKING:
    from tutelage.train.optim import Optimizers

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
    """Compares digests of all tensors before the first step with those some steps later.

    A tensor that no gradient reaches is named after `within` steps. One whose updates are lost in rounding may have to wait for
    the learning rate: it is named after `until` steps, those of the warm-up and a few more (None: an earlier attempt has passed
    them). Without `optimizers` nobody can tell the two apart, and both are named after `within`.
    """

    def __init__(
        self, parts: dict[str, nn.Module], within: int = 5, until: int | None = 0, optimizers: Optimizers | None = None
    ) -> None:
        self.parts, self.within, self.until, self.optimizers, self.steps = parts, within, until, optimizers, 0
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
        last = self.steps == self.until
        if self.steps > self.within and self.steps & (self.steps - 1) and not last:
            return  # in a long warm-up, now and then
        self.pending -= self.check_frozen()
        if not self.pending:
            self.done = True
        elif self.steps >= self.within and not (self.steps == 1 and all(n.endswith(".change.a") for n in self.pending)):
            # The first step of a low-rank change moves its zero factor alone: the other one's gradient is a multiple of that.
            unreached = self.pending - self._reached()
            if unreached:
                raise self._stopped(unreached, "detach nothing between these tensors and the loss, or freeze them")
            if self.until is None:
                self.done = True
            elif self.steps >= self.until:
                raise self._stopped(
                    self.pending, "raise the learning rate (an update below float32 resolution is lost), or freeze these tensors"
                )

    def _reached(self) -> set[str]:
        """Those of the pending tensors whose optimizer has seen a gradient, on any rank."""
        if self.optimizers is None:
            return self.pending
        seen = dict.fromkeys(self.pending, False)
        for full, value in self.optimizers.state_tensors().items():
            name, _, key = full.rpartition(".")
            if name in seen and key != "step":
                seen[name] |= bool(local(value).any())
        found = distributed.any_rank(**seen)
        return {name for name in seen if found[name]}

    def _stopped(self, names: set[str], fix: str) -> TrainingStopped:
        return TrainingStopped(
            f"{len(names)} of {len(self.before)} tensors should have been trained and did not change in {self.steps} steps",
            found=", ".join(sorted(names)[:5]), expected="a finite, non-zero update of each", fix=fix,
        )  # fmt: skip
