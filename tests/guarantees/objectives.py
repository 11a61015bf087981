"""Every objective of the table on a tiny model: its parts and a batch, for the promises that are made for all of them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.guarantees import tiny
from tests.objectives.rollouts import Value
from tests.objectives.rollouts import policy as small_policy
from tests.objectives.rollouts import prompt_groups as rollouts
from tests.objectives.test_reward import OUTPUTS
from tests.objectives.test_reward import prompt_groups as ratings
from tutelage.config.adapter import Adapter
from tutelage.data.groups.groups import Completion, PromptGroup
from tutelage.data.groups.source import count, group_batch
from tutelage.data.tokens.loader import GlobalBatch
from tutelage.models.adapters.attach import attach_adapter, attach_to_scorer
from tutelage.models.config import DecoderConfig
from tutelage.models.init import build
from tutelage.models.scorer import build_scorer
from tutelage.objectives import TABLE


def dressed(part: Any, adapter: Adapter | None) -> Any:
    if adapter is None:
        return part
    return attach_to_scorer(part, adapter, 0) if part.heads else attach_adapter(part, adapter, 0)


def pairs() -> list[PromptGroup]:
    """Two answers a prompt, chosen and rejected, with log-probabilities that a reference might give."""

    def completion(ids: np.ndarray, good: bool) -> Completion:
        return Completion(ids, None, {}, {"reference": -4.1 * len(ids) - good, "desirable": float(good)})

    return [
        PromptGroup(f.name, f.prompt, tuple(completion(e.ids, i == 0) for i, e in enumerate(f.completions))) for f in rollouts()
    ]


def of_groups(made: list[PromptGroup], layout: Any) -> GlobalBatch:
    cut = max(1, len(made) // 3)  # shares of unequal size: a mean of their means is another number
    halves = [made[:cut], made[cut:]]
    unit = {name: float(len(made)) for name in ("pairs", "examples", "desirable", "undesirable")}
    unit["answers"] = 2.0 * len(made)
    return group_batch(halves, count(made, layout) | unit, layout)


def case(name: str, adapter: Adapter | None = None, layout: Any = "packed") -> tuple[dict[str, Any], GlobalBatch]:
    """The parts of an objective, with the adapter on the one that is trained by it where there is one, and a batch of two
    micro-batches."""
    row = TABLE[name]
    parts: dict[str, Any]
    if row.data == "rows":
        parts = {"policy": dressed(tiny.model(), adapter)}
        teacher = {} if name == "next_token" else {"teacher": tiny.model(1).requires_grad_(False)}
        return parts | teacher, tiny.source("conversations").next(0)
    if row.data == "rollouts":
        parts = {"policy": dressed(small_policy(), adapter)}
        return parts | ({"value": Value()} if name == "ppo" else {}), of_groups(rollouts("length"), layout)
    if row.data == "examples":
        return classified(name, adapter, layout)
    if name in OUTPUTS:
        from tests.data.test_family_batches import SHAPE

        scorer = build_scorer(build(DecoderConfig.from_hf({**SHAPE, "initializer_range": 0.3}), 0), OUTPUTS[name], seed=1)
        return {"reward": dressed(scorer, adapter)}, of_groups(ratings(), layout)
    return {"policy": dressed(small_policy(), adapter)}, of_groups(pairs(), layout)


def classified(name: str, adapter: Adapter | None, layout: Any) -> tuple[dict[str, Any], GlobalBatch]:
    """An encoder and a batch of texts."""
    pytest.importorskip("transformers")
    from tests.objectives.test_classify import part_of, write_words
    from tests.objectives.test_classify import prompt_groups as texts
    from tutelage.tokenizer.load import TokenizerFolder

    with tempfile.TemporaryDirectory() as folder:
        found = texts(TokenizerFolder.open(write_words(Path(folder))), "tag" if name == "tag" else "class")
    part = dressed(part_of(found), adapter)
    made = [found[i] for i in range(len(found))]
    return {"token" if name == "tag" else "class": part}, of_groups(made, layout)
