"""Proximal policy optimisation with a value head (Schulman et al. 2017, arXiv:1707.06347; for language models Stiennon et al.
2020, arXiv:2009.01325).

The part `value` scores every place; the value of the state before a token is the score at the place that predicts it. Streams
besides those of `policy_gradient`: `value_old`, that value when the answer was judged; `return`, what it should have been.
"""

from __future__ import annotations

import torch
from torch import nn

from tutelage.models.interface import Batch
from tutelage.objectives import Term
from tutelage.objectives.answers import answers_of
from tutelage.objectives.policy_gradient import Estimator, policy_gradient


def ppo(
    parts: dict[str, nn.Module], batch: Batch, *, clip_low: float = 0.2, clip_high: float = 0.2, delta: float | None = None,
    value_clip: float | None = 0.2, kl_weight: float = 0.0, kl: Estimator = "k3", kl_importance: bool = True,
    entropy_weight: float = 0.0, temperature: float = 1.0,
) -> dict[str, Term]:  # fmt: skip
    """The clipped policy loss over tokens, and as `value` half the squared error of the values: the larger of that of the value
    and of the value at most `value_clip` away from the old one."""
    answers = answers_of(batch)
    terms = policy_gradient(
        parts, batch, form="clip", level="token", unit="tokens", clip_low=clip_low, clip_high=clip_high, delta=delta,
        kl_weight=kl_weight, kl=kl, kl_importance=kl_importance, entropy_weight=entropy_weight, temperature=temperature,
    )  # fmt: skip
    values, weight = parts["value"](batch)[answers.positions, 0], answers.tokens["weight"]
    old, target = answers.tokens["value_old"], answers.tokens["return"]
    error, moved = (values - target).square(), values - old
    if value_clip is not None:
        near = (old + moved.clamp(-value_clip, value_clip) - target).square()
        terms["_value_clipped"] = Term(((moved.abs() > value_clip) * (near > error) * weight).sum(), "tokens")
        error = torch.maximum(error, near)
    terms["value"] = Term((error * weight).sum() / 2, "tokens")
    terms["_value"] = Term((values.detach() * weight).sum(), "tokens")
    return terms
