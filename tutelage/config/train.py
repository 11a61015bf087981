"""Settings of the training loop, shared by every method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field as Bound
from pydantic import model_validator

from tutelage.config.adapter import Adapter
from tutelage.config.base import Section, artifact, assign, build, setting
from tutelage.errors import ConfigError

Derived = Literal["derived"]
Share = Annotated[float, Bound(ge=0.0, le=1.0)]
Positive = Annotated[float, Bound(gt=0.0)]
Count = Annotated[int, Bound(ge=1)]
DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"


class Optimizer(Section):
    name: Literal["adamw", "muon"] = setting(
        "muon", "Optimizer. muon: Muon for matrices, AdamW for the rest and for adapters; adamw: AdamW for everything."
    )
    lr: Positive | Derived = setting(
        "derived",
        "Peak learning rate, derived from the model's size; matrix_lr and embedding_lr keep their derived ratio to"
        " it unless set.",
    )
    matrix_lr: Positive | Derived = setting(
        "derived", "Override: peak learning rate of Muon's matrices, in AdamW's scale (update RMS 0.2)."
    )
    embedding_lr: Positive | Derived = setting("derived", "Override: peak learning rate of the embedding table.")
    beta1: Share = setting(0.9, "AdamW's decay of the mean of gradients.")
    beta2: Share = setting(0.95, "AdamW's decay of the mean of squared gradients.")
    eps: Positive = setting(1e-8, "AdamW's addend to the root of the second moment.")
    momentum: Share = setting(0.95, "Momentum of Muon.")
    weight_decay: float = setting(0.1, "Decoupled weight decay of matrices; norms, biases and embeddings have none.", ge=0.0)
    clip: Positive | None = setting(1.0, "Largest global norm of the gradient; null: no clipping.")


class Schedule(Section):
    name: Literal["cosine", "linear", "wsd", "constant"] = setting("cosine", "Shape of the learning rate after warm-up.")
    warmup: float = setting(0.02, "Number of warm-up steps; below 1 a share of all steps.", ge=0.0)
    decay: Share = setting(0.2, "Share of all steps in the final linear decay (0 to 1), with wsd.")
    final: Share = setting(0.1, "Last learning rate as a share of the peak (0 to 1).")


def warmup_steps(schedule: Schedule, steps: int) -> int:
    """Steps of warm-up in a run of `steps`."""
    return round(schedule.warmup * steps) if schedule.warmup < 1 else int(schedule.warmup)


class Loop(Section):
    """Settings of every method that trains."""

    steps: Count | Derived = setting("derived", "Number of optimizer steps; derived: from tokens or epochs.")
    lr: Positive | None = setting(
        None,
        "Peak learning rate of all weights, short for optimizer.lr; rates of matrices and embeddings keep their ratio to it.",
    )
    optimizer: Optimizer = setting(Optimizer(), "Optimizer.")
    schedule: Schedule = setting(Schedule(), "Learning-rate schedule.")
    adapter: Adapter = setting(Adapter(), "Adapter: a few weights trained on a frozen base.")
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "Data type of matrix products; weights stay float32. bfloat16 pays only where the machine is faster with it."
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto", "Use of torch.compile; auto: on for CUDA, off for a CPU whose C++ kernels are available.", identity=False
    )
    kernels: bool = setting(True, "Use the C++ kernels where a compiler is found (results are equal to rounding).")
    checkpointing: Literal["none", "layer"] = setting(
        "none", "Activation checkpointing; layer: recompute each layer's activations in the backward pass.", identity=False
    )
    evaluate_every: int = setting(0, "Number of steps between validation losses; 0: ten times a run.", ge=0, identity=False)
    checkpoint_every: int = setting(
        0, "Number of steps between checkpoints; 0: about every 10 minutes, and at the end.", ge=0, identity=False
    )
    keep_checkpoints: Count = setting(2, "Number of checkpoints kept; older ones are removed.", identity=False)
    patience: int = setting(0, "Number of validations without a better loss after which training stops; 0: never.", ge=0)
    shard: Literal["none", "full"] = setting(
        "none",
        "Sharding over ranks. none: every rank holds the whole model; full: each rank holds its rows of weights, "
        "gradients and optimizer state.",
        identity=False,
    )
    device: str = setting(
        "auto", "Device: auto, cpu, cuda or cuda:1. auto takes a GPU where there is one.", identity=False, pattern=DEVICE
    )
    threads: int = setting(0, "Number of CPU threads; 0 uses all cores.", ge=0, identity=False)

    @model_validator(mode="after")
    def _one_peak(self) -> Self:
        """Raises `ConfigError` for a peak learning rate that is given twice."""
        other = self.optimizer.lr
        if self.lr is not None and other not in ("derived", self.lr):
            raise ConfigError(
                "the learning rate is given twice", field="lr", found=f"lr {self.lr:g} and optimizer.lr {other:g}",
                expected="one of them", fix="leave optimizer.lr out",
            )  # fmt: skip
        return self


class Train(Loop):
    """Training on rows of tokens."""

    extends: str | None = artifact(
        "Finished run of the same stage and settings to continue from its last checkpoint: weights, optimizer, data order.",
        kind="run",
        default=None,
    )
    sample_every: int = setting(0, "Number of steps between samples; 0: five times a run.", ge=0, identity=False)
    tokens: Positive | Derived = setting("derived", "Token budget; derived: from the size (20 tokens per parameter) or epochs.")
    epochs: Positive | None = setting(None, "Number of passes over the data, instead of a token budget.")
    sequence_length: Count | Derived = setting("derived", "Row length in tokens, at most the model's context.")
    batch_tokens: Count | Derived = setting("derived", "Tokens in a global batch (all ranks, all accumulation).")
    micro_rows: Count | Derived = setting(
        "derived", "Number of rows in one forward pass on one device; changes memory, not the result.", identity=False
    )
    packing: Literal["best_fit", "none"] = setting(
        "best_fit",
        "Packing of samples into rows. best_fit: several samples a row, isolated from one another; none: one sample a row.",
    )
    too_long: Literal["split", "drop", "left", "right"] = setting(
        "drop",
        "Treatment of a sample longer than a row: split it, drop it, or cut its left or right end. Always counted.",
    )
    evaluate_rows: Count = setting(
        64, "Number of validation rows used during the run (the evaluate stage uses all).", identity=False
    )


class Tune(Loop):
    """Training on answers: prompts, each with its judged answers."""

    optimizer: Optimizer = setting(Optimizer(name="adamw", weight_decay=0.0), "Optimizer.")
    schedule: Schedule = setting(Schedule(name="linear", warmup=0.1, final=0.0), "Learning-rate schedule.")
    batch: Count = setting(16, "Number of prompts, with their answers, in a global batch (all ranks, all accumulation).")
    max_length: Count | Derived = setting(
        "derived", "Longest prompt with one answer in tokens; derived: the model's context, at most 2048."
    )
    micro_tokens: Count = setting(
        4096, "Tokens in one forward pass on one device; changes memory, not the result.", identity=False
    )
    layout: Literal["tree", "packed", "rows"] = setting(
        "tree",
        "Layout of a batch. tree: a prompt is read once for all its answers; packed: texts one after another; "
        "rows: padded. Results are equal to rounding.",
        identity=False,
    )


def general_text() -> Any:
    return artifact(
        "Documents of the kind the checkpoint knows: a share is replayed, and the held-out part measures forgetting.",
        kind="records",
        default=None,
    )


def replay_share() -> Any:
    return setting(0.2, "Share of each step's tokens (0 to 1) that are general text; 0: forgetting is only measured.", ge=0, lt=1)


def replay_weight() -> Any:
    return setting(1.0, "Weight of the mean loss on replayed tokens, next to the mean loss of what is taught.")


def general_documents() -> Any:
    return setting(100, "Held-out general documents that are measured before and after; 0: all.", ge=0)


T = TypeVar("T", bound=Train)
HOW_FAR = {"steps": "derived", "tokens": "derived", "epochs": None}  # one of them ends a run; values of the others
MAY_CHANGE = (*HOW_FAR, "schedule")  # settings in which a child run may differ from its parent


def extended(config: T, run: str, changes: Mapping[str, Any]) -> T:
    """The settings of a child run that goes on from `run`, a run of `config`. `changes`, by dotted keys, say how far, and may
    be of the schedule. Raises `ConfigError`."""
    values: dict[str, Any] = {**config.model_dump(), **HOW_FAR, "extends": run}
    for key, value in changes.items():
        if key.partition(".")[0] not in MAY_CHANGE or key == "schedule":
            raise ConfigError(
                f"an extension can't change `{key}`",
                found=value,
                expected=f"one of: {', '.join(HOW_FAR)}, {', '.join(f'schedule.{k}' for k in Schedule.model_fields)}",
                fix="start a new run to change anything else",
            )
        assign(values, key, value)
    ends = [key for key in HOW_FAR if key in changes]
    if len(ends) != 1:
        raise ConfigError(
            "an extension says once how far it goes",
            found=", ".join(ends) or None,
            expected=f"one of: {', '.join(HOW_FAR)}",
            fix="for example --extend steps=2000, the number of all steps",
        )
    return build(type(config), values)
