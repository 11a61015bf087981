"""Rollouts for tests."""

from __future__ import annotations

from typing import Any

from tutelage.config.rewards import terms_of
from tutelage.records import Rollout
from tutelage.rewards.build import build
from tutelage.rewards.rubric import Rubric


def rollout(text: str, answer: str | None = None, number: int = 0, **meta: Any) -> Rollout:
    ids = tuple(range(len(text.split())))
    return Rollout(
        id=f"0/abc/{number}", prompt="abc", step=0, sample=number, version=0, prompt_ids=(7, 8), ids=ids, mask=(1,) * len(ids),
        logprobs=(0.0,) * len(ids), text=text, finish_reason="stop", answer=answer, meta=meta,
    )  # fmt: skip


def rubric(rewards: dict[str, Any], **wired: Any) -> Rubric:
    """As a stage makes it of a recipe's `rewards`."""
    return build(terms_of(rewards), **wired)
