"""Batches of rollouts: prompts are answered, answers judged, judgements turned into what every token is worth.

An iteration is one batch of prompts, answered by the weights as they are then; its answers are trained on `updates` times, in
`minibatches` steps each time. So the weights that made an answer are at most updates * minibatches - 1 steps old (`staleness`).
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
from tutelage.data.groups.source import count, family_batch
from tutelage.data.tokens.loader import GlobalBatch
from tutelage.data.tokens.pack import shuffled
from tutelage.errors import ArtifactError, ConfigError
from tutelage.files import read_json, whole_file, write_json
from tutelage.records import Prompt, Rollout, dump_line, read_records
from tutelage.rollout.metric_sums import MetricSums
from tutelage.rollout.scores import pieces
from tutelage.train import distributed

Groups = list[list[Rollout]]  # answers to one prompt together
KEPT = 4  # checkpoints within iterations whose rollouts are kept


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
        if self.prompts < distributed.world():
            raise ConfigError(
                "fewer prompts in an iteration than ranks", found=f"{self.prompts} for {distributed.world()} ranks",
                fix="raise batch (of `rl`) or rollouts.prompts (of `distil`), or start fewer ranks",
            )  # fmt: skip


Credited = Callable[[Groups], tuple[Groups, list[PromptGroup], MetricSums]]
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
    blank: PromptGroup  # as large as a family can become, with all its streams: for the largest batch
    identity: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)  # of the last iteration, over all ranks
    families: dict[int, PromptGroup] = field(default_factory=dict)  # this rank's groups by their place
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
        """Families of a step on one rank."""
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
        return len(self.blank.prompt) + len(self.blank.endings[0].ids)

    # Making rollouts

    def _collect(self, iteration: int, step: int) -> None:
        """Asks prompts until there are enough groups, which all ranks decide together."""
        started = time.monotonic()
        wanted, asked, silent = self.plan.prompts, 0, 0
        groups: dict[int, list[Rollout]] = {}
        families: dict[int, PromptGroup] = {}
        places: list[int] = []  # of the groups that are used, over all ranks
        measured = MetricSums()
        for attempt in range(self._tries):
            first = (iteration * self._tries + attempt) * wanted
            own = range(first + log.rank(), first + wanted, distributed.world())
            made = self.sampler.answer(
                [self._prompt(p) for p in own], self.plan.samples, seed=self.plan.seed, step=step, version=self._version
            )
            made, found, tally = self.credit(self.judged(made))
            measured += tally
            quiet = [
                all(not r.advantage or not e.supervised for r, e in zip(group, family.endings, strict=True))
                for group, family in zip(made, found, strict=True)
            ]
            asked, silent = asked + len(made), silent + sum(quiet)
            loud = [self.plan.silent == "keep" or not q for q in quiet]
            for place, group, family, used in zip(own, made, found, loud, strict=True):
                groups[place] = group if used else _left_out(group, "no signal in the group")
                families[place] = family
            there = distributed.sum_values({str(p): float(p in own and loud[own.index(p)]) for p in range(first, first + wanted)})
            places += [int(p) for p in sorted(there, key=int) if there[p]]
            if len(places) >= wanted:
                break
        # Where there is nothing to learn from, the step is made all the same, without a gradient of rewards.
        self.places = places[:wanted] or list(range(first, first + wanted))
        self.families = {p: f for p, f in families.items() if p in self.places}
        self.iteration = iteration
        late = "there were enough groups"
        kept = [g if p in self.families or not any(r.used for r in g) else _left_out(g, late) for p, g in groups.items()]
        self._write(kept, step)
        self._measure(kept, measured, asked, silent, time.monotonic() - started)

    @property
    def _tries(self) -> int:
        return self.plan.tries if self.plan.silent == "resample" else 1

    def _prompt(self, place: int) -> Prompt:
        """Every epoch has its own order; places of further attempts are those that no other iteration asks."""
        epoch, at = divmod(place, len(self.prompts))
        return self.prompts[int(shuffled(len(self.prompts), self.plan.seed, epoch, 6)[at])]

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

    def _measure(self, groups: Groups, measured: MetricSums, asked: int, silent: int, seconds: float) -> None:
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
            **measured.metrics(),
        }
        self.facts["generated_per_second"] = sums["length"] / max(self.facts["rollout_seconds"], 1e-9)

    # Using them

    def _minibatch(self, iteration: int, at: int) -> list[PromptGroup]:
        """This rank's families of one step of an iteration; each time through them in another order."""
        time_through, part = divmod(at, self.plan.minibatches)
        order = shuffled(len(self.places), self.plan.seed, iteration * self.plan.updates + time_through, 7)
        chosen = [self.places[int(i)] for i in np.array_split(order, self.plan.minibatches)[part]]
        return [self.families[p] for p in chosen if p in self.families] or [_muted(self.blank)]

    def _batch(self, families: list[PromptGroup]) -> GlobalBatch:
        layout = self.plan.layout
        parts = [p for family in families for p in pieces(family, layout, self.plan.micro_tokens)]
        groups = bins([p.size(layout) for p in parts], self.plan.micro_tokens)[0]
        real = [p for p in parts if p.name != "blank" or any(e.supervised for e in p.endings)]
        own = count(real, layout) if real else dict.fromkeys(count(parts, layout), 0.0)
        counts = distributed.sum_values(own | {"prompts": float(len(families))})
        if not counts["sequences"]:  # a step that no rank has anything for: sums of nothing, over one
            counts = dict.fromkeys(counts, 1.0)
        return family_batch([[parts[i] for i in group] for group in groups], counts, layout)

    # The loop's side

    def on_weights(self, version: int) -> None:
        self._version = version
        self.published()

    def state_dict(self) -> dict[str, Any]:
        """Between iterations nothing but the settings. Within one its families are kept too, since their weights are gone: each
        rank's in a file of its own beside the rollouts."""
        within = self._version % self.plan.steps != 0
        if within:
            name = f"step_{self._version:06d}.rank_{log.rank()}.json"
            write_json(self._kept / name, {str(p): _packed(f) for p, f in self.families.items()})
            for old in sorted(self._kept.glob(f"*.rank_{log.rank()}.json"))[:-KEPT]:
                old.unlink()
        return {
            "identity": self.identity, "plan": asdict(self.plan), "iteration": self.iteration, "version": self._version,
            "within": within, "places": self.places,
        }  # fmt: skip

    @property
    def _kept(self) -> Path:
        return self.folder.parent / "kept"

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
        self._version, self.places = state["version"], state["places"]
        files = sorted(self._kept.glob(f"step_{self._version:06d}.rank_*.json")) if state["within"] else []
        rows = {int(p): family for file in files for p, family in read_json(file).items()}
        if state["within"] and rows.keys() != set(self.places):
            raise ArtifactError(
                "rollouts that were not used up are gone", file=self._kept, found=f"{len(rows)} groups",
                expected=f"{len(self.places)}, of step {self._version}", fix="start the run again with --force",
            )  # fmt: skip
        own = [p for p in rows if p % self.plan.prompts % distributed.world() == log.rank()]  # of any number of ranks before
        self.families = {p: _unpacked(rows[p]) for p in own}
        self.iteration = state["iteration"] if state["within"] else -1
        self.published()

    def describe(self) -> list[str]:
        p = self.plan
        return [
            f"{len(self.prompts):,} prompts; {p.prompts} an iteration, {p.samples} answers each, up to {p.max_tokens} tokens; "
            f"{p.steps} step(s) an iteration, so weights are at most {p.steps - 1} steps older than the answers they learn from"
        ]


