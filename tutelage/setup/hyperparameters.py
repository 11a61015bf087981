"""Settings left to derive: from the size dial, the data and the start, each printed with its reason."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage import log
from tutelage.artifacts import whole_of
from tutelage.config.stages import Adapt, ExtendVocab
from tutelage.config.tasks import Classify, Translate
from tutelage.config.train import Loop, Train, warmup_steps
from tutelage.errors import ConfigError, Setting
from tutelage.plan.config_json import read_config_json
from tutelage.plan.parameters import count_config
from tutelage.plan.shape import Derived, derive
from tutelage.setup.extend import ParentRun

if TYPE_CHECKING:
    from tutelage.data.tokens.shards import Segments
    from tutelage.train.optim import LearningRates


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Settings with nothing left to derive."""

    steps: int
    sequence_length: int
    rows_per_step: int
    micro_rows: int
    rates: LearningRates

    @property
    def derived(self) -> dict[str, Any]:
        """What a child run takes over, by the names of the settings."""
        batch = self.rows_per_step * self.sequence_length
        return {"sequence_length": self.sequence_length, "batch_tokens": batch, **asdict(self.rates)}


MICRO_TOKENS = 4096  # tokens in one forward pass: on a CPU as fast as larger ones, and much leaner
KEPT = ("sequence_length", "batch_tokens", "lr", "matrix_lr", "embedding_lr")  # a child run takes them from its parent
FINE_TUNE_RATE, FINE_TUNE_AT = 2e-5, 7e9  # common practice for 7B; smaller models take more, by the square root

ADAPTER_RATES = {"lora": (10.0, 0.3), "dora": (10.0, 0.3), "ia3": (150.0, 0.0), "prompt": (1500.0, 0.0), "prefix": (500.0, 0.0)}
"""How much larger the rate of an adapter is at 7B, and how it grows for smaller models: common practice, checked at 1M."""


def _given(value: object) -> Any:
    return None if value == "derived" else value


def ranks_sharing(config: Loop) -> int:
    """How many ranks share one copy of weights, gradients and optimizer state."""
    return int(os.environ.get("WORLD_SIZE", "1")) if config.shard == "full" else 1


PASSES = 3, 10  # over texts, at least and at most
LEAST_STEPS = (
    60  # fewer hardly move a model: over 137 texts 3 passes taught an encoder to say the commonest class, 10 as much as 20
)


def passes(config: Classify | Translate, texts: float) -> float:
    """Passes over so many texts, where the settings do not say them: few texts are read more often, as Mosbach et al. found
    stable (2021, arXiv:2006.04884)."""
    if config.epochs != "derived":
        return config.epochs
    return min(PASSES[1], max(PASSES[0], LEAST_STEPS * min(config.batch, texts) / texts))


HEADS_APART = ("ia3", "prompt", "prefix")  # adapters whose rate is far above what a head that is trained beside them stands


def tuning_rates(config: Loop, at_7b: float, parameters: int, heads: bool = False) -> dict[str, tuple[float, str]]:
    """The rates by their settings, each with its reason, from one that is good for all weights of 7B. Tables that are trained
    beside an adapter take the rate of a trained model; so do score `heads` beside virtual tokens and factors."""
    found, whole = (tuning_rate(kind, at_7b, parameters) for kind in (config.adapter.kind, "none"))
    apart = heads and config.adapter.kind in HEADS_APART
    return {
        "lr": found, "matrix_lr": whole if apart else found,
        "embedding_lr": whole if apart or config.adapter.embeddings else found,
    }  # fmt: skip


def tuning_rate(kind: str, at_7b: float, parameters: int) -> tuple[float, str]:
    """The learning rate of a trained model, or of an adapter of this kind, and the reason."""
    factor, power = ADAPTER_RATES.get(kind, (1.0, 0.5))
    rate = round(at_7b * factor * (FINE_TUNE_AT / parameters) ** power, 8)
    times = "" if kind == "none" else f" x {factor:g}, for adapters of kind {kind},"
    grows = f" x (7B / {parameters / 1e6:.3g}M parameters)^{power:g}" if power else ""
    return rate, f"{at_7b:g}{times}{grows}{': a trained model moves in small steps' if kind == 'none' else ''}"


RATES = ("lr", "matrix_lr", "embedding_lr")


def explicit_rates(config: Loop) -> dict[str, float | None]:
    """The rates that the settings name; None for those left to derive."""
    out = {name: _given(getattr(config.optimizer, name)) for name in RATES}
    return out if config.lr is None else {**out, "lr": config.lr}


def scaled_rates(explicit: Mapping[str, float | None], derived: Mapping[str, tuple[float, str]]) -> dict[str, tuple[float, str]]:
    """All rates with their reasons. `lr` is the one dial: a derived rate keeps its ratio to the derived `lr`."""
    peak = explicit["lr"]
    ratio = 1.0 if peak is None else peak / derived["lr"][0]
    out = {}
    for name, (rate, reason) in derived.items():
        value = explicit[name]
        if value is not None:
            out[name] = value, "given"
        elif peak is None:
            out[name] = rate, reason
        else:
            out[name] = rate * ratio, f"{rate / derived['lr'][0]:g} x lr, the ratio of the derived rates"
    return out


