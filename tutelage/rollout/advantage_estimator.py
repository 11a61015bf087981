"""Turns rewards into advantages, and scored rollouts into the prompt groups that a policy is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from tutelage.data.groups.groups import Completion, PromptGroup
from tutelage.records import Rollout
from tutelage.rollout.advantages import Estimator, divergence, gae, group_advantages, token_rewards
from tutelage.rollout.correction import Level, Mode, correction, mismatch
from tutelage.rollout.metric_sums import MetricSums
from tutelage.rollout.weights import ADVANTAGE_SPECS, Truncated, cut, weights
from tutelage.train import distributed

Floats = npt.NDArray[np.float32]
ByToken = Callable[[Sequence[PromptGroup]], list[list[Floats]]]  # a number for each token of each completion
Groups = list[list[Rollout]]
Rewards = npt.NDArray[np.float64]  # [S], answer after answer
Streams = list[list[Floats]]  # of each prompt group, of each completion: [n]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How rewards become advantages."""

    method: str  # a row of the table about rollouts
    max_tokens: int
    truncated: Truncated = "keep"
    penalty: float = 1.0  # of truncated="penalise"
    kl_in_reward: float = 0.0  # times the divergence from the reference, taken off the reward
    kl_estimator: Estimator = "k1"  # of that
    gamma: float = 1.0  # ppo
    lam: float = 0.95
    correction: Mode | Literal["none"] = "none"
    correction_level: Level = "token"
    correction_cap: float = 2.0


@dataclass(frozen=True, slots=True)
class AdvantageEstimator:
    """Groups of scored rollouts -> the same with advantages, their prompt groups, and metrics.

    `old`: log-probabilities by the trainer's own arithmetic; without it those of the engine are the old ones. `reference`: those
    of the model to stay close to. `values`: of the states before each token, for PPO.
    """

    settings: Settings
    old: ByToken | None = None
    reference: ByToken | None = None
    values: ByToken | None = None
    comparable: bool = True  # whether trainer and engine use the same temperature

    def __call__(self, groups: Groups) -> tuple[Groups, list[PromptGroup], MetricSums]:
        bare = [group_of(group) for group in groups]
        engine = [[np.array(r.logprobs, np.float32) for r in group] for group in groups]
        old = engine if self.old is None else self.old(bare)
        reference = None if self.reference is None else self.reference(bare)
        measured = MetricSums()
        if self.old is not None and self.comparable:
            measured += mismatch(_flat(bare, old), _flat(bare, engine))
        if reference is not None:
            measured += _kl(bare, old, reference)
        found = cut(
            self.settings.truncated, _rewards(groups), [r.finish_reason for g in groups for r in g], self.settings.penalty
        )
        streams = (
            self._by_gae(bare, found.rewards, old, reference)
            if self.values
            else self._by_group(bare, found.rewards, old, reference)
        )
        kept = iter(found.kept.tolist())
        out, prompt_groups = [], []
        for i, (group, prompt_group) in enumerate(zip(groups, bare, strict=True)):
            rows, completions = [], []
            for k, (rollout, completion) in enumerate(zip(group, prompt_group.completions, strict=True)):
                own = {name: values[i][k].astype(np.float32) for name, values in streams.items()}
                own["old"] = old[i][k]
                if reference is not None:
                    own["reference"] = reference[i][k]
                if self.old is not None and self.settings.correction != "none":
                    own["correction"] = self._correction(old[i][k], engine[i][k])
                picked = _picked(completion)
                used = next(kept)
                row = replace(rollout, advantage=float(own["advantage"][picked].mean()) if picked.any() else 0.0)
                rows.append(row if used else replace(row, used=False, meta={**row.meta, "left_out": "cut at max_tokens"}))
                mask = completion.mask if used else np.zeros(len(completion.ids), np.uint8)
                completions.append(replace(completion, mask=mask, tokens=own))
            out.append(rows)
            prompt_groups.append(replace(prompt_group, completions=tuple(completions)))
        return out, prompt_groups, measured

    def _by_group(
        self,
        prompt_groups: list[PromptGroup],
        rewards: npt.NDArray[np.float64],
        old: list[list[Floats]],
        reference: list[list[Floats]] | None,
    ) -> dict[str, Streams]:
        """One advantage for all tokens of an answer, from the others to its prompt."""
        how = ADVANTAGE_SPECS[self.settings.method]
        if reference is not None and self.settings.kl_in_reward:
            kind = self.settings.kl_estimator
            far = [float(divergence(o, q, kind)[_picked(e)].sum()) for f, a, b in zip(prompt_groups, old, reference, strict=True)
                   for e, o, q in zip(f.completions, a, b, strict=True)]  # fmt: skip
            rewards = rewards - self.settings.kl_in_reward * np.array(far)
        numbers = np.repeat(np.arange(len(prompt_groups)), [len(f.completions) for f in prompt_groups])
        values = iter(group_advantages(rewards, numbers, how.baseline, how.scale).values.tolist())
        lengths = [e.supervised for f in prompt_groups for e in f.completions]
        each = iter(weights(how.normaliser, lengths, self.settings.max_tokens).tolist())
        return {
            "advantage": [[np.full(len(e.ids), next(values), np.float32) for e in f.completions] for f in prompt_groups],
            "weight": [[np.full(len(e.ids), next(each), np.float32) for e in f.completions] for f in prompt_groups],
        }

    def _by_gae(
        self,
        prompt_groups: list[PromptGroup],
        rewards: npt.NDArray[np.float64],
        old: list[list[Floats]],
        reference: list[list[Floats]] | None,
    ) -> dict[str, Streams]:
        """An advantage for each token, whitened over the batch, from the values of the states before."""
        assert self.values is not None
        values, own = self.values(prompt_groups), iter(rewards.tolist())
        out: dict[str, Streams] = {name: [] for name in ("advantage", "return", "value_old", "weight")}
        for i, prompt_group in enumerate(prompt_groups):
            for stream in out.values():
                stream.append([])
            for k, completion in enumerate(prompt_group.completions):
                at = _picked(completion)
                far = None if reference is None else reference[i][k][at]
                s = self.settings
                given = token_rewards(next(own), old[i][k][at], far, s.kl_in_reward, s.kl_estimator)
                advantages, returns = gae(given, values[i][k][at], gamma=self.settings.gamma, lam=self.settings.lam)
                for name, found in (("advantage", advantages), ("return", returns), ("weight", np.ones(int(at.sum())))):
                    row = np.zeros(len(completion.ids), np.float32)
                    row[at] = found
                    out[name][i].append(row)
                out["value_old"][i].append(values[i][k])
        flat = np.concatenate([row for rows in out["advantage"] for row in rows])
        used = np.concatenate([row for rows in out["weight"] for row in rows])
        white, start = _whitened(flat, used).astype(np.float32), 0
        for rows in out["advantage"]:
            for row in rows:
                row[:] = white[start : start + len(row)]
                start += len(row)
        return out

    def _correction(self, trainer: Floats, engine: Floats) -> Floats:
        s = self.settings
        assert s.correction != "none"
        return correction(trainer, engine, mode=s.correction, level=s.correction_level, cap=s.correction_cap).astype(np.float32)