def read_rollouts(file: Path) -> list[Rollout]:
    """The rollouts of one iteration."""
    return list(read_records(file, Rollout))  # answers may hold what `splitlines` takes for the end of a line


def _left_out(group: list[Rollout], why: str) -> list[Rollout]:
    return [replace(r, used=False, meta={**r.meta, "left_out": why}) for r in group]


def _muted(family: PromptGroup) -> PromptGroup:
    """A family that counts nothing: ranks go through the model equally often, also where one has nothing to learn from."""
    one = family.endings[0]
    return replace(family, endings=(replace(one, mask=np.zeros(len(one.ids), np.uint8)),))


def _packed(family: PromptGroup) -> dict[str, Any]:
    endings = [
        {
            "ids": e.ids.tolist(),
            "mask": None if e.mask is None else e.mask.tolist(),
            "tokens": {k: np.asarray(v, np.float32).tolist() for k, v in e.tokens.items()},  # exact: float32 as decimal and back
        }
        for e in family.endings
    ]
    return {"name": family.name, "prompt": family.prompt.tolist(), "endings": endings}


def _unpacked(row: dict[str, Any]) -> PromptGroup:
    endings = tuple(
        Completion(
            np.array(e["ids"], np.int64),
            None if e["mask"] is None else np.array(e["mask"], np.uint8),
            {k: np.array(v, np.float32) for k, v in e["tokens"].items()},
        )
        for e in row["endings"]
    )
    return PromptGroup(row["name"], np.array(row["prompt"], np.int64), endings)
