"""Classification: of whole texts, and of their tokens.

The part `class` (or `token`) scores every place of a batch, [B*T,K]. A text's scores stand at its last token; which tokens its
model pools is the model's own affair.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from tutelage.models.interface import Batch
from tutelage.objectives import Term
from tutelage.objectives.answers import answers_of, own_places


def classify(parts: dict[str, nn.Module], batch: Batch, *, label_smoothing: float = 0.0) -> dict[str, Term]:
    """Cross-entropy in nats over the classes of each text, times the text's weight; smoothed as in Szegedy et al. 2015
    (arXiv:1512.00567). For texts with several labels (`per_completion["labels"]` [S,K], 1 or 0): binary cross-entropy, the mean
    over the classes; a text is right if all of its labels are."""
    answers = answers_of(batch)
    scores = parts["class"](batch)[answers.last_position]
    weights = answers.per_completion["weight"]
    if "labels" in answers.per_completion:
        wanted = answers.per_completion["labels"]
        soft = wanted * (1 - label_smoothing) + label_smoothing / 2
        loss = F.binary_cross_entropy_with_logits(scores, soft, reduction="none").mean(1)
        right = ((scores > 0) == (wanted > 0)).all(1)
    else:
        label = answers.per_completion["label"].long()
        loss = F.cross_entropy(scores, label, reduction="none", label_smoothing=label_smoothing)
        right = scores.argmax(1) == label
    return {"loss": Term((loss * weights).sum(), "examples"), "_accuracy": Term(right.float().sum(), "examples")}


def tag(parts: dict[str, nn.Module], batch: Batch, *, label_smoothing: float = 0.0) -> dict[str, Term]:
    """Cross-entropy in nats over the tags of each supervised token: the first piece of each word."""
    answers = answers_of(batch)
    scores = parts["token"](batch)[own_places(batch)]
    label = answers.tokens["label"].long()
    loss = F.cross_entropy(scores, label, reduction="none", label_smoothing=label_smoothing) * answers.tokens["weight"]
    right = scores.argmax(1) == label
    return {"loss": Term(loss.sum(), "tokens"), "_accuracy": Term(right.float().sum(), "tokens")}