def group_of(group: Sequence[Rollout]) -> PromptGroup:
    """The answers to one prompt as a group without per-token values."""
    completions = tuple(Completion(np.array(r.ids, np.int64), np.array(r.mask, np.uint8)) for r in group)
    return PromptGroup(group[0].prompt, np.array(group[0].prompt_ids, np.int64), completions)


def _whitened(values: Floats, weights: Floats) -> Rewards:
    """Mean 0 and standard deviation 1 over the tokens of all ranks."""
    x, used = values.astype(np.float64), weights != 0
    sums = distributed.sum_values({"count": float(used.sum()), "sum": float(x[used].sum())})
    mean = sums["sum"] / max(1.0, sums["count"])
    squares = distributed.sum_values({"squares": float(((x[used] - mean) ** 2).sum())})["squares"]
    deviation = (squares / max(1.0, sums["count"] - 1)) ** 0.5
    return np.where(used, (x - mean) / (deviation + 1e-8), 0.0)


def _rewards(groups: Groups) -> Rewards:
    return np.array([np.nan if r.reward is None else r.reward for group in groups for r in group], np.float64)


def _picked(completion: Completion) -> npt.NDArray[np.bool_]:
    return np.ones(len(completion.ids), bool) if completion.mask is None else completion.mask > 0


def _flat(prompt_groups: list[PromptGroup], values: Streams) -> list[Floats]:
    return [
        row[_picked(e)] for f, rows in zip(prompt_groups, values, strict=True) for e, row in zip(f.completions, rows, strict=True)
    ]


def _kl(prompt_groups: list[PromptGroup], old: Streams, reference: Streams) -> MetricSums:
    """Nats a token that the policy is away from the reference: k3, never negative."""
    far = np.concatenate(_flat(prompt_groups, old)).astype(np.float64) - np.concatenate(_flat(prompt_groups, reference))
    return MetricSums({"kl": (float((np.expm1(-far) + far).sum()), float(len(far)))})
