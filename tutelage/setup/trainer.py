"""What every stage that trains shares: from parts, batches and an objective to a finished run. It knows no method."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tutelage import log
from tutelage.artifacts import is_adapter
from tutelage.config.base import identity_of
from tutelage.config.train import Loop
from tutelage.data.tokens.loader import Source
from tutelage.errors import ConfigError, Setting
from tutelage.models import kernels
from tutelage.models.adapters.attach import adapter_of
from tutelage.models.adapters.folder import save_adapter
from tutelage.models.adapters.merge import merge
from tutelage.models.adapters.score_heads import VIRTUAL, save_scored
from tutelage.models.adapters.start import start_with_adapter
from tutelage.models.export import save
from tutelage.models.interface import Batch
from tutelage.models.open import load
from tutelage.models.scorer import Scorer
from tutelage.models.scorer_export import save_scorer
from tutelage.models.shard import is_sharded, shard
from tutelage.objectives import Objective
from tutelage.plan.energy import energy
from tutelage.plan.machine import measure as measure_machine
from tutelage.rundir import RunDir
from tutelage.setup.extend import ParentRun, start_of
from tutelage.setup.hyperparameters import ranks_sharing
from tutelage.setup.run_plan import operations, say_plan
from tutelage.train import distributed, hooks
from tutelage.train.loop import Hook, Job, State, train
from tutelage.train.optim import LearningRates, Optimizers
from tutelage.train.step import StepConfig


@dataclass(slots=True, kw_only=True)
class TrainingSpec:
    """What one training stage brings to the loop."""

    parts: dict[str, nn.Module]  # what is trained, and frozen parts that the objective asks
    source: Source
    objective: Objective
    steps: int
    rates: LearningRates
    shape: dict[str, Any]  # config.json of the model, for the count of its operations
    length: int  # tokens of a text, for the same
    micro: tuple[int, int]  # rows and tokens of a row in the largest forward pass
    tokens: float  # that all steps read, about: for the plan
    numbers: Mapping[str, Any]  # with the settings and inputs, what a resumed run must have in common with its first attempt
    write: Callable[[], None]  # writes what the run is for; called on every rank
    weights: dict[str, float] = field(default_factory=dict)  # of the objective's terms
    validation: tuple[list[Batch], dict[str, float]] | None = None
    per_byte: float = 0.0  # supervised tokens of the validation a byte of its text
    hooks: Callable[[Job], dict[str, Hook]] = lambda job: {}  # beside the common ones, made when the job is there
    headline: Callable[[], str] | None = None  # the number to show while it trains, where that is not the loss
    beside: dict[str, int] = field(default_factory=dict)  # bytes of what is held beside the parts, by name: for the plan
    forward_share: float = 0.0  # work beside training, as a share of it: rollouts, a teacher


def run_training(
    config: Loop, run: RunDir, work: TrainingSpec, device: torch.device, parent: ParentRun | None = None
) -> dict[str, Any]:
    """Trains in the run's folder, resuming what is there, lets `work` write its artifact and returns the facts of the run."""
    for part in work.parts.values():
        part.train(any(p.requires_grad for p in part.parameters()))
        part.checkpointing = config.checkpointing  # type: ignore[assignment]
        compile_model(part, config, device)
    distributed.start(str(device))
    for part in work.parts.values():
        place(part, config, device)
    machine = measure_machine()
    say_plan(config, work, machine, device)
    job = Job(
        recipe=StepConfig(
            work.parts, work.objective, work.weights, clip=config.optimizer.clip, dtype=getattr(torch, config.dtype),
            device=device,
        ),
        source=work.source,
        optimizers=Optimizers(work.parts, config.optimizer, work.rates),
        schedule=config.schedule,
        steps=work.steps,
        folder=run.path,
        metrics=log.Metrics(run.folder("metrics.jsonl")),
        identity=identity(config, run, work),
        flops_per_token=operations(config, work),
        peak_flops=machine.peak_flops(str(device), config.dtype),
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=config.keep_checkpoints,
        start_from=start_of(run, parent) if parent else None,
    )  # fmt: skip
    job.hooks = make_hooks(config, job, run, work)
    try:
        state = train(job)
        if log.rank() == 0 or any(is_sharded(part) for part in work.parts.values()):
            work.write()
    finally:
        job.metrics.close()
        distributed.stop()
    return facts(state, work.shape, work.numbers, machine.cpu, parent)


def choose_device(config: Any) -> torch.device:
    """Sets threads and kernels and says what was chosen."""
    if getattr(config, "threads", 0):
        torch.set_num_threads(config.threads)
    kernels.use(getattr(config, "kernels", True))
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "no CUDA device here",
            field="device",
            found=name,
            fix=f"use {Setting('device', 'cpu')}, or install a CUDA build of torch",
        )
    if name == "cuda" and distributed.world() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(name)
    if name == "cpu":
        reason = kernels.why_not()
        log.say(f"CPU, {torch.get_num_threads()} threads, {'own kernels' if not reason else f'plain torch ({reason})'}")
    return torch.device(name)


def load_start(folder: Path, config: Loop, device: torch.device, seed: int = 0) -> Any:
    """The model that a run goes on from: on the device, or in the CPU's memory where no device has to hold all of it. With a new
    adapter, or with the one in `folder`, where the settings ask for one."""
    where = torch.device("cpu") if ranks_sharing(config) > 1 else device
    if config.adapter.kind == "none":
        if is_adapter(folder):
            log.say("the adapter becomes part of its base, and all weights are trained; to train it on, set adapter.kind")
        return load(folder, device=where)
    return start_with_adapter(folder, config.adapter, where, seed, sharded=ranks_sharing(config) > 1)


