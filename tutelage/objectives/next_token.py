"""Next-token cross-entropy: pretraining, domain adaptation and supervised fine-tuning."""

from __future__ import annotations

from torch import nn

from tutelage.models.interface import Batch
from tutelage.objectives import Term


def next_token(parts: dict[str, nn.Module], batch: Batch) -> dict[str, Term]:
    """Negative log-likelihood in nats of each supervised token, summed with the batch's weights.

    The head never stores the logits of a whole batch; positions of weight 0 are not computed at all.
    """
    policy = parts["policy"]
    hidden = policy(batch).hidden
    loss = policy.lm_head(hidden.flatten(0, 1), batch.targets.flatten(), batch.weights.flatten())  # type: ignore[operator]
    return {"loss": Term(loss, "tokens")}
