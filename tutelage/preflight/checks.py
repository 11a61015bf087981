"""Configuration errors that need no data or model: every stage of a recipe is checked before the first one runs, so that the
seventh does not fail hours later. One function per stage, found by its name; each raises `ConfigError`, `MissingExtra` or
`SandboxError`.

Without torch, but for the settings of an objective.
"""

from __future__ import annotations

from typing import Any

from tutelage.chat.templates import style
from tutelage.config.base import Section
from tutelage.config.rewards import Environment, RewardModel, terms_of
from tutelage.config.stages import (
    Adapt,
    Data,
    Distil,
    Evaluate,
    ExtendVocab,
    Merge,
    Preference,
    Pretrain,
    Reward,
    Rl,
    Sample,
    Select,
    Sft,
)
from tutelage.config.tasks import Classify, Translate
from tutelage.config.train import Loop
from tutelage.errors import ConfigError, Setting
from tutelage.objectives import TABLE
from tutelage.preflight.unused_settings import reject_unused
from tutelage.recipe import Planned
from tutelage.records import RECORD_TYPES
from tutelage.rewards.build import build
from tutelage.rollout.environments import Environments
from tutelage.rollout.tools import tools_of
from tutelage.rollout.weights import compares_groups
from tutelage.setup.hyperparameters import ranks_sharing
from tutelage.setup.inputs import record_type, require_record_type
from tutelage.setup.methods import policy_method, preference_method, reward_method

WITHOUT = ("model", "data", "add", "rows", "train", "adapter", "shard", "device", "threads", "kernels")  # of train=false
OFF_POLICY = (  # settings of a distillation that are about given texts
    "extends", "tokens", "sequence_length", "batch_tokens", "micro_rows", "packing", "too_long", "evaluate_rows",
    "evaluate_every", "sample_every", "patience", "cross_entropy", "top_k", "rest",
)  # fmt: skip


def data(planned: Planned) -> None:
    config = planned.config
    assert isinstance(config, Data)
    idle = ("fields",) if config.kind == "documents" else (
        "text_field", "split", "chunk_chars", "min_chars", "normalise", "clean", "boilerplate",
    )  # fmt: skip
    only = () if config.kind == "conversations" else ("format",)
    reject_unused(config, {f"{Setting('kind', config.kind)}": (*idle, *only)})


def pretrain(planned: Planned) -> None:
    """A pretraining has exactly one of `tokenizer` and `model`, and with an adapter `model`."""
    config = planned.config
    assert isinstance(config, Pretrain)
    if config.model is None and config.adapter.kind != "none":
        raise ConfigError(
            "an adapter needs a trained base", field="adapter.kind", found=config.adapter.kind, expected="`model` to put it on",
            fix="set model, or train a new model first without an adapter",
        )  # fmt: skip
    if (config.model is None) == (config.tokenizer is None):
        raise ConfigError(
            "`tokenizer` and `model` exclude each other" if config.model else "`tokenizer` or `model` is required",
            field="tokenizer", expected="a tokenizer folder to train from scratch, or a model folder to go on from, not both",
            fix="a tokenizer comes from `tutelage tokenizer --data RECORDS`, or from any Hugging Face folder",
        )  # fmt: skip
    if config.model is not None:
        for name in ("size", "architecture"):
            if (given := getattr(config, name)) != Pretrain.model_fields[name].default:
                raise ConfigError(
                    "a trained model has its own shape", field=name, found=given, expected="`tokenizer`, for a new model",
                    fix=f"leave {name} out to go on from {config.model}",
                )  # fmt: skip

    _reads(planned, "data", "Document", "Conversation")


def sft(planned: Planned) -> None:
    config = planned.config
    assert isinstance(config, Sft)
    if config.template is not None:
        style(config.template)
    _reads(planned, "data", "Conversation")
    _replay(planned)


def extend_vocab(planned: Planned) -> None:
    config = planned.config
    assert isinstance(config, ExtendVocab)
    unused = () if config.train else [n for n in type(config).model_fields if n not in WITHOUT]
    reject_unused(config, {f"{Setting('train', 'false')}": unused})
    _no_adapter(config, "the new rows of the tables are what is trained")
    if config.train and ranks_sharing(config) > 1:
        raise ConfigError(
            "rows of a table can't be trained alone where ranks share the table", field="shard", found=config.shard,
            expected="none", fix=f"run `tutelage extend-vocab` with {Setting('shard', 'none')} or {Setting('train', 'false')}, "
            "then train its model in shards",
        )  # fmt: skip
    _reads(planned, "data", "Document")


