"""Stage `rl`: a model, prompts and rewards -> a model whose own answers are worth more (GRPO and family, PPO)."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import Any

from tutelage import log
from tutelage.chat.render import Renderer
from tutelage.config.rewards import bounds, terms_of
from tutelage.config.stages import Rl
from tutelage.errors import ConfigError
from tutelage.evaluate.intervals import mean, paired_difference
from tutelage.models.config import check_vocabulary
from tutelage.objectives import Objective
from tutelage.rollout.probe import Measured, Probe
from tutelage.rundir import RunDir
from tutelage.setup import answers, trainer
from tutelage.setup.methods import policy_method
from tutelage.setup.replay import train_with_replay
from tutelage.setup.rollouts import RolloutSetup
from tutelage.setup.sampling import read_prompts, reward_model_of, rubric_of, with_room
from tutelage.setup.trainer import TrainingSpec
from tutelage.tokenizer.load import TokenizerFolder

RATE_AT_7B = 1e-6


def run(config: Rl, run: RunDir) -> dict[str, Any]:
    chosen = policy_method(config)
    device = trainer.choose_device(config)
    start = run.input("model")
    model = trainer.load_start(start, config, device, run.seed)
    words = TokenizerFolder.open(start)
    check_vocabulary(model.config, words.vocab_size, start)
    scorer = reward_model_of(config, run, device)
    rubric = rubric_of(config, words, scorer)
    with contextlib.ExitStack() as ends:
        ends.callback(rubric.close)
        setup = RolloutSetup.of(config, run, model, Renderer(words), device, rubric, scorer)
        ends.callback(setup.close)
        try:
            return learn(config, run, setup, chosen, words)
        finally:
            for name, count in ((name, count) for name, count in rubric.past_limits.items() if count):
                log.say(f"reward {name}: {count:,} texts were past its limits, and got the worst value")


def learn(config: Rl, run: RunDir, setup: RolloutSetup, chosen: Objective, words: TokenizerFolder) -> dict[str, Any]:
    """Trains with what is there."""
    prompts, held_out = (with_room(setup.sampler, read_prompts(run, part), part) for part in ("train", "validation"))
    if config.batch > len(prompts):
        raise ConfigError("a batch larger than the data", field="batch", found=config.batch, expected=f"at most {len(prompts)}")
    setup.check_rewards(prompts)
    source, plan, model = setup.source(prompts), setup.plan, setup.model
    steps = config.steps
    if steps == "derived":
        steps = max(1, round(config.epochs * len(prompts) / plan.prompts)) * plan.steps
    log.say("\n".join([*source.describe(), f"{steps:,} steps"]))
    rates = answers.rates(config, answers.size_of(model), RATE_AT_7B, heads=config.method == "ppo")
    every = config.evaluate_every or max(1, steps // 5)
    asked = held_out[: config.probes]
    probe = Probe(asked, setup.sampler, setup.rubric, every, run.folder("probes")) if asked else None
    work = TrainingSpec(
        parts=setup.parts,
        source=source,
        objective=chosen,
        steps=steps,
        rates=rates,
        shape=model.config.to_hf(),
        length=setup.engine.context_length,
        micro=(1, source.most_tokens),
        tokens=float(source.blank.size(plan.layout)) * plan.prompts / plan.minibatches * steps,
        numbers={"max_length": setup.engine.context_length, **asdict(rates)},
        write=lambda: trainer.write_model(model, run, run.input("model"), words.stop_ids),
        weights={"value": config.value_weight},
        hooks=lambda job: {"rollouts": Measured(source), **({"probe": probe} if probe else {})},
        headline=lambda: f"reward {source.facts['reward']:.3f}" if source.facts else "reward known after the next answers",
        beside=setup.held(source),
        forward_share=0.5,
    )
    facts = train_with_replay(config, run, work, run.input("model"), setup.device)
    return {
        **facts,
        "method": config.method,
        "prompts": len(prompts),
        "rollouts": source.facts,
        **gain(probe, bounds(terms_of(config.rewards))),
    }


def gain(probe: Probe | None, within: tuple[float, float] | None = None) -> dict[str, Any]:
    """Rewards of held-out prompts before and after, with intervals inside what a reward can be: of those that were asked both
    times. A run may go on with another number of probes."""
    if probe is None or not (before := probe.rewards.get("before")):
        return {}
    after = probe.rewards["after"]
    both = min(len(before), len(after))  # the first of the held-out prompts, always in their order
    if len(before) != len(after):
        log.say(f"probes: {len(before)} at the start and {len(after)} at the end; the first {both} of them are compared")
    found = {
        "before": mean(before[:both], bounds=within), "after": mean(after[:both], bounds=within),
        "gain": paired_difference(after[:both], before[:both], bounds=within),
    }  # fmt: skip
    said = "  ".join(f"{name} {e.said()}" for name, e in found.items())
    log.say(f"held-out reward, {both} greedy answers: {said}")
    return {f"held_out_{name}": e.to_json() for name, e in found.items()}
