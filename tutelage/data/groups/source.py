"""Batches of prompt groups from static data: preferences, ratings, examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from tutelage.config.base import flat
from tutelage.data.groups.groups import Layout, PromptGroup, bins, collate
from tutelage.data.tokens.loader import GlobalBatch, fingerprint
from tutelage.data.tokens.pack import shuffled
from tutelage.errors import ArtifactError, ConfigError
from tutelage.models.interface import Batch


class PromptGroups(Protocol):
    """Prompt groups by index. `sizes` gives their token counts, so that packing need not read them."""

    @property
    def digest(self) -> str: ...  # of all that an objective sees
    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> PromptGroup: ...
    def sizes(self, layout: Layout) -> np.ndarray: ...


class GroupSource:
    """`per_step` groups make a global batch, over all ranks and all accumulation; so many go through the model at a time that
    they have at most `micro_tokens` tokens (one alone may have more). Every epoch has its own order, a function of the seed.

    Example:
        source = GroupSource(prompt_groups, per_step=16, micro_tokens=4096, layout="tree", seed=0)
        batch = source.next(step=0)
    """

    def __init__(
        self, prompt_groups: PromptGroups, *, per_step: int, micro_tokens: int, layout: Layout, seed: int, rank: int = 0,
        world: int = 1, unit: str = "sequences",
    ) -> None:  # fmt: skip
        if not 0 < per_step <= len(prompt_groups) or per_step % world:
            raise ConfigError(
                "invalid batch size", field="batch", found=f"{per_step}, for {world} ranks",
                expected=f"a multiple of the ranks, at least 1 and at most {len(prompt_groups)}",
            )  # fmt: skip
        self.prompt_groups, self.per_step, self.micro_tokens, self.layout = prompt_groups, per_step, micro_tokens, layout
        self.seed, self.rank, self.world, self.unit = seed, rank, world, unit
        self._sizes = prompt_groups.sizes(layout)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def numbers(self, step: int) -> list[int]:
        """Indices of the prompt groups in the global batch of `step`."""
        first = step * self.per_step
        return [self._number(first + j) for j in range(self.per_step)]

    def _number(self, place: int) -> int:
        epoch, at = divmod(place, len(self.prompt_groups))
        if self._order[0] != epoch:
            self._order = (epoch, shuffled(len(self.prompt_groups), self.seed, epoch, 5))
        return int(self._order[1][at])

    def next(self, step: int) -> GlobalBatch:
        return self._batch(self.numbers(step))

    def largest(self) -> GlobalBatch:
        """The largest prompt groups as one batch, to measure the memory that is needed."""
        return self._batch(np.argsort(-self._sizes, kind="stable")[: self.per_step].tolist())

    def _batch(self, numbers: list[int]) -> GlobalBatch:
        prompt_groups = [self.prompt_groups[i] for i in numbers]
        groups = bins([int(self._sizes[i]) for i in numbers], self.micro_tokens, self.world)[self.rank]
        counts = count(prompt_groups, self.layout) | {self.unit: float(len(prompt_groups))}
        return group_batch([[prompt_groups[i] for i in group] for group in groups], counts, self.layout)

    def validation(self) -> tuple[list[Batch], dict[str, float]]:
        """Every prompt group once, in the order of the data, with the counts of all of them."""
        numbers = list(range(len(self.prompt_groups)))
        groups = bins(self._sizes.tolist(), self.micro_tokens)[0]
        prompt_groups = [self.prompt_groups[i] for i in numbers]
        counts = count(prompt_groups, self.layout) | {self.unit: float(len(prompt_groups))}
        return [collate([prompt_groups[i] for i in group], self.layout) for group in groups], counts

    def identity(self) -> dict[str, Any]:
        return {"data": self.prompt_groups.digest, "seed": self.seed, "per_step": self.per_step}

    def state_dict(self) -> dict[str, Any]:
        return self.identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises `ArtifactError` naming what differs from the checkpointed run."""
        ours, theirs = flat(self.identity()), flat(state)
        different = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if different:
            raise ArtifactError(
                "the checkpoint was made with other data or another data order", field=", ".join(different),
                found=str({k: ours.get(k) for k in different}), expected=str({k: theirs.get(k) for k in different}),
                fix="resume with the data and settings of the checkpoint, or start a new run from its model",
            )  # fmt: skip

    def on_weights(self, version: int) -> None:
        """Does nothing: static data does not depend on the weights."""

    def describe(self) -> list[str]:
        n, size = len(self.prompt_groups), int(self._sizes.sum())
        return [f"{n:,} {self.unit}, {size:,} tokens read an epoch ({self.layout}), {self.per_step} a step, seed {self.seed}  "
                f"[{fingerprint(self.identity())}]"]  # fmt: skip


def count(prompt_groups: list[PromptGroup], layout: Layout) -> dict[str, float]:
    """The units that every batch of groups has: `chosen_tokens` are the supervised tokens of each group's first completion,
    `chosen_text_tokens` these and its prompt's but the first. Ratings, judged steps and judged answers are counted where there
    are such streams; NaN is no rating."""
    completions = [e for f in prompt_groups for e in f.completions]
    chosen = float(sum(f.completions[0].supervised for f in prompt_groups))
    out = {
        "tokens": float(sum(e.supervised for e in completions)),
        "chosen_tokens": chosen,
        "chosen_text_tokens": chosen + sum(len(f.prompt) - 1 for f in prompt_groups),
        "sequences": float(len(completions)),
        "processed": float(sum(f.size(layout) for f in prompt_groups)),
    }
    if "ratings" in completions[0].per_completion:
        out["ratings"] = float(sum(np.isfinite(e.per_completion["ratings"]).sum() for e in completions))
    if "step_score" in completions[0].tokens:
        scores = [e.tokens["step_score"] if e.mask is None else e.tokens["step_score"][e.mask > 0] for e in completions]
        out["steps"] = float(sum(np.isfinite(s).sum() for s in scores))
    if "desirable" in completions[0].per_completion:  # of the first completion: the second answers another prompt
        out["desirable"] = float(sum(f.completions[0].per_completion["desirable"] > 0.5 for f in prompt_groups))
        out["undesirable"] = len(prompt_groups) - out["desirable"]
    return out


def group_batch(groups: list[list[PromptGroup]], counts: dict[str, float], layout: Layout) -> GlobalBatch:
    """A global batch of this rank's micro-batches."""
    apart: Callable[[int], list[Batch]] = lambda i: [collate([f], layout) for f in groups[i]]  # noqa: E731
    names = [tuple(f.name for f in group) for group in groups]
    return GlobalBatch([collate(group, layout) for group in groups], counts, names, apart)
