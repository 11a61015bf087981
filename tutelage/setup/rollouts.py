"""The parts that rollouts are made with, around one model: engine, sampler, rewards, reference, values, the source of batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage import log
from tutelage.chat.render import Renderer
from tutelage.config.stages import Rl
from tutelage.data.groups.groups import Completion, PromptGroup
from tutelage.engine import Engine
from tutelage.errors import ConfigError, Setting
from tutelage.models.adapters.attach import reference_weights
from tutelage.models.interface import Batch
from tutelage.models.open import load
from tutelage.models.open_scorer import load_scorer
from tutelage.models.scorer import Scorer, build_scorer
from tutelage.objectives.answers import answers_of, token_scores
from tutelage.records import Prompt
from tutelage.rewards.check import check_spread
from tutelage.rollout.advantage_estimator import AdvantageEstimator, ByToken, Settings
from tutelage.rollout.environments import Environments
from tutelage.rollout.episodes import Episodes
from tutelage.rollout.scores import by_token
from tutelage.rollout.source import Plan, RolloutSource
from tutelage.rollout.tools import tools_of
from tutelage.rollout.weights import compares_groups
from tutelage.rundir import RunDir
from tutelage.setup import answers
from tutelage.setup.sampling import kv_cache_bytes, sampler_for, sync_engine_weights

CHECKED = 8  # prompts whose answers are judged before training starts


@dataclass(slots=True, kw_only=True)
class RolloutSetup:
    """Everything of one run."""

    config: Rl
    run: RunDir
    model: Any
    device: torch.device
    rubric: Any
    scorer: Scorer | None  # that the rubric asks
    engine: Engine
    sampler: Any
    value: Scorer | None
    reference: Any | None
    plan: Plan
    layout: Any = "tree"
    streams: tuple[str, ...] = field(default=())

    @classmethod
    def of(
        cls, config: Rl, run: RunDir, model: Any, renderer: Renderer, device: torch.device, rubric: Any,
        scorer: Scorer | None = None,
    ) -> RolloutSetup:  # fmt: skip
        length = answers.max_length(config, model)
        layout = answers.layout_for(config, model)
        plan = Plan(
            prompts=config.batch, samples=config.samples, max_tokens=config.max_tokens, updates=config.updates,
            minibatches=config.minibatches, zero_variance=config.zero_variance, micro_tokens=config.micro_tokens, layout=layout,
            seed=config.seed,
        )  # fmt: skip
        single = sampler_for(model, renderer, length, config.max_tokens, config.temperature)
        value = value_of(config, run, model, device) if config.method == "ppo" else None
        reference = reference_of(config, run, model, device) if config.kl else None
        sampler: Any = single
        if config.tools or config.environment:
            environments = Environments(config.environment, config.environment_seconds) if config.environment else None
            sampler = Episodes(single, config.max_rounds, tools_of(config.tools), environments)
        return cls(
            config=config, run=run, model=model, device=device, rubric=rubric, scorer=scorer, engine=single.engine,
            sampler=sampler, value=value, reference=reference, plan=plan, layout=layout,
        )  # fmt: skip

    def close(self) -> None:
        """Ends the process of environments."""
        if isinstance(self.sampler, Episodes):
            self.sampler.close()

    @property
    def parts(self) -> dict[str, Any]:
        """What is trained."""
        return {"policy": self.model} | ({"value": self.value} if self.value is not None else {})

    def advantage_estimator(self) -> AdvantageEstimator:
        c = self.config
        old = c.old if c.old != "derived" else "engine" if c.temperature == 1 else "trainer"
        if old == "engine" and c.temperature != 1:
            raise ConfigError(
                "the engine's log-probabilities are of temperature 1",
                field="old",
                found=old,
                fix=f"set {Setting('old', 'trainer')}",
            )
        if c.correction != "none" and (old == "engine" or c.temperature != 1):
            raise ConfigError(
                "engine and trainer can't be compared", field="correction", found=f"{c.correction}, temperature {c.temperature}",
                expected="temperature 1", fix=f"set {Setting('old', 'trainer')} and {Setting('temperature', '1')}, or "
                f"{Setting('correction', 'none')}",
            )  # fmt: skip
        settings = Settings(
            method=c.method, max_tokens=c.max_tokens, truncated=c.truncated, penalty=c.penalty,
            kl_in_reward=c.kl if c.kl_in == "reward" else 0.0, kl_estimator=c.kl_estimator or "k1", gamma=c.gamma, lam=c.lam,
            correction=c.correction, correction_cap=c.correction_cap, correction_level=c.correction_level,
        )  # fmt: skip
        return AdvantageEstimator(
            settings,
            old=self.scores(self.model) if old == "trainer" else None,
            comparable=c.temperature == 1,
            reference=self.scores(self.reference, start=True) if self.reference is not None else None,
            values=self.measured(self.value, values) if self.value is not None else None,
        )

    def scores(self, model: Any, start: bool = False) -> ByToken:
        """Log-probabilities of every token under `model`, at the temperature of the answers; `start`: without what an adapter
        has learned."""
        temperature = self.config.temperature

        def measure(part: Any, batch: Batch) -> Tensor:
            with reference_weights(part) if start else nullcontext():
                return token_scores(part, batch, temperature)[0]

        return self.measured(model, measure)

    def measured(self, part: Any, measure: Callable[[Any, Batch], Tensor]) -> ByToken:
        def ask(prompt_groups: Sequence[PromptGroup]) -> list[list[Any]]:
            was = part.training
            part.eval()
            found = by_token(
                prompt_groups, lambda batch: measure(part, batch), self.layout, self.config.micro_tokens, self.device
            )
            part.train(was)
            return found

        return ask

    def check_rewards(self, prompts: Sequence[Prompt]) -> None:
        """Judges some answers before anything is trained: a reward that never differs teaches nothing, nor does one that differs
        between prompts alone where the answers to one prompt are compared. Raises `RewardError`."""
        made = self.sampler.answer(prompts[:CHECKED], self.config.samples, seed=self.config.seed, step=0, version=0)
        rollouts = [r for group in made for r in group]
        verdicts = self.rubric.judge(rollouts)
        if not compares_groups(self.config.method):
            check_spread(verdicts, rollouts)
            return
        share = check_spread(verdicts, rollouts, self.config.samples)
        log.say(f"rewards differ in {share:.0%} of {len(made)} groups of {self.config.samples} answers, by the start")

    def source(self, prompts: Sequence[Prompt]) -> RolloutSource:
        return RolloutSource(
            prompts=prompts, sampler=self.sampler, judge=self.rubric, advantages=self.advantage_estimator(), plan=self.plan,
            folder=self.run.folder("rollouts"), sync_engine_weights=sync_engine_weights(self.model, self.engine),
            blank=self.blank(prompts),
            identity={"prompts": len(prompts), "method": self.config.method},
        )  # fmt: skip

    def held(self, source: RolloutSource) -> dict[str, int]:
        """Bytes of what is held beside the parts, by name: models that are asked between steps, and the engine's cache."""
        out = {"cache of rollouts": kv_cache_bytes(self.engine, source.texts, source.longest)}
        own = {p.data_ptr() for p in self.model.parameters()}
        others = {
            "merged copy": [p for p in self.engine.model.parameters() if p.data_ptr() not in own],  # of what an adapter changed
            "reference": [] if self.reference in (None, self.model) else list(self.reference.parameters()),
            "reward model": [] if self.scorer is None else list(self.scorer.parameters()),
        }
        return out | {name: size for name, held in others.items() if (size := sum(p.nbytes for p in held))}

    def blank(self, prompts: Sequence[Prompt]) -> PromptGroup:
        """The largest prompt group that may come, with every stream an objective may ask for."""
        longest = max((self.sampler.ids(p) for p in prompts), key=len)
        names = ["old", "advantage", "weight"]
        names += ["reference"] if self.reference is not None else []
        names += ["value_old", "return"] if self.value is not None else []
        turns = self.config.max_rounds if isinstance(self.sampler, Episodes) else 1
        size = min(
            turns * 2 * self.plan.max_tokens if turns > 1 else self.plan.max_tokens, self.engine.context_length - len(longest)
        )
        completion = Completion(np.zeros(size, np.int64), None, {name: np.zeros(size, np.float32) for name in names})
        return PromptGroup("blank", np.array(longest, np.int64), (completion,) * self.plan.samples)


def values(scorer: Any, batch: Batch) -> Tensor:
    """[N]: the value of the state before each supervised token."""
    return scorer(batch)[answers_of(batch).positions, 0]  # type: ignore[no-any-return]


def value_of(config: Rl, run: RunDir, model: Any, device: torch.device) -> Scorer:
    """The value function: a reward model, or the start with a new head."""
    if config.value is not None:
        answers.check_tokens(run, "value")
        found = load_scorer(run.input("value"), device=device)
    else:
        found = build_scorer(load(run.input("model"), device=device), 1, config.seed)
    # Trained at the adapter's rate, so by an adapter too.
    start = run.input("value" if config.value is not None else "model")
    return answers.wear_under_head(found, config, start, config.seed)  # type: ignore[no-any-return]


def reference_of(config: Rl, run: RunDir, model: Any, device: torch.device) -> Any:
    """The model to stay close to, frozen. With an adapter it is the model itself without what that learns: no second copy."""
    if config.reference is None and config.adapter.kind != "none":
        return model
    if config.reference is not None:
        answers.check_tokens(run, "reference")
    other: Any = load(run.input("reference" if config.reference else "model"), device=device)
    return other.eval().requires_grad_(False)