def adapt(planned: Planned) -> None:
    config = planned.config
    assert isinstance(config, Adapt)
    reject_unused(
        config,
        {
            f"{Setting('vocab_add', '0')}": () if config.vocab_add else ("rows", "warm_steps"),
            "no general text": () if config.general else ("replay_share",),
        },
    )
    _reads(planned, "data", "Document")
    _reads(planned, "general", "Document")


def distil(planned: Planned) -> None:
    config = planned.config
    assert isinstance(config, Distil)
    reject_unused(
        config,
        {
            f"{Setting('policy', config.policy)}": ("rollouts",) if config.policy == "off" else OFF_POLICY,
            f"{Setting('top_k', '0')}": ("rest",) * (not config.top_k),
        },
    )


def select(planned: Planned) -> None:
    config = planned.config
    assert isinstance(config, Select)
    unused = ("margin",) if config.make == "conversations" else ("threshold", "keep")
    reject_unused(config, {f"{Setting('make', config.make)}": unused})
    _reads(planned, "answers", "Rollout")
    _reads(planned, "data", "Prompt", "Conversation")


def reward(planned: Planned) -> None:
    """Where the method is not left to the data."""
    config = planned.config
    assert isinstance(config, Reward)
    if config.method is not None:
        reward_method(config, None, config.method)
    _reads(planned, "data", "Preference", "Rating")


def preference(planned: Planned) -> None:
    config = planned.config
    assert isinstance(config, Preference)
    preference_method(config)
    _reads(planned, "data", "Rating" if TABLE[config.method].data == "ratings" else "Preference")
    _replay(planned)


def sample(planned: Planned) -> None:
    config = planned.config
    assert isinstance(config, Sample)
    _reads(planned, "data", "Prompt", "Conversation")
    _rewards(config)


def rl(planned: Planned) -> None:
    config = planned.config
    assert isinstance(config, Rl)
    policy_method(config)
    if compares_groups(config.method) and config.samples < 2:
        raise ConfigError(
            "one answer has nothing to be compared with", field="samples", found=1, expected=f"2 or more for {config.method}"
        )
    if config.shard == "full":
        raise ConfigError("answers can't be made by a model in shards yet", field="shard", found="full", expected="none")
    ppo, several = config.method == "ppo", bool(config.tools or config.environment)
    idle = {
        f"{Setting('kl', '0')}": ("reference", "kl_in", "kl_estimator") if config.kl == 0 else (),
        f"{Setting('truncated', config.truncated)}": ("penalty",) if config.truncated != "penalise" else (),
        f"{Setting('correction', 'none')}": ("correction_cap", "correction_level") if config.correction == "none" else (),
        "no tools and no environment": () if several else ("max_rounds",),
        "no environment": () if config.environment else ("environment_seconds",),
        f"{Setting('method', config.method)}": () if ppo else ("value", "gamma", "lam", "value_weight"),
        "": ("patience",),
    }
    reject_unused(config, idle)
    _reads(planned, "data", "Prompt", "Conversation")
    tools_of(config.tools)
    if config.environment:
        Environments(config.environment, config.environment_seconds).close()
    _rewards(config)
    _replay(planned)


def _rewards(config: Rl | Sample) -> None:
    """Every term is made once: a library that is missing, a function that cannot be imported, walls that do not hold; and a
    reward model is there where it is asked, and only there."""
    terms = terms_of(config.rewards)
    asked = any(isinstance(term, RewardModel) for term in terms.values())
    if asked and config.reward_model is None:
        raise ConfigError("a reward of the kind `model` needs one", field="reward_model", fix="train one: tutelage reward")
    if config.reward_model is not None and not asked:
        raise ConfigError("no reward asks it", field="reward_model", found=config.reward_model, fix="add rewards: {model: 1}")
    if any(isinstance(term, Environment) for term in terms.values()) and not getattr(config, "environment", None):
        raise ConfigError(
            "a reward of the kind `environment` needs one", field="environment", expected="module:Class, with `tutelage rl`"
        )
    if not any(term.weight for term in terms.values()):
        raise ConfigError(
            "all weights are 0, so every answer would be worth the same", field="rewards", found=config.rewards,
            expected="a weight for at least one term, such as {exact: 1}",
        )  # fmt: skip
    with build(terms, score_texts=lambda texts: [], asked=lambda rollout: ""):
        pass


