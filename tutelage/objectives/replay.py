"""Replay: the next-token loss on plain text, added to any objective (Ibrahim et al. 2024, arXiv:2403.08763)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from tutelage.models.interface import Batch
from tutelage.objectives import Objective, Term
from tutelage.objectives.next_token import next_token


def with_replay(objective: Objective) -> Objective:
    """The objective, which on batches of plain text (`Batch.replay`) is the term `replay`: nats of each token, divided by the
    tokens of such text alone."""

    def function(parts: dict[str, nn.Module], batch: Batch, **settings: Any) -> dict[str, Term]:
        if batch.replay:
            return {"replay": replace(next_token(parts, batch)["loss"], unit="replay_tokens")}
        return objective.function(parts, batch, **settings)

    def preparing(parts: dict[str, nn.Module], batch: Batch, **settings: Any) -> dict[str, Term]:
        return {} if batch.replay or objective.preparing is None else objective.preparing(parts, batch, **settings)

    return replace(objective, function=function, preparing=objective.preparing and preparing)
