"""Distillation on the student's own answers: it answers prompts in each step, and the teacher says what it would have said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tutelage import log
from tutelage.chat.render import Renderer
from tutelage.config.stages import Distil
from tutelage.data.groups.groups import Completion, PromptGroup
from tutelage.errors import ConfigError
from tutelage.models.adapters.virtual_tokens import max_text_tokens
from tutelage.objectives import Objective
from tutelage.plan.flops import count_flops, train_flops_per_token
from tutelage.records import Rollout
from tutelage.rollout.advantage_estimator import group_of
from tutelage.rollout.metric_sums import MetricSums
from tutelage.rollout.probe import Measured
from tutelage.rollout.source import Groups, Plan, RolloutSource
from tutelage.rundir import RunDir
from tutelage.setup import answers
from tutelage.setup.hyperparameters import FINE_TUNE_RATE
from tutelage.setup.sampling import kv_cache_bytes, read_prompts, sampler_for, sync_engine_weights, with_room
from tutelage.setup.trainer import TrainingSpec, write_model
from tutelage.tokenizer.load import TokenizerFolder

ROLLOUT_SHARE = 0.3  # time of the answers beside that of training, about


@dataclass(slots=True, frozen=True)
class CompletionVerdict:
    """No reward: the teacher says what every token should have been."""

    reward: None = None
    terms: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


class Unjudged:
    def judge(self, rollouts: Sequence[Rollout]) -> list[CompletionVerdict]:
        return [CompletionVerdict() for _ in rollouts]


def uncredited(groups: Groups) -> tuple[Groups, list[PromptGroup], MetricSums]:
    return groups, [group_of(group) for group in groups], MetricSums()


def work_on_answers(config: Distil, run: RunDir, model: Any, teacher: Any, chosen: Objective) -> TrainingSpec:
    """What the loop gets: a source that asks the student, and the teacher as a frozen part."""
    start, how = run.input("model"), config.rollouts
    words = TokenizerFolder.open(start)
    length = min(max_text_tokens(model), max_text_tokens(teacher), 2048)
    sampler = sampler_for(model, Renderer(words), length, how.max_tokens, how.temperature)
    prompts = with_room(sampler, read_prompts(run, "train"), "train")
    if how.prompts > len(prompts):
        raise ConfigError(
            "a batch is larger than the data", field="rollouts.prompts", found=how.prompts, expected=f"at most {len(prompts)}"
        )
    trees = model.traits.trees and teacher.traits.trees
    plan = Plan(
        prompts=how.prompts, samples=how.samples, max_tokens=how.max_tokens, micro_tokens=how.micro_tokens,
        layout="tree" if trees else "packed", seed=config.seed,
    )  # fmt: skip
    longest = max((sampler.ids(p) for p in prompts), key=len)
    completion = Completion(np.zeros(min(how.max_tokens, length - len(longest)), np.int64))
    blank = PromptGroup("blank", np.array(longest, np.int64), (completion,) * how.samples)
    source = RolloutSource(
        prompts=prompts, sampler=sampler, judge=Unjudged(), advantages=uncredited, plan=plan, folder=run.folder("rollouts"),
        sync_engine_weights=sync_engine_weights(model, sampler.engine), blank=blank, identity={"prompts": len(prompts)},
    )  # fmt: skip
    once = len(prompts) / how.prompts
    steps = max(1, round((config.epochs or 1.0) * once)) if config.steps == "derived" else config.steps
    log.say("\n".join([*source.describe(), f"{steps:,} steps"]))
    shape, rates = model.config.to_hf(), answers.rates(config, sum(p.numel() for p in model.parameters()), FINE_TUNE_RATE)
    each = count_flops(teacher.config.to_hf(), length).forward / train_flops_per_token(shape, length)
    return TrainingSpec(
        parts={"policy": model, "teacher": teacher},
        source=source,
        objective=chosen,
        steps=steps,
        rates=rates,
        shape=shape,
        length=length,
        micro=(1, source.most_tokens),
        tokens=float(blank.size(plan.layout)) * how.prompts * steps,
        numbers={"max_length": length, **asdict(rates)},
        write=lambda: write_model(model, run, start, words.stop_ids),
        hooks=lambda job: {"rollouts": Measured(source)},
        beside={"cache of rollouts": kv_cache_bytes(sampler.engine, source.texts, source.longest)},
        forward_share=each + ROLLOUT_SHARE,
    )