def write_model(model: Any, run: RunDir, tokenizer: Path, stop_ids: Sequence[int] = ()) -> None:
    """Writes `model/`, or of a model with an adapter `adapter/`, with the files of `tokenizer`. Called on every rank."""
    if adapter_of(model) is None:
        save(model, run.folder("model"), tokenizer, stop_ids=stop_ids)
        return
    save_adapter(model, run.folder("adapter"), base=model.attached_adapter.base, tokenizer=tokenizer)


def write_scores(part: Any, run: RunDir, tokenizer: Path, stop_ids: Sequence[int] = ()) -> None:
    """Writes `model/` with its score head; under virtual tokens, which can't be merged, `adapter/`."""
    wearing = adapter_of(part)
    if wearing is not None and wearing.config.kind in VIRTUAL:
        save_scored(part, run.folder("adapter"), base=wearing.base or tokenizer, tokenizer=tokenizer)
        return
    if wearing is not None:
        merge(part)
    if isinstance(part, Scorer):
        save_scorer(part, run.folder("model"), tokenizer, stop_ids=stop_ids)
    else:
        save(part, run.folder("model"), tokenizer)


def result_of(config: Loop, run: RunDir) -> Path:
    """What `write_model` wrote: the folder of a model, or of an adapter."""
    return run.folder("model" if config.adapter.kind == "none" else "adapter")


def compile_model(model: nn.Module, config: Loop, device: torch.device) -> None:
    """Compiles in place where it pays, and says why not where it does not."""
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        model.compile()
        log.say("torch.compile: on; the first steps are slow while it compiles")
    elif device.type == "cpu" and config.compile == "auto" and kernels.available():
        log.say("torch.compile: off on this CPU, our kernels are faster and need no compile")
    elif device.type == "cpu" and config.compile == "auto":
        log.say(f"torch.compile: off on this CPU, no own kernels either ({kernels.why_not()})")


def place(model: nn.Module, config: Loop, device: torch.device) -> None:
    """Moves the model to the device: all of it, or this rank's rows."""
    if ranks_sharing(config) > 1:
        shard(model, device)
        log.say(f"shard: full, each of {distributed.world()} ranks holds its rows of every tensor")
        return
    model.to(device)
    if config.shard == "full":
        log.say("shard: full changes nothing, there is one rank; start several with torchrun")


def identity(config: Loop, run: RunDir, work: TrainingSpec) -> str:
    """Digest of what may not change between the attempts of a run."""
    covered = {
        "config": identity_of(config),
        "inputs": {n: a.digest for n, a in run.inputs.items()},
        "numbers": {"steps": work.steps, **work.numbers},
    }
    return hashlib.sha256(json.dumps(covered, sort_keys=True, default=str).encode()).hexdigest()[:16]


def make_hooks(config: Loop, job: Job, run: RunDir, work: TrainingSpec) -> dict[str, Hook]:
    display = hooks.Display(run.path.name.rsplit("-", 1)[0], headline=work.headline)
    out: dict[str, Hook] = {"record": hooks.Record(), "display": display}
    validate = None
    if work.validation is not None:
        every = config.evaluate_every or max(1, math.ceil(work.steps / 10))
        validate = hooks.Validate(*work.validation, every, work.per_byte)
        out["validate"] = validate
        if config.patience:
            out["early_stop"] = hooks.EarlyStop(validate, config.patience, run.folder("best"))
    elif config.patience:
        log.say("patience: nothing is held out, so all steps are trained", style="yellow")
    out |= work.hooks(job)
    out["tensorboard"] = hooks.TensorBoard(validate)
    return out


def facts(state: State, shape: dict[str, Any], numbers: Mapping[str, Any], cpu: str, parent: ParentRun | None) -> dict[str, Any]:
    """The run's numbers for run.json. Those of a child run include its parent's, but for the energy, which chains add up."""
    progress = state.progress
    own_seconds = progress.seconds - (parent.facts["train_seconds"] if parent else 0.0)
    validate = state.job.hooks.get("validate")
    out: dict[str, Any] = {
        "steps": progress.step,
        "tokens": progress.tokens,
        "train_seconds": round(progress.seconds, 2),
        "flops": progress.flops,
        "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9), 1),
        "mfu": round(progress.flops / max(progress.seconds, 1e-9) / state.job.peak_flops, 4) if state.job.peak_flops else None,
        "loss": progress.loss,
        "stopped_early": state.stop,
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "shape": shape,
        "energy": energy(max(0.0, own_seconds), cpu).to_json(),  # the parent's seconds are rounded
        "numbers": dict(numbers),
    }
    if parent is not None:
        out["extended_from"] = {"run": parent.name, "step": parent.steps}
    if isinstance(validate, hooks.Validate) and validate.latest is not None:
        out["validation_loss"] = validate.latest
        out |= {f"validation_{name.removeprefix('_')}": value for name, value in validate.terms.items() if name != "loss"}
        if validate.tokens_per_byte:
            out["bits_per_byte_in_run"] = validate.latest / math.log(2) * validate.tokens_per_byte
    return out
