"""Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734): the reward is the log-probability of an answer's average
token, without a reference.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from tutelage.models.interface import Batch
from tutelage.objectives import Term
from tutelage.objectives.answers import answers_of, chosen_loss, pair_terms, paired, token_logprobs


def simpo(
    parts: dict[str, nn.Module], batch: Batch, *, beta: float = 2.0, gamma: float = 1.0, sft: float = 0.0
) -> dict[str, Term]:
    """-log sigmoid(beta * (mean log p(chosen) - mean log p(rejected)) - gamma).

    With `sft` it is CPO-SimPO: as much cross-entropy of the chosen answer's tokens beside it.
    """
    answers = answers_of(batch)
    logprobs = token_logprobs(parts["policy"], batch)
    chosen, rejected = paired(beta * answers.sums(logprobs) / answers.lengths)
    terms = pair_terms(-F.logsigmoid(chosen - rejected - gamma), chosen, rejected, name="preference")
    return terms | chosen_loss(logprobs, answers, sft)
