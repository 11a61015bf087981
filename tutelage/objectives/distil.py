"""Distillation: a student learns a teacher's next-token distributions (models/divergence.py has the formulas and papers).

The teacher is the frozen part "teacher", run over the same batch; or its top tokens, kept beforehand, are the streams `top_ids`
and `top_logprobs` [N,k]. Off-policy or on-policy is a question of whose texts the batch holds: given ones, or the student's own
answers (GKD, Agarwal et al. 2024, arXiv:2306.13649), through which no gradient passes, as there. `cross_entropy` is the share of
the next-token loss; on the student's own answers it has to stay 0, since those are nothing to imitate.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from tutelage.errors import ConfigError, Setting
from tutelage.models.divergence import Distillation, Teacher, TopTokens
from tutelage.models.interface import Batch
from tutelage.models.shard import release
from tutelage.objectives import Term

Rest = Literal["bucket", "renormalise"]


def forward_kl(
    parts: dict[str, nn.Module], batch: Batch, *, temperature: float = 1.0, cross_entropy: float = 0.0, rest: Rest = "bucket"
) -> dict[str, Term]:
    """KL(teacher || student)."""
    return distil(parts, batch, Distillation("forward", 0.5, temperature, cross_entropy, rest))


def reverse_kl(
    parts: dict[str, nn.Module], batch: Batch, *, temperature: float = 1.0, cross_entropy: float = 0.0, rest: Rest = "bucket"
) -> dict[str, Term]:
    """KL(student || teacher)."""
    return distil(parts, batch, Distillation("reverse", 0.5, temperature, cross_entropy, rest))


def jsd(
    parts: dict[str, nn.Module], batch: Batch, *, beta: float = 0.5, temperature: float = 1.0, cross_entropy: float = 0.0,
    rest: Rest = "bucket",
) -> dict[str, Term]:  # fmt: skip
    """Generalised Jensen-Shannon divergence, the teacher's share of whose mixture is `beta`. Raises `ConfigError` for 0 and 1,
    where it is 0 whatever the student does."""
    if not 0 < beta < 1:
        raise ConfigError(
            "the mixture needs both distributions", field="beta", found=beta, expected="between 0 and 1",
            fix=f"use {Setting('loss', 'forward')} or {Setting('loss', 'reverse')} for the ends",
        )  # fmt: skip
    return distil(parts, batch, Distillation("jsd", beta, temperature, cross_entropy, rest))


def distil(parts: dict[str, nn.Module], batch: Batch, how: Distillation) -> dict[str, Term]:
    """The mixture summed over supervised tokens, with its divergence and its cross-entropy beside it, in nats."""
    policy = parts["policy"]
    places, targets, weights = supervised(batch)
    hidden = policy(batch).hidden.flatten(0, 1)[places]
    known = _known(parts, batch, places)
    loss, distance, entropy = policy.lm_head.distil(hidden, targets, weights, known, how)  # type: ignore[operator, union-attr]
    if isinstance(known, Teacher):
        release(parts["teacher"])  # its pass has no backward one
    return {
        "loss": Term(loss, "tokens"),
        "_divergence": Term(distance, "tokens"),
        "_cross_entropy": Term(entropy, "tokens"),
    }


def supervised(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(places in the batch laid flat, targets, weights) [N] of what is learned: of the answers, where the batch has any."""
    if batch.answers is not None:
        places = batch.answers.positions
        return places, batch.answers.targets, torch.ones_like(places, dtype=torch.float32)
    places = batch.weights.flatten().nonzero().squeeze(1)
    return places, batch.targets.flatten()[places], batch.weights.flatten()[places]


def _known(parts: dict[str, nn.Module], batch: Batch, places: Tensor) -> Teacher | TopTokens:
    if batch.answers is not None and "top_ids" in batch.answers.tokens:
        return TopTokens(batch.answers.tokens["top_ids"].long(), batch.answers.tokens["top_logprobs"])
    teacher = parts["teacher"]
    with torch.no_grad():
        return Teacher(teacher.lm_head, teacher(batch).hidden.flatten(0, 1)[places])  # type: ignore[arg-type]


def check_vocabularies(student: int, teacher: int) -> None:
    """Raises `ConfigError` where distributions of the two are not over the same tokens."""
    if student != teacher:
        raise ConfigError(
            "teacher and student have different vocabularies", field="teacher", found=f"{teacher} tokens",
            expected=f"{student} tokens, the student's",
            fix="use a teacher with the student's tokenizer, or let it write texts and train on those with `sft`",
        )  # fmt: skip
