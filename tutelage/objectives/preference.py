"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and the losses that are functions of the same margin.

Answers come in pairs, the chosen one first. An answer's implicit reward is beta * (log p(y|x) - log q(y|x)), p the policy, q the
reference; the margin is the chosen reward minus the rejected one. Measured are the rewards that a loss compares.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.errors import ConfigError
from tutelage.models.interface import Batch
from tutelage.objectives import Term
from tutelage.objectives.answers import answer_logprobs, answers_of, pair_terms, paired


def rewards(parts: dict[str, nn.Module], batch: Batch, beta: float, average: bool = False) -> tuple[Tensor, Tensor]:
    """Implicit rewards [P] of the chosen and the rejected answers; with `average`, of their average token."""
    answers = answers_of(batch)
    ratio = answer_logprobs(parts["policy"], batch) - answers.per_completion["reference"]
    return paired(beta * (ratio / answers.lengths if average else ratio))


def dpo(parts: dict[str, nn.Module], batch: Batch, *, beta: float = 0.1, offset: float = 0.0) -> dict[str, Term]:
    """-log sigmoid(margin - offset * m), m the preference's own margin (ODPO, Amini et al. 2024, arXiv:2402.10571, whose alpha
    is `offset`). Raises `ConfigError` for an offset where preferences have no margins."""
    chosen, rejected = rewards(parts, batch, beta)
    margin = chosen - rejected
    if offset:
        known = answers_of(batch).per_completion
        if "margin" not in known:
            raise ConfigError(
                "`offset` needs preferences with margins", field="offset", found=offset,
                expected="0, or a `margin` in every preference",
            )  # fmt: skip
        margin = margin - offset * known["margin"][0::2]
    return pair_terms(-F.logsigmoid(margin), chosen, rejected)


def cdpo(parts: dict[str, nn.Module], batch: Batch, *, beta: float = 0.1, label_smoothing: float = 0.1) -> dict[str, Term]:
    """Conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences"): cross-entropy against the belief that a share
    `label_smoothing` of the preferences is the wrong way round."""
    chosen, rejected = rewards(parts, batch, beta)
    wrong = _share(label_smoothing)
    loss = -(1 - wrong) * F.logsigmoid(chosen - rejected) - wrong * F.logsigmoid(rejected - chosen)
    return pair_terms(loss, chosen, rejected)


def robust(parts: dict[str, nn.Module], batch: Batch, *, beta: float = 0.1, label_smoothing: float = 0.1) -> dict[str, Term]:
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409): what the loss would be, on average, without the share
    `label_smoothing` of wrong preferences. Unlike cDPO's, it may be negative."""
    chosen, rejected = rewards(parts, batch, beta)
    wrong = _share(label_smoothing)
    loss = -(1 - wrong) * F.logsigmoid(chosen - rejected) + wrong * F.logsigmoid(rejected - chosen)
    return pair_terms(loss / (1 - 2 * wrong), chosen, rejected)


def dpo_norm(parts: dict[str, nn.Module], batch: Batch, *, beta: float = 5.0) -> dict[str, Term]:
    """Length-normalised DPO (Lambert et al. 2024, Tulu 3, arXiv:2411.15124): rewards of the average token. Beta is 5 there."""
    chosen, rejected = rewards(parts, batch, beta, average=True)
    return pair_terms(-F.logsigmoid(chosen - rejected), chosen, rejected)


def ipo(parts: dict[str, nn.Module], batch: Batch, *, beta: float = 0.1, average: bool = True) -> dict[str, Term]:
    """Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036, eq. 17): the margin of log-ratios is drawn to
    1 / (2 beta), beta being the paper's tau. The paper writes sums over tokens (`average=False`); its authors' results, and
    TRL, have averages, without which the same beta asks less of each token the longer the answers are."""
    chosen, rejected = rewards(parts, batch, 1.0, average)
    loss = (chosen - rejected - 1 / (2 * beta)) ** 2
    return pair_terms(loss, beta * chosen, beta * rejected)


def hinge(parts: dict[str, nn.Module], batch: Batch, *, beta: float = 0.1) -> dict[str, Term]:
    """max(0, 1 - margin): SLiC's loss (Zhao et al. 2023, arXiv:2305.10425) on implicit rewards, as RSO has it (Liu et al. 2023,
    arXiv:2309.06657)."""
    chosen, rejected = rewards(parts, batch, beta)
    return pair_terms(F.relu(1 - (chosen - rejected)), chosen, rejected)


def exo_pair(parts: dict[str, nn.Module], batch: Batch, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> dict[str, Term]:
    """Exact optimisation (Ji et al. 2024, arXiv:2402.00856, eq. 16): the reverse KL divergence of the policy's choice between
    two answers from the people's, who are wrong in a share `label_smoothing`, above 0."""
    chosen, rejected = rewards(parts, batch, beta)
    wrong = _share(label_smoothing, zero=False)
    right_logs, wrong_logs = F.logsigmoid(chosen - rejected), F.logsigmoid(rejected - chosen)
    loss = right_logs.exp() * (right_logs - math.log1p(-wrong)) + wrong_logs.exp() * (wrong_logs - math.log(wrong))
    return pair_terms(loss, chosen, rejected)


def discopop(parts: dict[str, nn.Module], batch: Batch, *, beta: float = 0.05, tau: float = 0.05) -> dict[str, Term]:
    """The log-ratio modulated loss that a search discovered (Lu et al. 2024, arXiv:2406.08414, eq. 5): logistic where the margin
    is negative, exponential where it is positive, blended within about `tau`. It isn't convex: with the paper's settings it has a
    minimum where the chosen answer's log-ratio is 2.4 less than the rejected one's, and pairs that begin at 0 go there first."""
    chosen, rejected = rewards(parts, batch, beta)
    margin = chosen - rejected
    blend = torch.sigmoid(margin / tau)
    return pair_terms(-F.logsigmoid(margin) * (1 - blend) + torch.exp(-margin) * blend, chosen, rejected)


def _share(label_smoothing: float, zero: bool = True) -> float:
    if not 0.0 <= label_smoothing < 0.5 or not (zero or label_smoothing):
        raise ConfigError(
            "label_smoothing is out of range", field="label_smoothing", found=label_smoothing,
            expected=f"{'at least' if zero else 'more than'} 0 and less than 0.5",
        )  # fmt: skip
    return label_smoothing