def classify(planned: Planned) -> None:
    config = planned.config
    assert isinstance(config, Classify)
    given = [name for name in ("encoder", "model", "tokenizer") if getattr(config, name)]
    if len(given) != 1:
        raise ConfigError(
            "a classifier starts from one model, or from a tokenizer and nothing else", field="encoder",
            found=", ".join(given) or None, expected="`encoder`: a folder of the BERT family; `model`: a decoder; or "
            "`tokenizer`: a small encoder from scratch",
        )  # fmt: skip
    if config.folds == 1:
        raise ConfigError("not a number of folds", field="folds", found=1, expected="0, or 2 and more")
    _reads(planned, "data", "Example")
    _texts(config)


def translate(planned: Planned) -> None:
    config = planned.config
    assert isinstance(config, Translate)
    if (config.model is None) == (config.tokenizer is None):
        raise ConfigError(
            "a translator starts from a model, or from a tokenizer and nothing else", field="model",
            found="both" if config.model else None, expected="`model`: an encoder-decoder's folder; or `tokenizer`: a small T5",
        )  # fmt: skip
    _reads(planned, "data", "Conversation")
    _texts(config)


def evaluate(planned: Planned) -> None:
    config = planned.config
    assert isinstance(config, Evaluate)
    if config.documents is None and config.questions is None:
        raise ConfigError(
            "nothing to measure", field="documents", expected="documents, questions, or both", fix="set documents or questions"
        )
    _reads(planned, "documents", "Document")
    _reads(planned, "questions", "Conversation")


def merge(planned: Planned) -> None:
    """An adapter that is still to be trained is one."""
    assert isinstance(planned.config, Merge)
    maker = planned.waits_for.get("adapter")
    if maker is not None and isinstance(maker.config, Loop) and maker.config.adapter.kind == "none":
        raise ConfigError(
            f"`{maker.name}` trains a whole model, not an adapter", field="adapter", found=f"adapter.kind=none in {maker.name}",
            expected=f"a stage with {Setting('adapter.kind', 'lora')}, or with the kind dora or ia3",
        )  # fmt: skip


def _texts(config: Classify | Translate) -> None:
    """The model is asked when it has been trained, and one from scratch has a shape of its own and no adapter."""
    if ranks_sharing(config) > 1:
        raise ConfigError(
            "this model is asked after its training, which it can't be in shards", field="shard", found=config.shard,
            expected="none: every rank holds the model, and reads its share of the batches",
        )  # fmt: skip
    if config.architecture and config.tokenizer is None:
        raise ConfigError(
            "a trained model has its own architecture", field="architecture", found=config.architecture,
            expected="`tokenizer`, and nothing to start from: for a model from scratch", fix="leave architecture out",
        )  # fmt: skip
    if config.tokenizer:
        _no_adapter(config, "there is no trained base")


def _no_adapter(config: Loop, why: str) -> None:
    if config.adapter.kind != "none":
        raise ConfigError(f"no adapter is trained here: {why}", field="adapter.kind", found=config.adapter.kind, expected="none")


def _replay(planned: Planned) -> None:
    """General text is documents, and settings of replay are used."""
    config: Any = planned.config
    unused = () if config.general else ("replay_share", "replay_weight", "max_documents")
    reject_unused(config, {"no general text": unused, "replay_share=0": () if config.replay_share else ("replay_weight",)})
    _reads(planned, "general", "Document")


def _reads(planned: Planned, key: str, *wanted: str) -> None:
    """Records of the input `key` are of a type that the stage reads, be they there or still to be made. Raises `DataError`."""
    maker = planned.waits_for.get(key)
    if maker is None and key in planned.inputs:
        require_record_type(record_type(planned.inputs[key].path), wanted, field=key, file=planned.inputs[key].path)
    elif maker is not None and (made := _made_by(maker.config)):
        require_record_type(made, wanted, field=key, maker=maker.name)


def _made_by(config: Section) -> str | None:
    """The type of the records that a stage makes."""
    if isinstance(config, Data):
        return RECORD_TYPES[config.kind]
    if isinstance(config, Select):
        return "Preference" if config.make == "preferences" else "Conversation"
    return "Rollout" if isinstance(config, Sample) else None
