"""Trains some rows of a model's tables and nothing else, and proves it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tutelage.errors import TrainingStopped
from tutelage.train.hooks import Quiet
from tutelage.train.loop import State
from tutelage.train.watch import digest


class OnlyRows(Quiet):
    """Freezes `model` but for the rows of `tables` from `first` to `stop`, from now on.

    Gradients of other rows are made zero before anything sees them, so that norm and clipping count the new rows alone; AdamW
    without decay leaves what never had a gradient as it is, to the bit. As the watch of the loop knows whole tensors only, the
    rows around are compared by digest after the first step and after the last one (promise 13).
    """

    def __init__(self, model: nn.Module, tables: list[nn.Parameter], first: int, stop: int) -> None:
        self.tables, self.first, self.stop = tables, first, stop
        self.before: list[int] = []
        for p in model.parameters():
            p.requires_grad_(False)
        for p in tables:
            p.requires_grad_(True)
            p.register_hook(self._masked)

    def _masked(self, gradient: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(gradient)
        out[self.first : self.stop] = gradient[self.first : self.stop]
        return out

    def _digests(self) -> list[int]:
        return [digest(rows) for p in self.tables for rows in (p[: self.first], p[self.stop :])]

    def start(self, state: State) -> None:
        self.before = self.before or self._digests()

    def after_step(self, state: State) -> None:
        if (state.progress.step == 1 or state.last) and self._digests() != self.before:
            raise TrainingStopped(
                "rows of old tokens changed while only those of new ones are trained",
                found=f"at step {state.progress.step}", fix="report this as a bug",
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = state["before"] if state else []
