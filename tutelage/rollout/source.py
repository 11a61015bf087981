"""Batches of rollouts: generate answers to prompts, score them, and compute the advantage of every token.

An iteration is one batch of prompts, answered by the current weights. Its answers are trained on `updates` times, in
`minibatches` steps each time, so the weights that generated an answer are at most updates * minibatches - 1 steps old.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tutelage import log
from tutelage.data.groups.groups import Completion, Layout, PromptGroup, bins
from tutelage.data.groups.source import count, group_batch
from tutelage.data.tokens.loader import GlobalBatch
from tutelage.data.tokens.pack import shuffled
from tutelage.errors import ArtifactError, ConfigError
from tutelage.files import read_json, whole_file, write_json
from tutelage.records import Prompt, Rollout, dump_line, read_records
from tutelage.rollout.metric_sums import MetricSums
from tutelage.rollout.scores import pieces
from tutelage.train import distributed

Groups = list[list[Rollout]]  # answers to one prompt together
RETAINED = 4  # checkpoints within iterations whose rollouts stay on disk


class Answering(Protocol):
    """Prompts -> rollouts: `Sampler`, or episodes of several turns."""

    def answer(
        self, prompts: Sequence[Prompt], samples: int, *, seed: int, step: int, version: int, greedy: bool = False
    ) -> Groups: ...


class Judging(Protocol):
    """A reward for each rollout, with its parts: `Rubric`."""

    def judge(self, rollouts: Sequence[Rollout]) -> Sequence[Any]: ...  # reward, terms, notes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How rollouts are made and used."""

    prompts: int  # of an iteration, over all ranks
    samples: int  # answers to each
    max_tokens: int  # of an answer
    updates: int = 1  # times that each answer is trained on
    minibatches: int = 1  # steps of one time
    zero_variance: str = "keep"  # groups whose answers all have the same reward: keep | skip | resample
    tries: int = 4  # iterations' worth of prompts that resampling asks at most
    micro_tokens: int = 4096
    layout: Layout = "tree"
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of an iteration."""
        return self.updates * self.minibatches

    def __post_init__(self) -> None:
        if self.minibatches > self.prompts:
            raise ConfigError(
                "more minibatches than prompts", field="minibatches", found=self.minibatches, expected=f"at most {self.prompts}"
            )
        if self.prompts < distributed.world():
            raise ConfigError(
                "fewer prompts in an iteration than ranks", found=f"{self.prompts} for {distributed.world()} ranks",
                fix="raise batch (of `rl`) or rollouts.prompts (of `distil`), or start fewer ranks",
            )  # fmt: skip


AdvantageFunction = Callable[[Groups], tuple[Groups, list[PromptGroup], MetricSums]]
"""Scored rollouts -> the rollouts with their advantages, a prompt group for each group of rollouts, and metrics."""


@dataclass(slots=True)
class RolloutSource:
    """The batch source of reinforcement learning. `advantages` turns scored rollouts into prompt groups; `sync_engine_weights`
    runs after each weight update; rollouts are written to `folder`, one file per iteration."""

    prompts: Sequence[Prompt]
    sampler: Answering
    judge: Judging
    advantages: AdvantageFunction
    plan: Plan
    folder: Path
    sync_engine_weights: Callable[[], None]
    blank: PromptGroup  # as large as a prompt group can become, with all its streams: for the largest batch
    identity: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)  # of the last iteration, over all ranks
    prompt_groups: dict[int, PromptGroup] = field(default_factory=dict)  # this rank's groups by their place
    places: list[int] = field(default_factory=list)  # of the groups of all ranks
    iteration: int = -1  # of the rollouts that are there
    _version: int = 0

    def next(self, step: int) -> GlobalBatch:
        iteration, at = divmod(step, self.plan.steps)
        if iteration != self.iteration:
            assert at == 0, "the rollouts of this step are gone"
            self._collect(iteration, step)
        return self._batch(self._minibatch(iteration, at))

    def largest(self) -> GlobalBatch:
        return self._batch([self.blank] * self._own)

    @property
    def _own(self) -> int:
        """Prompt groups of a step on one rank."""
        return max(1, self.plan.prompts // self.plan.minibatches // distributed.world())

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest forward pass of training."""
        return min(self.plan.micro_tokens, self._own * self.blank.size(self.plan.layout))

    @property
    def texts(self) -> int:
        """Answers that one rank is asked for at a time."""
        return -(-self.plan.prompts // distributed.world()) * self.plan.samples

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return len(self.blank.prompt) + len(self.blank.completions[0].ids)

    # Generating rollouts

    def _collect(self, iteration: int, step: int) -> None:
        """Generates answers until there are enough groups; all ranks decide together."""
        started = time.monotonic()
        wanted, asked, zero_variance = self.plan.prompts, 0, 0
        groups: dict[int, list[Rollout]] = {}
        prompt_groups: dict[int, PromptGroup] = {}
        places: list[int] = []  # of the groups that are used, over all ranks
        measured = MetricSums()
        for attempt in range(self._tries):
            first = (iteration * self._tries + attempt) * wanted
            own = range(first + log.rank(), first + wanted, distributed.world())
            made = self.sampler.answer(
                [self._prompt(p) for p in own], self.plan.samples, seed=self.plan.seed, step=step, version=self._version
            )
            made, found, sums = self.advantages(self.judged(made))
            measured += sums
            without_signal = [
                all(not r.advantage or not e.supervised for r, e in zip(group, prompt_group.completions, strict=True))
                for group, prompt_group in zip(made, found, strict=True)
            ]
            asked, zero_variance = asked + len(made), zero_variance + sum(without_signal)
            used = [self.plan.zero_variance == "keep" or not w for w in without_signal]
            for place, group, prompt_group, use in zip(own, made, found, used, strict=True):
                groups[place] = group if use else _dropped(group, "no signal in the group")
                prompt_groups[place] = prompt_group
            there = distributed.sum_values({str(p): float(p in own and used[own.index(p)]) for p in range(first, first + wanted)})
            places += [int(p) for p in sorted(there, key=int) if there[p]]
            if len(places) >= wanted:
                break
        # With nothing to learn from, the step still runs, without a gradient from rewards.
        self.places = places[:wanted] or list(range(first, first + wanted))
        self.prompt_groups = {p: f for p, f in prompt_groups.items() if p in self.places}
        self.iteration = iteration
        late = "there were enough groups"
        kept = [g if p in self.prompt_groups or not any(r.used for r in g) else _dropped(g, late) for p, g in groups.items()]
        self._write(kept, step)
        self._measure(kept, measured, asked, zero_variance, time.monotonic() - started)

    @property
    def _tries(self) -> int:
        return self.plan.tries if self.plan.zero_variance == "resample" else 1

    def _prompt(self, place: int) -> Prompt:
        """Each epoch has its own order; further attempts use places that no other iteration asks for."""
        epoch, at = divmod(place, len(self.prompts))
        return self.prompts[int(shuffled(len(self.prompts), self.plan.seed, epoch, 6)[at])]

    def judged(self, groups: Groups) -> Groups:
        """The rollouts with their rewards, all scored in one call."""
        flat = [r for group in groups for r in group]
        verdicts = self.judge.judge(flat)
        scored = iter(
            replace(r, reward=v.reward, terms=dict(v.terms), meta={**r.meta, **({"notes": v.notes} if v.notes else {})})
            for r, v in zip(flat, verdicts, strict=True)
        )
        return [[next(scored) for _ in group] for group in groups]

    def _write(self, groups: Groups, step: int) -> None:
        name = f"step_{step:06d}" + (f".rank_{log.rank()}" if distributed.world() > 1 else "")
        with whole_file(self.folder / f"{name}.jsonl") as f:
            f.writelines(dump_line(r) + "\n" for group in groups for r in group)

    def _measure(self, groups: Groups, measured: MetricSums, asked: int, zero_variance: int, seconds: float) -> None:
        rollouts = [r for group in groups for r in group]
        rewards = np.array([r.reward for r in rollouts if r.reward is not None], np.float64)
        measured += MetricSums(largest={"rollout_seconds": seconds})  # of the slowest rank, which the others wait for
        sums = {
            "rollouts": float(len(rollouts)),
            "reward": float(rewards.sum()),
            "square": float((rewards**2).sum()),
            "length": float(sum(sum(r.mask) for r in rollouts)),
            "cut": float(sum(r.finish_reason == "length" for r in rollouts)),
            "groups": float(asked),
            "zero_variance": float(zero_variance),
            **{f"reward/{name}": float(sum(r.terms[name] for r in rollouts)) for name in (rollouts[0].terms if rollouts else ())},
        }
        sums = distributed.sum_values(sums)
        n = max(1.0, sums["rollouts"])
        mean = sums["reward"] / n
        self.facts = {
            "reward": mean,
            "reward_std": max(0.0, sums["square"] / n - mean**2) ** 0.5,
            "length": sums["length"] / n,
            "cut_share": sums["cut"] / n,
            "zero_variance_share": sums["zero_variance"] / max(1.0, sums["groups"]),
            **{name: total / n for name, total in sums.items() if name.startswith("reward/")},
            **measured.metrics(),
        }
        self.facts["generated_per_second"] = sums["length"] / max(self.facts["rollout_seconds"], 1e-9)

    # Using rollouts

    def _minibatch(self, iteration: int, at: int) -> list[PromptGroup]:
        """This rank's prompt groups for one step of an iteration; each pass over them has another order."""
        time_through, part = divmod(at, self.plan.minibatches)
        order = shuffled(len(self.places), self.plan.seed, iteration * self.plan.updates + time_through, 7)
        chosen = [self.places[int(i)] for i in np.array_split(order, self.plan.minibatches)[part]]
        return [self.prompt_groups[p] for p in chosen if p in self.prompt_groups] or [_masked(self.blank)]

    def _batch(self, prompt_groups: list[PromptGroup]) -> GlobalBatch:
        layout = self.plan.layout
        parts = [p for prompt_group in prompt_groups for p in pieces(prompt_group, layout, self.plan.micro_tokens)]
        groups = bins([p.size(layout) for p in parts], self.plan.micro_tokens)[0]
        real = [p for p in parts if p.name != "blank" or any(e.supervised for e in p.completions)]
        own = count(real, layout) if real else dict.fromkeys(count(parts, layout), 0.0)
        counts = distributed.sum_values(own | {"prompts": float(len(prompt_groups))})
        if not counts["sequences"]:  # a step that no rank has anything for: sums of nothing, over one
            counts = dict.fromkeys(counts, 1.0)
        return group_batch([[parts[i] for i in group] for group in groups], counts, layout)

    # The interface of the training loop

    def on_weights(self, version: int) -> None:
        self._version = version
        self.sync_engine_weights()

    def state_dict(self) -> dict[str, Any]:
        """Between iterations, only the settings. Within an iteration each rank also saves its prompt groups to a file, since the
        weights that generated them no longer exist."""
        within = self._version % self.plan.steps != 0
        if within:
            name = f"step_{self._version:06d}.rank_{log.rank()}.json"
            write_json(self._kept / name, {str(p): _packed(f) for p, f in self.prompt_groups.items()})
            for old in sorted(self._kept.glob(f"*.rank_{log.rank()}.json"))[:-RETAINED]:
                old.unlink()
        return {
            "identity": self.identity, "plan": asdict(self.plan), "iteration": self.iteration, "version": self._version,
            "within": within, "places": self.places,
        }  # fmt: skip

    @property
    def _kept(self) -> Path:
        return self.folder.parent / "kept"

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises `ArtifactError` naming what differs from the checkpointed run."""
        for name, ours in (("identity", self.identity), ("plan", asdict(self.plan))):
            different = sorted(k for k in ours.keys() | state[name].keys() if ours.get(k) != state[name].get(k))
            if different:
                raise ArtifactError(
                    "the checkpoint was made with other settings", field=", ".join(different),
                    found=str({k: ours.get(k) for k in different}), expected=str({k: state[name].get(k) for k in different}),
                    fix="resume with the settings of the checkpoint, or start a new run from its model",
                )  # fmt: skip
        self._version, self.places = state["version"], state["places"]
        files = sorted(self._kept.glob(f"step_{self._version:06d}.rank_*.json")) if state["within"] else []
        rows = {int(p): prompt_group for file in files for p, prompt_group in read_json(file).items()}
        if state["within"] and rows.keys() != set(self.places):
            raise ArtifactError(
                "unused rollouts of the checkpoint are missing", file=self._kept, found=f"{len(rows)} groups",
                expected=f"{len(self.places)}, of step {self._version}", fix="start the run again with --force",
            )  # fmt: skip
        own = [p for p in rows if p % self.plan.prompts % distributed.world() == log.rank()]  # of any number of ranks before
        self.prompt_groups = {p: _unpacked(rows[p]) for p in own}
        self.iteration = state["iteration"] if state["within"] else -1
        self.sync_engine_weights()

    def describe(self) -> list[str]:
        p = self.plan
        return [
            f"{len(self.prompts):,} prompts; {p.prompts} an iteration, {p.samples} answers each, up to {p.max_tokens} tokens; "
            f"{p.steps} step(s) an iteration, so weights are at most {p.steps - 1} steps older than the answers they learn from"
        ]


def read_rollouts(file: Path) -> list[Rollout]:
    """The rollouts of one iteration."""
    return list(read_records(file, Rollout))  # answers may hold what `splitlines` takes for the end of a line


def _dropped(group: list[Rollout], why: str) -> list[Rollout]:
    return [replace(r, used=False, meta={**r.meta, "left_out": why}) for r in group]


def _masked(prompt_group: PromptGroup) -> PromptGroup:
    """The group without supervised tokens: a rank with nothing to learn from still runs the model as often as the others."""
    one = prompt_group.completions[0]
    return replace(prompt_group, completions=(replace(one, mask=np.zeros(len(one.ids), np.uint8)),))


def _packed(prompt_group: PromptGroup) -> dict[str, Any]:
    completions = [
        {
            "ids": e.ids.tolist(),
            "mask": None if e.mask is None else e.mask.tolist(),
            "tokens": {k: np.asarray(v, np.float32).tolist() for k, v in e.tokens.items()},  # exact: float32 as decimal and back
        }
        for e in prompt_group.completions
    ]
    return {"name": prompt_group.name, "prompt": prompt_group.prompt.tolist(), "endings": completions}


def _unpacked(row: dict[str, Any]) -> PromptGroup:
    completions = tuple(
        Completion(
            np.array(e["ids"], np.int64),
            None if e["mask"] is None else np.array(e["mask"], np.uint8),
            {k: np.array(v, np.float32) for k, v in e["tokens"].items()},
        )
        for e in row["endings"]
    )
    return PromptGroup(row["name"], np.array(row["prompt"], np.int64), completions)
