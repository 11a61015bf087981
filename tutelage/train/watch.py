"""Proof that a run trains what it should: every trainable tensor moves, no frozen one does (promise 13)."""

from __future__ import annotations

import torch
from torch import nn

from tutelage.errors import TrainingStopped


class UpdateWatch:
    """Compares digests of all tensors before the first step with those some steps later."""

    def __init__(self, parts: dict[str, nn.Module], within: int = 5) -> None:
        self.parts, self.within, self.steps = parts, within, 0
        self.before = self._digests()
        self.pending = {n for n, (trainable, _) in self.before.items() if trainable}
        self.done = not self.pending

    def _digests(self) -> dict[str, tuple[bool, int]]:
        return {
            f"{part}.{name}": (p.requires_grad, int(torch.hash_tensor(p.detach()).item()))
            for part, module in self.parts.items()
            for name, p in module.named_parameters()
        }

    def after_step(self) -> None:
        """Call after each step whose learning rate was above zero. Raises `TrainingStopped` and names the tensors."""
        if self.done:
            return
        self.steps += 1
        now = self._digests()
        frozen = [n for n, (trainable, digest) in now.items() if not trainable and digest != self.before[n][1]]
        if frozen:
            raise TrainingStopped(
                f"{len(frozen)} frozen tensors changed", found=", ".join(frozen[:5]), fix="report this as a bug"
            )
        self.pending = {n for n in self.pending if now[n][1] == self.before[n][1]}
        if not self.pending:
            self.done = True
        elif self.steps >= self.within:
            raise TrainingStopped(
                f"{len(self.pending)} of {len(now)} tensors should have been trained and did not change in {self.steps} steps",
                found=", ".join(sorted(self.pending)[:5]),
                expected="a finite, non-zero update of each",
                fix="raise the learning rate (an update below float32 resolution is lost), or freeze these tensors",
            )
