"""Reward models: scores of whole answers from preferences or ratings, and of each step of an answer.

The part `reward` is a `Scorer`; an answer's scores are those at its last token.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.models.interface import Batch
from tutelage.objectives import Term
from tutelage.objectives.answers import answers_of, own_places


def reward(parts: dict[str, nn.Module], batch: Batch, *, centring: float = 0.01) -> dict[str, Term]:
    """Bradley-Terry: -log sigmoid(r(chosen) - r(rejected) - margin), over pairs (Ouyang et al. 2022, arXiv:2203.02155). The
    margin is `per_completion["margin"]`, if the data says by how much a completion is better (Touvron et al. 2023,
    arXiv:2307.09288).

    Only differences are learned from, so rewards may drift: `centring` times (r(chosen) + r(rejected))^2 keeps them around 0
    (Eisenstein et al. 2023, arXiv:2312.09244; 0.01 there, too).
    """
    answers = answers_of(batch)
    scores = parts["reward"](batch)[answers.last_position]
    assert scores.shape[1] == 1, f"a preference compares one number, not {scores.shape[1]}"
    chosen, rejected = scores[0::2, 0], scores[1::2, 0]
    margin = answers.per_completion["margin"][0::2] if "margin" in answers.per_completion else 0.0
    terms = {"loss": Term(-F.logsigmoid(chosen - rejected - margin).sum(), "pairs")}
    if centring:
        terms["centring"] = Term(centring * (chosen + rejected).square().sum(), "pairs")
    return terms | {
        "_accuracy": Term((chosen > rejected).float().sum(), "pairs"),
        "_margin": Term((chosen - rejected).detach().sum(), "pairs"),
        "_reward": Term(scores.detach().sum(), "sequences"),
    }


def rating(
    parts: dict[str, nn.Module], batch: Batch, *, loss: Literal["mse", "huber"] = "mse", delta: float = 1.0
) -> dict[str, Term]:
    """Regression on `per_completion["ratings"]` [S,K]; NaN, an aspect that was not rated, is ignored (Wang et al. 2023,
    arXiv:2311.09528). `huber`: half the square up to `delta`, linear beyond, so that outliers pull less; `mse`: the square."""
    answers = answers_of(batch)
    wanted = answers.per_completion["ratings"]
    scores = parts["reward"](batch)[answers.last_position]
    given = ~wanted.isnan()
    got, target = scores[given], wanted[given].to(scores.dtype)
    each = F.huber_loss(got, target, reduction="none", delta=delta) if loss == "huber" else (got - target).square()
    return {
        "loss": Term(each.sum(), "ratings"),
        "_error": Term((got - target).detach().abs().sum(), "ratings"),
    }


def process(parts: dict[str, nn.Module], batch: Batch) -> dict[str, Term]:
    """Whether each step of an answer is right, judged at the step's last token (Lightman et al. 2023, arXiv:2305.20050).

    `tokens["step_score"]` is the share of right there (1, 0 or between), NaN elsewhere. A part with two outputs learns by
    cross-entropy of wrong and right, one with one output by binary cross-entropy: the log-odds of right.
    """
    answers = answers_of(batch)
    wanted = answers.tokens["step_score"]
    ends = ~wanted.isnan()
    odds = log_odds(parts["reward"](batch)[own_places(batch)[ends]])
    target = wanted[ends].to(odds.dtype)
    loss = F.binary_cross_entropy_with_logits(odds, target, reduction="none")
    return {
        "loss": Term(loss.sum(), "steps"),
        "_accuracy": Term(((odds > 0) == (target > 0.5)).float().sum(), "steps"),
        "_right": Term(torch.sigmoid(odds.detach()).sum(), "steps"),
    }


def log_odds(scores: Tensor) -> Tensor:
    """[..,1] or [..,2] (wrong, right) -> [..]: the log-odds of right. A softmax over two is a sigmoid of their difference."""
    assert scores.shape[-1] in (1, 2), f"a step is right or wrong, not one of {scores.shape[-1]}"
    return scores[..., 0] if scores.shape[-1] == 1 else scores[..., 1] - scores[..., 0]
