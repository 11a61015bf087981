"""One optimizer step: forward and backward over the micro-batches, one global division, clip, update."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from tutelage.errors import DataError
from tutelage.models.shard import local, release
from tutelage.objectives import Objective, Term
from tutelage.train import distributed
from tutelage.train.optim import Optimizers

if TYPE_CHECKING:
    from tutelage.data.tokens.loader import GlobalBatch
    from tutelage.models.interface import Batch


CPU = torch.device("cpu")


@dataclass(slots=True)
class StepResult:
    """What one step measured, over all ranks."""

    loss: float  # weighted sum of the terms
    terms: dict[str, float]  # each term over its unit's global count
    grad_norm: float  # before clipping
    bad_micro: int | None = None  # index of this rank's first micro-batch whose loss is not finite


@dataclass(frozen=True, slots=True)
class StepConfig:
    """What a step needs besides batch and optimizer."""

    parts: dict[str, nn.Module]
    objective: Objective
    weights: dict[str, float] = field(default_factory=dict)  # of terms; 1 where absent
    clip: float | None = 1.0
    dtype: torch.dtype = torch.float32  # of the products; weights stay float32
    device: torch.device = CPU

    def total(self, terms: dict[str, float]) -> float:
        """The loss: the weighted sum of the terms, without those that are only measured."""
        return sum(self.weights.get(n, 1.0) * v for n, v in terms.items() if not n.startswith("_"))

    def autocast(self) -> torch.autocast | nullcontext[None]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def gradients(recipe: StepConfig, batch: GlobalBatch) -> StepResult:
    """Adds the gradient of the global batch to every parameter. The division by global counts happens before the backward
    pass of each micro-batch, so accumulation, packing and the number of ranks change nothing but rounding."""
    sums: dict[str, float] = {}
    bad = None
    shared = prepared(recipe, batch.micro, batch.counts)
    for index, micro in enumerate(batch.micro):
        micro = with_shared(micro.to(recipe.device), shared)
        with recipe.autocast():
            terms = recipe.objective(recipe.parts, micro)
        total = None
        for name, term in terms.items():
            if _absent(name, term, batch.counts):
                continue
            share = term.sum / _count(batch, term.unit)
            sums[name] = sums.get(name, 0.0) + share.item()
            if name.startswith("_"):
                continue
            part = share * recipe.weights.get(name, 1.0)
            total = part if total is None else total + part
        assert total is not None, "an objective returned no term"
        if bad is None and not math.isfinite(total.item()):
            bad = index
        total.backward()
    if not batch.micro:  # a rank without rows still takes part in the sums
        raise DataError("the global batch has fewer rows than there are ranks", fix="raise batch_tokens or use fewer ranks")
    params = [p for part in recipe.parts.values() for p in part.parameters()]
    distributed.sum_gradients(params)
    sums = distributed.sum_values(sums)
    loss = recipe.total(sums)
    norm = distributed.total_norm([p.grad for p in params if p.grad is not None])
    return StepResult(loss, sums, norm, bad)


def train_step(recipe: StepConfig, batch: GlobalBatch, optimizers: Optimizers) -> StepResult:
    """One step. When loss or gradient is not finite nothing is updated: the caller sees it in the result."""
    result = gradients(recipe, batch)
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        return result
    if recipe.clip is not None and result.grad_norm > recipe.clip:
        factor = recipe.clip / (result.grad_norm + 1e-6)
        torch._foreach_mul_([local(p.grad) for p in optimizers.params if p.grad is not None], factor)
    optimizers.step()
    return result


@torch.no_grad()
def prepared(recipe: StepConfig, micro: list[Batch], counts: dict[str, float]) -> dict[str, float]:
    """What the objective has to know of a whole batch first, over all ranks."""
    if recipe.objective.preparing is None:
        return {}
    sums: dict[str, float] = {}
    for batch in micro:
        with recipe.autocast():
            terms = recipe.objective.prepare(recipe.parts, batch.to(recipe.device))
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + term.sum.item() / counts[term.unit]
    return distributed.sum_values(sums)


def with_shared(batch: Batch, shared: dict[str, float]) -> Batch:
    if not shared or batch.answers is None:
        return batch
    return replace(batch, answers=replace(batch.answers, shared=shared))


@torch.no_grad()
def measure(recipe: StepConfig, batches: list[Batch], counts: dict[str, float]) -> dict[str, float]:
    """The objective's terms over some batches, without gradients: each a sum over its unit's count. Nothing but sums is kept."""
    was_training = {name: part.training for name, part in recipe.parts.items()}
    for part in recipe.parts.values():
        part.eval()
    sums: dict[str, float] = {}
    units: dict[str, str] = {}
    shared: dict[str, float] = {}
    if recipe.objective.preparing is not None:  # every rank measures all batches itself
        for micro in batches:
            for name, term in recipe.objective.prepare(recipe.parts, micro.to(recipe.device)).items():
                shared[name] = shared.get(name, 0.0) + term.sum.item() / counts[term.unit]
    for micro in batches:
        with recipe.autocast():
            terms = recipe.objective(recipe.parts, with_shared(micro.to(recipe.device), shared))
        for name, term in terms.items():
            if not _absent(name, term, counts):
                sums[name] = sums.get(name, 0.0) + term.sum.item()
                units[name] = term.unit
    for name, part in recipe.parts.items():
        release(part)
        part.train(was_training[name])
    return {name: value / counts[units[name]] for name, value in sums.items()}


def _absent(name: str, term: Term, counts: dict[str, float]) -> bool:
    """Whether this is only measured, and of something that the whole batch has none of (desirable answers, perhaps)."""
    return name.startswith("_") and counts.get(term.unit) == 0


def _count(batch: GlobalBatch, unit: str) -> float:
    count = batch.counts.get(unit, 0.0)
    if count <= 0:
        raise DataError(f"a batch has no supervised {unit}", fix="check the loss mask of the data, or raise sequence_length")
    return count
