"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306): learns from answers that are marked good or bad, one
at a time.

A group has two completions: the answer that was judged, and the answer of another prompt, which is never learned. Over the global
batch the mean log-ratio of the latter, at least 0, is the reference point: an estimate of KL(policy || reference). It has no
gradient. TRL does the same over each device's micro-batch and averages over devices, so there accumulation changes the loss; and
its mismatched answers come from the same batch, while ours are fixed once for all data, so that their reference
log-probabilities are computed once too.

The mismatched answers are needed: those that were judged are what the policy is trained on, and say nothing of how far it is
from the reference elsewhere. Nor can one pass serve: every gradient depends on the reference point, which is known only when all
micro-batches have been read. So there are two passes, each of which reads its own answers with their prompts, and no other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tutelage.models.interface import Batch
from tutelage.objectives import Term
from tutelage.objectives.answers import answer_logprobs, answers_of, every


def reference_point(parts: dict[str, nn.Module], batch: Batch, **settings: Any) -> dict[str, Term]:
    """Log-ratios of the mismatched answers."""
    other = every(batch, 1, 2)
    ratio = answer_logprobs(parts["policy"], other) - answers_of(other).per_completion["reference"]
    return {"kl": Term(ratio.sum(), "answers")}


def kto(
    parts: dict[str, nn.Module],
    batch: Batch,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> dict[str, Term]:
    """weight * (1 - sigmoid(v)), v = beta * (log-ratio - reference point) of a desirable answer, and its negative of another one.

    Measured: rewards of both kinds, the reference point (`kl`, before beta), and how often a reward is on the right side of it.
    """
    own = every(batch, 0, 2)
    answers = answers_of(own)
    reward = beta * (answer_logprobs(parts["policy"], own) - answers.per_completion["reference"])
    point = max(answers.shared["kl"], 0.0)
    good = answers.per_completion["desirable"] > 0.5
    value = torch.where(good, reward - beta * point, beta * point - reward)
    weight = torch.where(good, desirable_weight, undesirable_weight)
    reward = reward.detach()
    return {
        "loss": Term((weight * torch.sigmoid(-value)).sum(), "answers"),
        "_accuracy": Term((value > 0).to(reward.dtype).sum(), "answers"),
        "_desirable": Term(reward[good].sum(), "desirable"),
        "_undesirable": Term(reward[~good].sum(), "undesirable"),
        "_kl": Term(reward.new_tensor(point * answers.count), "answers"),
    }
