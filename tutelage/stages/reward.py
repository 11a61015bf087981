"""Stage `reward`: a model and what people said of answers -> a model that scores answers as they would."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tutelage import log
from tutelage.artifacts import is_scored, whole_of
from tutelage.config.stages import Reward
from tutelage.data.groups.source import GroupSource
from tutelage.errors import ConfigError
from tutelage.models.config import check_vocabulary
from tutelage.models.folder import read_config, scores
from tutelage.models.open import load
from tutelage.models.open_scorer import load_scorer
from tutelage.models.scorer import Scorer, build_scorer
from tutelage.rundir import RunDir
from tutelage.setup import answers, trainer
from tutelage.setup.feedback import load_reward_data
from tutelage.setup.hyperparameters import ranks_sharing
from tutelage.setup.inputs import record_type
from tutelage.setup.methods import reward_method
from tutelage.setup.trainer import TrainingSpec
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.train import distributed

RATE_AT_7B = 9e-6  # Ouyang et al. 2022, appendix C.2: of a 6B model


def run(config: Reward, run: RunDir) -> dict[str, Any]:
    kind = record_type(run.input("data"))
    device = trainer.choose_device(config)
    start = run.input("model")
    words = TokenizerFolder.open(start)
    data = load_reward_data(config, run, kind, words)
    chosen = reward_method(config, data.kind, data.method)
    scorer = answers.wear_under_head(start_of(config, run, data.outputs, device), config, start, config.seed)
    check_vocabulary(scorer.config, words.vocab_size, start)
    length = answers.max_length(config, scorer)
    layout = answers.layout_for(config, scorer)
    train, held_out = data.prompt_groups("train", length), answers.held_out(lambda: data.prompt_groups("validation", length))
    assert train is not None
    steps = answers.steps_of(config, config.epochs, len(train))
    source = GroupSource(
        train, per_step=config.batch, micro_tokens=config.micro_tokens, layout=layout, seed=config.seed, unit=data.unit,
        rank=log.rank(), world=distributed.world(),
    )  # fmt: skip
    log.say("\n".join(source.describe()))
    rates = answers.rates(config, answers.size_of(scorer), RATE_AT_7B, heads=True)
    validation = None
    if held_out is not None:
        validation = GroupSource(held_out, per_step=1, micro_tokens=config.micro_tokens, layout=layout, seed=0, unit=data.unit)
    found: dict[str, Any] = {}

    def write() -> None:
        if held_out is not None:  # here, where the ranks of a sharded model are still together
            found.update(data.measured(scorer, held_out, layout, device))
        trainer.write_scores(scorer, run, start, words.stop_ids)

    work = TrainingSpec(
        parts={"reward": scorer},
        source=source,
        objective=chosen,
        steps=steps,
        rates=rates,
        shape=scorer.config.to_hf(),
        length=length,
        micro=(1, config.micro_tokens),
        tokens=float(train.sizes(layout).mean()) * config.batch * steps,
        numbers={"max_length": length, **asdict(rates)},
        write=write,
        validation=None if validation is None else validation.validation(),
    )
    facts = trainer.run_training(config, run, work, device)
    for line in data.told(found):
        log.say(line)
    return {**facts, "method": data.method, "outputs": list(data.outputs), "packing": train.report, "held_out": found or None}


def start_of(config: Reward, run: RunDir, outputs: tuple[str, ...], device: Any) -> Scorer:
    """A language model with a new head, or a scorer that goes on. Raises `ConfigError` for one with other outputs."""
    folder, where = run.input("model"), "cpu" if ranks_sharing(config) > 1 else device
    if not (is_scored(folder) or scores(read_config(whole_of(folder)))):
        log.say(f"a new score head: {', '.join(outputs)}")
        return build_scorer(load(folder, device=where), outputs, config.seed)
    scorer = load_scorer(folder, device=where)
    if len(scorer.outputs) != len(outputs):
        raise ConfigError(
            "this model gives other scores than the data has", field="model", found=", ".join(scorer.outputs),
            expected=", ".join(outputs), fix="start from the language model",
        )  # fmt: skip
    log.say(f"going on with a model that scores {', '.join(scorer.outputs)}")
    return scorer
