"""Preference losses that judge each of the two answers by itself, not only their difference: so a chosen answer can't become less
likely as long as the rejected one does so faster, which DPO allows. Pairs and rewards as in `preference`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tutelage.models.interface import Batch
from tutelage.objectives import Term
from tutelage.objectives.answers import pair_terms
from tutelage.objectives.preference import rewards


def nca_pair(parts: dict[str, nn.Module], batch: Batch, *, beta: float = 0.01) -> dict[str, Term]:
    """Noise contrastive alignment (Chen et al. 2024, arXiv:2402.05369) with one chosen and one rejected answer."""
    chosen, rejected = rewards(parts, batch, beta)
    loss = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    return pair_terms(loss, chosen, rejected)


def sppo_hard(parts: dict[str, nn.Module], batch: Batch, *, beta: float = 0.001) -> dict[str, Term]:
    """Self-play preference optimisation (Wu et al. 2024, arXiv:2405.00675, eq. 4.7) with a winner of probability 1: log-ratios
    are drawn to plus and minus 1 / (2 beta), beta being one over the paper's eta."""
    chosen, rejected = rewards(parts, batch, 1.0)
    loss = (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    return pair_terms(loss, beta * chosen, beta * rejected)


def apo_zero(parts: dict[str, nn.Module], batch: Batch, *, beta: float = 0.1) -> dict[str, Term]:
    """Anchored preference optimisation (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7), for chosen answers that are better
    than the model's own: up with the chosen, down with the rejected."""
    chosen, rejected = rewards(parts, batch, beta)
    return pair_terms(torch.sigmoid(-chosen) + torch.sigmoid(rejected), chosen, rejected)


def apo_down(parts: dict[str, nn.Module], batch: Batch, *, beta: float = 0.1) -> dict[str, Term]:
    """The same (eq. 8), for a model whose own answers are better than the chosen ones: down with both, more with the rejected."""
    chosen, rejected = rewards(parts, batch, beta)
    return pair_terms(torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen), chosen, rejected)
