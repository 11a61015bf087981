"""An engine whose every step is checked against reading all sequences again from their beginnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tutelage.engine import Engine
from tutelage.engine.hf_runner import HfRunner
from tutelage.engine.runner import RecomputingRunner, Work


@dataclass
class Counted:
    """A model that notes [rows, tokens] of what it reads. Around it, not in it: it outlives the engine."""

    model: Any
    reads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def lm_head(self) -> Any:
        return self.model.lm_head

    def begin(self, sources: Sequence[Sequence[int]]) -> Any:
        return self.model.begin(sources)

    def extend(self, ids: torch.Tensor, state: Any) -> torch.Tensor:
        self.reads.append((ids.shape[0], ids.shape[1]))
        return self.model.extend(ids, state)


class Watch:
    """`work` of all steps of an engine, `reads` of its model."""

    def __init__(self, engine: Engine) -> None:
        assert isinstance(engine.runner, HfRunner)
        counted = Counted(engine.model)
        engine.runner.model, self.reads = counted, counted.reads
        self.work: list[list[Work]] = []
        self.fast, self.slow = engine.runner.logits, RecomputingRunner(engine.model, engine.device)
        engine.runner.logits = self.logits  # type: ignore[method-assign]

    def logits(self, work: list[Work]) -> torch.Tensor:
        self.work.append(work)
        got = self.fast(work)
        torch.testing.assert_close(got, self.slow.logits(work), atol=1e-4, rtol=1e-5)
        return got
