"""Contrastive preference optimisation (Xu et al. 2024, arXiv:2401.08417): DPO with a uniform reference, held near good answers by
fine-tuning on the chosen ones.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from tutelage.models.interface import Batch
from tutelage.objectives import Term
from tutelage.objectives.answers import answers_of, chosen_loss, pair_terms, paired, token_logprobs


def cpo(parts: dict[str, nn.Module], batch: Batch, *, beta: float = 0.1, sft: float = 1.0) -> dict[str, Term]:
    """-log sigmoid(beta * (log p(chosen) - log p(rejected))) + sft * cross-entropy of the chosen answer.

    The paper writes the latter for whole answers; its authors' code, TRL and we average over tokens.
    """
    answers = answers_of(batch)
    logprobs = token_logprobs(parts["policy"], batch)
    chosen, rejected = paired(beta * answers.sums(logprobs))
    terms = pair_terms(-F.logsigmoid(chosen - rejected), chosen, rejected, name="preference")
    return terms | chosen_loss(logprobs, answers, sft)
