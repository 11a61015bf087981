"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its family.

Answers come in pairs, the chosen one first. `margin` is beta times how much more the policy than the reference prefers the
chosen answer: beta * ((log p(c) - log q(c)) - (log p(r) - log q(r))).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from tutelage.models.interface import Batch
from tutelage.objectives import Term
from tutelage.objectives.answers import answer_logprobs, answers_of


def dpo(parts: dict[str, nn.Module], batch: Batch, *, beta: float = 0.1) -> dict[str, Term]:
    """-log sigmoid(margin), with the implicit rewards of both answers and how often the right one is larger."""
    answers = answers_of(batch)
    rewards = beta * (answer_logprobs(parts["policy"], batch) - answers.whole["reference"])
    chosen, rejected = rewards[0::2], rewards[1::2]
    loss = -F.logsigmoid(chosen - rejected)
    return {
        "loss": Term(loss.sum(), "pairs"),
        "_accuracy": Term((chosen > rejected).float().sum(), "pairs"),
        "_chosen": Term(chosen.detach().sum(), "pairs"),
        "_rejected": Term(rejected.detach().sum(), "pairs"),
    }
