"""Policy gradient with clipped importance ratios; what its settings and streams are makes it one method or another.

REINFORCE (Williams 1992), RLOO (Ahmadian et al. 2024, arXiv:2402.14740), GRPO (Shao et al. 2024, arXiv:2402.03300), Dr. GRPO
(Liu et al. 2025, arXiv:2503.20783), DAPO (Yu et al. 2025, arXiv:2503.14476), GSPO (Zheng et al. 2025, arXiv:2507.18071) and CISPO
(MiniMax 2025, arXiv:2506.13585). Streams of each token: `old`, its log-probability when it was made; `advantage`; `weight`, what
normalises (1/length, 1/longest, 1); and where there are such, `reference`, its log-probability under the model to stay close to,
and `correction`, the importance of a token that the engine made by other arithmetic than the trainer's.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from tutelage.models.interface import Answers, Batch
from tutelage.objectives import Term
from tutelage.objectives.answers import answers_of, token_scores

Form = Literal["clip", "cispo", "none"]
Level = Literal["token", "sequence", "answer"]
Estimator = Literal["k1", "k2", "k3"]


def policy_gradient(
    parts: dict[str, nn.Module], batch: Batch, *, form: Form = "clip", level: Level = "token", unit: str = "sequences",
    clip_low: float = 0.2, clip_high: float = 0.2, delta: float | None = None, kl_weight: float = 0.0, kl: Estimator = "k3",
    kl_importance: bool = True, entropy_weight: float = 0.0, temperature: float = 1.0,
) -> dict[str, Term]:  # fmt: skip
    """The surrogate loss, the penalty for leaving the reference (`kl`) and the bonus for entropy, weighted here.

    `form`: "clip", the worse of ratio and ratio within 1 - clip_low .. 1 + clip_high, each times the advantage; "cispo", the
    clipped ratio as a constant times the log-probability; "none", the log-probability alone.
    `level`: the ratio of a "token"; of a "sequence", the geometric mean over its tokens; of a whole "answer", the product.
    `delta`: the largest ratio where the advantage is negative (dual clip, Ye et al. 2020, arXiv:1912.09729).
    `kl_importance`: the penalty of a token counts by its ratio, so that its gradient is that of the divergence, whichever the
    estimator, off policy too (DeepSeek-AI 2025, arXiv:2512.02556, for k3). Without: as in GRPO's paper; right for k2 on policy,
    close for k3, and 0 on average for k1.
    `_moved`: how far log-probabilities are from when the answers were made, in nats; in an iteration's first step that is how far
    trainer and engine are apart.
    `temperature`: that the answers were sampled at; `old` and `reference` are of it too.
    """
    answers = answers_of(batch)
    logprobs, entropy = token_scores(parts["policy"], batch, temperature)
    advantage, weight = answers.tokens["advantage"], answers.tokens["weight"]
    ratio = _ratio(answers, logprobs, level)
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    if form == "clip":
        free = ratio if delta is None else ratio.clamp(max=delta)
        gain = torch.minimum(free * advantage, bounded * advantage)
    else:
        gain = advantage * logprobs if form == "none" else advantage * logprobs * bounded.detach()
    if "correction" in answers.tokens:
        gain = gain * answers.tokens["correction"]

    used = (weight != 0).float()
    terms = {
        "loss": Term(-(gain * weight).sum(), unit),
        "_ratio": _share(ratio, used),
        "_moved": _share((logprobs - answers.tokens["old"]).abs(), used),
        "_entropy": _share(entropy, used),
    }
    if form != "none":
        terms["_clipped_low"] = _share((ratio < 1 - clip_low) & (advantage < 0), used)
        terms["_clipped_high"] = _share((ratio > 1 + clip_high) & (advantage > 0), used)
    assert not kl_weight or "reference" in answers.tokens, "a penalty for leaving the reference needs its log-probabilities"
    if "reference" in answers.tokens:
        distance = kl_estimate(kl, logprobs, answers.tokens["reference"])
        terms["_kl"] = _share(distance, used)
        if kl_weight:
            if kl_importance:
                distance = distance * (ratio.detach() if kl == "k2" else ratio)
            terms["kl"] = Term(kl_weight * (distance * weight).sum(), unit)
    if entropy_weight:
        terms["entropy"] = Term(-entropy_weight * (entropy * used).sum(), "tokens")
    return terms


def kl_estimate(kind: Estimator, logprobs: Tensor, reference: Tensor) -> Tensor:
    """Of the divergence from the reference, from tokens of the policy (Schulman 2020, http://joschu.net/blog/kl-approx.html)."""
    beyond = logprobs - reference
    if kind == "k1":
        return beyond
    return beyond.square() / 2 if kind == "k2" else torch.expm1(-beyond) + beyond


def _ratio(answers: Answers, logprobs: Tensor, level: Level) -> Tensor:
    """[N]: how much likelier a token, or all of its answer, is now than when it was made."""
    change = logprobs - answers.tokens["old"]
    if level == "token":
        return change.exp()
    whole = answers.sums(change)
    if level == "sequence":
        whole = whole / answers.lengths.clamp(min=1)
    return whole.exp()[answers.completion_of]


def _share(values: Tensor, used: Tensor) -> Term:
    return Term((values.detach() * used).sum(), "tokens")
