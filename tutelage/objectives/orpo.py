"""Odds ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691): fine-tuning on the chosen answer and a preference for
it in one loss, without a reference.

Probabilities are those of an answer's average token (geometric mean), so that odds mean something for long answers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.models.interface import Batch
from tutelage.objectives import Term
from tutelage.objectives.answers import answers_of, chosen_loss, pair_terms, paired

CERTAIN = -1e-6  # of a larger log-probability the odds are not computed: they have no bound, nor has their gradient


def log_odds(logprobs: Tensor) -> Tensor:
    """log(p / (1 - p))."""
    below = logprobs.clamp(max=CERTAIN)
    return below - torch.log(-torch.expm1(below))


def orpo(parts: dict[str, nn.Module], batch: Batch, *, beta: float = 0.1, prompts: bool = False) -> dict[str, Term]:
    """Cross-entropy of the chosen answer's tokens, and beta * -log sigmoid(log odds ratio), beta being the paper's lambda.

    With `prompts`, cross-entropy is of prompts too, as in the authors' code and in TRL; the paper's formula has answers only.
    """
    policy, answers = parts["policy"], answers_of(batch)
    hidden = policy(batch).hidden.flatten(0, 1)
    logprobs = policy.lm_head.logprobs(hidden[answers.positions], answers.targets)  # type: ignore[operator, union-attr]
    chosen, rejected = paired(answers.sums(logprobs) / answers.lengths)
    loss = -beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))
    terms = pair_terms(loss, beta * chosen, beta * rejected, name="odds") | chosen_loss(logprobs, answers)
    if prompts:
        read = policy.lm_head(hidden, batch.targets.flatten(), batch.weights.flatten())  # type: ignore[operator]
        terms["sft"] = Term(terms["sft"].sum + read, "chosen_text_tokens")
    return terms