def said_rates(config: Loop, derived: Mapping[str, tuple[float, str]]) -> LearningRates:
    """The rates of a stage; prints those that were derived, each with its reason."""
    from tutelage.train.optim import LearningRates

    explicit = explicit_rates(config)
    found = scaled_rates(explicit, derived)
    for rate, reason in dict.fromkeys(found[name] for name in RATES if explicit[name] is None):
        log.say(f"learning rate {rate:.3g}: {reason}; set lr to change it")
    return LearningRates(**{name: rate for name, (rate, _) in found.items()})


def learnt_share(config: Train) -> float:
    """The share of rows that are of `data`: an epoch is a pass over these, however many others are between them."""
    return 1.0 - config.replay_share if isinstance(config, Adapt) and config.general is not None else 1.0


def new_tokens(config: Train) -> int:
    """How many tokens a stage adds to its model's vocabulary, at most."""
    return config.vocab_add if isinstance(config, Adapt) else config.add if isinstance(config, ExtendVocab) else 0


def derive_all(
    config: Train,
    vocabulary: int,
    corpus_tokens: int | None,
    start: Path | None,
    begun: Mapping[str, Any] | None = None,
    parent: ParentRun | None = None,
) -> Derived:
    """What the size, or the checkpoint in `start` or of the shape `begun`, stands for, with all that the config gives. A child
    run keeps what was derived for its `parent`. Raises `ConfigError`."""
    given = {
        "sequence_length": _given(config.sequence_length),
        "batch_tokens": _given(config.batch_tokens),
        "steps": _given(config.steps),
        "tokens": _given(config.tokens),
        **explicit_rates(config),
        "weight_decay": config.optimizer.weight_decay,
    }
    epochs = config.epochs if given["steps"] is None and given["tokens"] is None else None
    if corpus_tokens is not None:
        corpus_tokens = round(corpus_tokens / learnt_share(config))
    size, architecture = getattr(config, "size", "3m"), dict(getattr(config, "architecture", {}))
    because: dict[str, str] = {}
    if parent is not None:
        because = {key: f"as in {parent.name}" for key in KEPT if given[key] is None}
        given.update({key: parent.numbers[key] for key in because})
    if start is not None or begun is not None:
        raw = dict(begun) if begun is not None else read_config_json(whole_of(start) / "config.json")  # type: ignore[arg-type]
        architecture = raw
        parameters = count_config(raw).total
        size = str(parameters)
        derived_rates = tuning_rates(config, FINE_TUNE_RATE, parameters)
        for key, (rate, reason) in scaled_rates({name: given[name] for name in RATES}, derived_rates).items():
            if given[key] is None:
                given[key], because[key] = rate, reason
        if given["sequence_length"] is None:
            because["sequence_length"] = "the checkpoint's context, at most 2048"
            given["sequence_length"] = min(raw.get("max_position_embeddings", 2048) - before(config), 2048)
    found = derive(size, vocabulary, architecture=architecture, epochs=epochs, corpus_tokens=corpus_tokens, **given)
    if parent is not None and found.values["steps"] <= parent.steps:
        raise ConfigError(
            "a run can be extended only to more steps",
            field="steps",
            found=found.values["steps"],
            expected=f"more than {parent.steps}, the steps of {parent.name}",
            fix=f"ask for all steps together: {Setting('steps', str(parent.steps + max(1, parent.steps // 2)))} trains on for "
            "half as many again",
        )
    warm = config.schedule.warmup
    values = {**found.values, "warmup_steps": warmup_steps(config.schedule, int(found.values["steps"]))}
    because["warmup_steps"] = f"schedule.warmup {warm:g}{' of the steps' if warm < 1 else ''}"
    because["weight_decay"] = "optimizer.weight_decay"
    return replace(found, values=values, because={**found.because, **because}, given=found.given - because.keys())


def derive_numbers(
    config: Train, vocabulary: int, segments: Segments, start: Path | None, parent: ParentRun | None
) -> tuple[Hyperparameters, dict[str, Any]]:
    """All numbers of a run and the architecture of a new model. Prints the table of derivations."""
    from tutelage.train.optim import LearningRates

    found = derive_all(config, vocabulary, segments.totals["tokens"], start, parent=parent)
    log.console.print(found.table())
    check_context(found, before(config))
    values = found.values
    row = int(values["sequence_length"])
    rows = max(1, int(values["batch_tokens"]) // row)
    rates = LearningRates(float(values["lr"]), float(values["matrix_lr"]), float(values["embedding_lr"]))
    return Hyperparameters(int(values["steps"]), row, rows, micro_rows(config, found), rates), found.architecture


def before(config: Loop) -> int:
    """Virtual tokens that stand before every text."""
    return config.adapter.tokens if config.adapter.kind in ("prompt", "prefix") else 0


def check_context(found: Derived, virtual: int = 0) -> None:
    """Raises `ConfigError` for rows that are longer than the model's context, `virtual` tokens of which are taken."""
    row = int(found.values["sequence_length"])
    context = int(found.architecture.get("max_position_embeddings", row + virtual)) - virtual
    if row > context:
        raise ConfigError(
            "rows longer than the model's context",
            field="sequence_length",
            found=row,
            expected=f"at most {context}{f', behind {virtual} virtual tokens' if virtual else ''}",
            fix="lower sequence_length, or set architecture.max_position_embeddings for a new model",
        )


def micro_rows(config: Train, found: Derived) -> int:
    """Rows in one forward pass."""
    row = int(found.values["sequence_length"])
    rows = max(1, int(found.values["batch_tokens"]) // row)
    return max(1, min(rows, MICRO_TOKENS // row)) if config.micro_rows == "derived" else config.micro_rows
