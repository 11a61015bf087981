"""Decoding on CUDA through captured graphs: one launch a step instead of hundreds.

A graph has fixed shapes: rows and the places read of each slot are rounded up to powers of two. Rows that are too many repeat the
first one, which writes the same keys and values to the same place again. On a CPU, our fused call does what a graph does here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tutelage.engine.runner import CachedRunner, Work
from tutelage.engine.sequence import Sampling, Sequence
from tutelage.log import say
from tutelage.models.interface import Batch, CacheView, KVCache
from tutelage.tokenizer.detokenize import TextStream

SHORTEST = 256
"""Places of a slot that the smallest graph reads."""
KEPT = 24
"""Graphs that are kept; each has activations of its own."""


class Step:
    """One token more for so many rows, with inputs and outputs at fixed addresses."""

    def __init__(self, model: Any, cache: KVCache, rows: int, longest: int, device: torch.device) -> None:
        self.model, self.rows = model, rows
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.slots, self.lengths = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        nothing = torch.zeros(rows, 1, device=device)
        segments = torch.ones(rows, 1, dtype=torch.int32, device=device)
        view = CacheView(cache, self.slots, self.lengths, longest)
        self.batch = Batch(self.ids, segments, self.lengths[:, None], self.ids, nothing, cache=view)

    def fill(self, work: list[Work]) -> None:
        filled = work + work[:1] * (self.rows - len(work))
        rows = [(w.tokens[0], w.sequence.slot, w.sequence.cached) for w in filled]
        ids, slots, lengths = torch.tensor(rows).to(self.ids.device).unbind(1)
        self.ids.copy_(ids[:, None])
        self.slots.copy_(slots)
        self.lengths.copy_(lengths)

    def run(self) -> Tensor:
        """Logits [rows, V]."""
        logits: Tensor = self.model.lm_head.logits(self.model(self.batch).hidden[:, 0])
        return logits

    def captured(self) -> Callable[[], Tensor]:
        """`run` as a graph; what it returns is overwritten by the next replay."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self.run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.run()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


class GraphRunner(CachedRunner):
    """Steps of one token a sequence through graphs; everything else, and adapters, operation by operation.

    capture: without it the same fixed shapes run as they are, on any device.
    """

    def __init__(self, model: Any, cache: KVCache, capture: bool = True) -> None:
        super().__init__(model, cache)
        self.capture = capture
        self._steps: dict[tuple[int, int], tuple[Step, Callable[[], Tensor]]] = {}
        self._parameters = list(model.parameters())
        self._addresses = self._now()

    @classmethod
    def of(cls, model: Any, cache: KVCache) -> GraphRunner | None:
        """None where a graph would not do what the model does: one with hooks, one whose angles follow the length of a text, or
        one whose captured step, tried here, does not agree."""
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        if hooked or model.traits.cache_limit is not None:
            return None
        runner = cls(model, cache)
        return runner if _agrees(runner, CachedRunner(model, cache)) else None

    def _now(self) -> list[int]:
        return [p.data_ptr() for p in self._parameters]

    def _one_each(self, work: list[Work]) -> Tensor:
        if any(w.sequence.lora is not None for w in work):
            return super()._one_each(work)
        if self._now() != self._addresses:  # weights have moved
            self._steps.clear()
            self._addresses = self._now()
        longest = max(w.sequence.cached for w in work) + 1
        key = _power(len(work)), min(_power(max(longest, SHORTEST)), self.cache.length)
        if key not in self._steps:
            if len(self._steps) == KEPT:
                self._steps.pop(next(iter(self._steps)))
            step = Step(self.model, self.cache, *key, self.device)
            step.fill(work)  # warming up writes to the cache: what is written anyway
            self._steps[key] = step, step.captured() if self.capture else step.run
        step, run = self._steps[key]
        step.fill(work)
        return run()[: len(work)].clone()


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


@torch.inference_mode()
def _agrees(fast: GraphRunner, slow: CachedRunner) -> bool:
    """Whether both give the same logits for two sequences, each a token long."""
    both = []
    for slot in range(min(2, fast.cache.slots)):
        made = Sequence([1 + slot], Sampling(), TextStream(None), seed=0, index=0, limit=1, ends=frozenset())
        made.slot = slot
        both.append(Work(made, made.ids))
    try:
        got, expected = fast.logits(both), slow.logits(both)
    except RuntimeError as error:
        say(f"decoding without CUDA graphs: {error}")
        return False
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * float(expected.abs().max())
    if torch.allclose(got, expected, rtol=0, atol=tolerance):
        return True
    say("decoding without CUDA graphs: a captured step gave other logits")
    return False
