"""Batches of rollouts: prompts are answered, answers judged, judgements turned into what every token is worth.

An iteration is one batch of prompts, answered by the weights as they are then; its answers are trained on `updates` times, in
`minibatches` steps each time. So the weights that made an answer are at most updates * minibatches - 1 steps old (`staleness`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tutelage import log
from tutelage.data.families import Ending, Family, Layout, bins
from tutelage.data.family_source import count, family_batch
from tutelage.data.loader import GlobalBatch
from tutelage.data.pack import shuffled
from tutelage.errors import ArtifactError, ConfigError
from tutelage.files import whole_file
from tutelage.records import Prompt, Rollout, dump_line, from_json
from tutelage.rollout.scores import pieces
from tutelage.train import distributed

Groups = list[list[Rollout]]  # answers to one prompt together


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
    silent: str = "keep"  # groups whose answers are all worth the same: keep | skip | resample
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


Credited = Callable[[Groups], tuple[Groups, list[Family], dict[str, float]]]
"""What judged rollouts are worth: the rollouts with their advantages, a family of each group, and measurements."""


@dataclass(slots=True)
class RolloutSource:
    """The source of reinforcement learning. `credit` makes families of judged groups; `published` runs when the weights have
    changed; rollouts are written to `folder`, a file an iteration."""

    prompts: Sequence[Prompt]
    sampler: Answering
    judge: Judging
    credit: Credited
    plan: Plan
    folder: Path
    published: Callable[[], None]
    blank: Family  # as large as a family can become, with all its streams: for the largest batch
    identity: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)  # of the last iteration
    _families: list[Family] = field(default_factory=list)
    iteration: int = -1  # of the rollouts that are there
    _version: int = 0

    def next(self, step: int) -> GlobalBatch:
        iteration, at = divmod(step, self.plan.steps)
        if iteration != self.iteration:
            assert at == 0, "the rollouts of this step are gone"
            self._collect(iteration, step)
        return self._batch(self._minibatch(iteration, at))

    def largest(self) -> GlobalBatch:
        chosen = max(1, self.plan.prompts // self.plan.minibatches // distributed.world())
        return self._batch([self.blank] * chosen)

    # Making rollouts

    def _collect(self, iteration: int, step: int) -> None:
        started = time.monotonic()
        self.facts = {}
        wanted, groups, families, silent, asked = self.plan.prompts, [], [], 0, 0
        measured: dict[str, float] = {}
        for attempt in range(self.plan.tries if self.plan.silent == "resample" else 1):
            chosen = self._choose(iteration, attempt)
            made = self.judged(self.sampler.answer(
                chosen, self.plan.samples, seed=self.plan.seed, step=step, version=self._version
            ))  # fmt: skip
            made, own, measured = self.credit(made)
            asked += len(made)
            quiet = [all(not r.advantage for r in group) for group in made]
            silent += sum(quiet)
            if self.plan.silent == "keep":
                quiet = [False] * len(made)
            groups += [_left_out(g, "no signal in the group") if q else g for g, q in zip(made, quiet, strict=True)]
            families += [f for f, q in zip(own, quiet, strict=True) if not q]
            if len(families) * distributed.world() >= wanted:
                break
        if not families:  # nothing to learn: the step is made, and moves nothing
            families = own
        self._families, self.iteration = families[: wanted // distributed.world()], iteration
        used = {f.name for f in self._families}
        groups = [g if g[0].prompt in used or not g[0].used else _left_out(g, "there were enough groups") for g in groups]
        self._write(groups, step)
        self._measure(groups, measured, asked, silent, time.monotonic() - started)

    def _choose(self, iteration: int, attempt: int) -> list[Prompt]:
        """This rank's prompts. Every epoch has its own order; further attempts take the prompts of later iterations' places."""
        size, tries = self.plan.prompts, self.plan.tries if self.plan.silent == "resample" else 1
        first = (iteration * tries + attempt) * size
        places = range(first + log.rank(), first + size, distributed.world())
        out = []
        for place in places:
            epoch, at = divmod(place, len(self.prompts))
            out.append(self.prompts[int(shuffled(len(self.prompts), self.plan.seed, epoch, 6)[at])])
        return out

    def judged(self, groups: Groups) -> Groups:
        """The rollouts with their rewards, all scored together."""
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

    def _measure(self, groups: Groups, measured: dict[str, float], asked: int, silent: int, seconds: float) -> None:
        rollouts = [r for group in groups for r in group]
        rewards = np.array([r.reward for r in rollouts if r.reward is not None], np.float64)
        made = sum(sum(r.mask) for r in rollouts)
        sums = {
            "rollouts": float(len(rollouts)),
            "reward": float(rewards.sum()),
            "square": float((rewards**2).sum()),
            "length": float(made),
            "cut": float(sum(r.finish_reason == "length" for r in rollouts)),
            "groups": float(asked),
            "silent": float(silent),
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
            "silent_share": sums["silent"] / max(1.0, sums["groups"]),
            **{name: total / n for name, total in sums.items() if name.startswith("reward/")},
            **measured,
            "rollout_seconds": seconds,
            "generated_per_second": made / max(seconds, 1e-9),
        }

    # Using them

    def _minibatch(self, iteration: int, at: int) -> list[Family]:
        """The families of one step of an iteration; each time through them in another order."""
        time_through, part = divmod(at, self.plan.minibatches)
        order = shuffled(len(self._families), self.plan.seed, iteration * self.plan.updates + time_through, 7)
        return [self._families[int(i)] for i in np.array_split(order, self.plan.minibatches)[part]]

    def _batch(self, families: list[Family]) -> GlobalBatch:
        layout = self.plan.layout
        parts = [p for family in families for p in pieces(family, layout, self.plan.micro_tokens)]
        groups = bins([p.size(layout) for p in parts], self.plan.micro_tokens)[0]
        counts = distributed.sum_values(count(parts, layout) | {"prompts": float(len(families))})
        return family_batch([[parts[i] for i in group] for group in groups], counts, layout)

    # The loop's side

    def on_weights(self, version: int) -> None:
        self._version = version
        self.published()

    def state_dict(self) -> dict[str, Any]:
        """Between iterations nothing but the settings; within one, its families, since their weights are gone."""
        done = self._version % self.plan.steps == 0
        kept = [] if done else [_packed(f) for f in self._families]
        return {
            "identity": self.identity, "plan": asdict(self.plan), "iteration": self.iteration, "version": self._version,
            "families": kept,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises `ArtifactError` naming what differs from the run that goes on."""
        for name, ours in (("identity", self.identity), ("plan", asdict(self.plan))):
            different = sorted(k for k in ours.keys() | state[name].keys() if ours.get(k) != state[name].get(k))
            if different:
                raise ArtifactError(
                    "the checkpoint was made with other settings", field=", ".join(different),
                    found=str({k: ours.get(k) for k in different}), expected=str({k: state[name].get(k) for k in different}),
                    fix="resume with the settings of the checkpoint, or start a new run from its model",
                )  # fmt: skip
        self._families = [_unpacked(f) for f in state["families"]]
        self.iteration = state["iteration"] if self._families else -1
        self._version = state["version"]
        self.published()

    def describe(self) -> list[str]:
        p = self.plan
        return [
            f"{len(self.prompts):,} prompts; {p.prompts} an iteration, {p.samples} answers each, up to {p.max_tokens} tokens; "
            f"{p.steps} step(s) an iteration, so weights are at most {p.steps - 1} steps older than the answers they learn from"
        ]


def read_rollouts(file: Path) -> list[Rollout]:
    """The rollouts of one iteration."""
    return [from_json(Rollout, json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def _left_out(group: list[Rollout], why: str) -> list[Rollout]:
    return [replace(r, used=False, meta={**r.meta, "left_out": why}) for r in group]


def _packed(family: Family) -> dict[str, Any]:
    endings = [
        {
            "ids": e.ids.tolist(),
            "mask": None if e.mask is None else e.mask.tolist(),
            "tokens": {k: np.asarray(v, np.float32).tolist() for k, v in e.tokens.items()},  # exact: float32 as decimal and back
        }
        for e in family.endings
    ]
    return {"name": family.name, "prompt": family.prompt.tolist(), "endings": endings}


def _unpacked(row: dict[str, Any]) -> Family:
    endings = tuple(
        Ending(
            np.array(e["ids"], np.int64),
            None if e["mask"] is None else np.array(e["mask"], np.uint8),
            {k: np.array(v, np.float32) for k, v in e["tokens"].items()},
        )
        for e in row["endings"]
    )
    return Family(row["name"], np.array(row["prompt"], np.int64), endings)
