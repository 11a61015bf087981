"""What `pretrain` and `sft` share: from settings, a model and tokens to a finished run with its model folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tutelage import log
from tutelage.config.base import identity_of
from tutelage.config.train import Train
from tutelage.data.loader import StaticSource, eval_batches
from tutelage.data.render import check_supervision
from tutelage.data.tokens import Segments
from tutelage.errors import ConfigError
from tutelage.models import kernels
from tutelage.models.config import check_vocabulary
from tutelage.models.export import save as save_model
from tutelage.models.load import load
from tutelage.models.shard import is_sharded, shard
from tutelage.objectives import objective
from tutelage.plan.energy import energy
from tutelage.plan.flops import train_flops_per_token
from tutelage.plan.machine import Machine
from tutelage.plan.machine import measure as measure_machine
from tutelage.plan.memory import estimate as memory
from tutelage.plan.time import explain
from tutelage.rundir import RunDir
from tutelage.stages.derived import ranks_sharing
from tutelage.stages.extension import Parent, say_rate, start_of
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.train import distributed, hooks
from tutelage.train.loop import Hook, Job, State, train
from tutelage.train.optim import Optimizers, Rates
from tutelage.train.step import Recipe


@dataclass(frozen=True, slots=True)
class Numbers:
    """Settings with nothing left to derive."""

    steps: int
    sequence_length: int
    rows_per_step: int
    micro_rows: int
    rates: Rates

    @property
    def derived(self) -> dict[str, Any]:
        """What a child run takes over, by the names of the settings."""
        batch = self.rows_per_step * self.sequence_length
        return {"sequence_length": self.sequence_length, "batch_tokens": batch, **asdict(self.rates)}


def choose_device(config: Any) -> torch.device:
    """Sets threads and kernels and says what was chosen."""
    if getattr(config, "threads", 0):
        torch.set_num_threads(config.threads)
    kernels.use(getattr(config, "kernels", True))
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "no CUDA device here", field="device", found=name, fix="use device=cpu, or install a CUDA build of torch"
        )
    if name == "cuda" and distributed.world() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(name)
    if name == "cpu":
        reason = kernels.why_not()
        log.say(f"CPU, {torch.get_num_threads()} threads, {'own kernels' if not reason else f'plain torch ({reason})'}")
    return torch.device(name)


def compile_model(model: torch.nn.Module, config: Train, device: torch.device) -> None:
    """Compiles in place where it pays, and says why not where it does not."""
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        model.compile()
        log.say("torch.compile: on; the first steps are slow while it compiles")
    elif device.type == "cpu" and config.compile == "auto" and kernels.available():
        log.say("torch.compile: off on this CPU, our kernels are faster and need no compile")
    elif device.type == "cpu" and config.compile == "auto":
        log.say(f"torch.compile: off on this CPU, no own kernels either ({kernels.why_not()})")


def load_start(folder: Path, config: Train, device: torch.device) -> Any:
    """The model that a run goes on from: on the device, or in the CPU's memory where no device has to hold all of it."""
    return load(folder, device="cpu" if ranks_sharing(config) > 1 else device)


def place(model: torch.nn.Module, config: Train, device: torch.device) -> None:
    """Moves the model to the device: all of it, or this rank's rows."""
    if ranks_sharing(config) > 1:
        shard(model, device)
        log.say(f"shard: full, each of {distributed.world()} ranks holds its rows of every tensor")
        return
    model.to(device)
    if config.shard == "full":
        log.say("shard: full changes nothing, there is one rank; start several with torchrun")


def open_segments(config: Train, run: RunDir, tokenizer: Path, vocabulary: int) -> tuple[Segments, Segments]:
    """Tokens of the input, made now or found, as (train, validation)."""
    assert run.nested is not None
    tokens = run.nested("tokens", {"data": str(run.input("data")), "tokenizer": str(tokenizer)})
    folder = tokens.path / "tokens"
    return tuple(Segments.open(folder / split, vocabulary=vocabulary) for split in ("train", "validation"))  # type: ignore[return-value]


def train_model(
    config: Train,
    run: RunDir,
    model: Any,
    segments: tuple[Segments, Segments],
    tokenizer: Path,
    numbers: Numbers,
    device: torch.device,
    parent: Parent | None,
) -> dict[str, Any]:
    """Trains `model` in the run's folder, on from the last step of `parent` if there is one, writes `model/`, returns the facts
    of the run."""
    totals = segments[0].totals
    if segments[0].kind == "chat":  # a segment's first token is never a target
        check_supervision(totals["supervised"], totals["tokens"] - totals["segments"], "chat")
    words = TokenizerFolder.open(tokenizer)
    check_vocabulary(model.config, words.vocab_size, tokenizer)
    model.train()
    model.checkpointing = config.checkpointing
    compile_model(model, config, device)
    distributed.start(str(device))
    place(model, config, device)
    source = make_source(config, run, segments[0], numbers)
    parts = {"policy": model}
    shape = model.config.to_hf()
    machine = measure_machine()
    if parent is not None:
        say_rate(parent, config, numbers.steps)
    say_plan(config, numbers, shape, machine, device, parent.steps if parent else 0)
    job = Job(
        recipe=Recipe(
            parts, objective("next_token"), clip=config.optimizer.clip, dtype=getattr(torch, config.dtype), device=device
        ),
        source=source,
        optimizers=Optimizers(parts, config.optimizer, numbers.rates),
        schedule=config.schedule,
        steps=numbers.steps,
        folder=run.path,
        metrics=log.Metrics(run.folder("metrics.jsonl")),
        identity=identity(config, run, numbers),
        flops_per_token=train_flops_per_token(shape, numbers.sequence_length),
        peak_flops=machine.peak_flops(str(device), config.dtype),
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=config.keep_checkpoints,
        start_from=start_of(run, parent) if parent else None,
    )
    job.hooks = make_hooks(config, job, run, model, words, segments[1], numbers)
    try:
        state = train(job)
        if log.rank() == 0 or is_sharded(model):
            save_model(model, run.folder("model"), tokenizer, stop_ids=words.stop_ids)
    finally:
        job.metrics.close()
        distributed.stop()
    return facts(state, shape, machine.cpu, numbers, parent)


def make_source(config: Train, run: RunDir, segments: Segments, numbers: Numbers) -> StaticSource:
    """The batches of this rank. Says what they are made of and what packing did."""
    source = StaticSource(
        segments,
        row_length=numbers.sequence_length,
        rows_per_step=numbers.rows_per_step,
        micro_rows=numbers.micro_rows,
        seed=run.seed,
        policy=config.too_long,
        packing=config.packing,
        trim=config.packing == "none",
        rank=log.rank(),
        world=distributed.world(),
    )
    for line in source.describe():
        log.say(line)
    say_packing(source.report)
    return source


def identity(config: Train, run: RunDir, numbers: Numbers) -> str:
    """Digest of what may not change between the attempts of a run."""
    covered = {
        "config": identity_of(config),
        "inputs": {n: a.digest for n, a in run.inputs.items()},
        "numbers": [numbers.steps, numbers.sequence_length, numbers.rows_per_step],
    }
    return hashlib.sha256(json.dumps(covered, sort_keys=True, default=str).encode()).hexdigest()[:16]


def make_hooks(
    config: Train, job: Job, run: RunDir, model: Any, words: TokenizerFolder, held_out: Segments, numbers: Numbers
) -> dict[str, Hook]:
    out: dict[str, Hook] = {"record": hooks.Record(), "display": hooks.Display(run.path.name.rsplit("-", 1)[0])}
    validate = None
    if len(held_out) and held_out.totals["supervised"]:
        every = config.evaluate_every or max(1, math.ceil(numbers.steps / 10))
        batches, counts = [], {"tokens": 0.0}
        for item in eval_batches(
            held_out, row_length=numbers.sequence_length, stride=numbers.sequence_length // 2, micro_rows=numbers.micro_rows
        ):
            batches.append(item.batch)
            counts["tokens"] += float(item.batch.weights.sum())
            if len(batches) * numbers.micro_rows >= config.evaluate_rows:
                break
        per_byte = (
            held_out.totals["supervised"] / held_out.totals["bytes"]
            if held_out.kind == "text" and held_out.totals["bytes"]
            else 0.0
        )
        validate = hooks.Validate(batches, counts, every, per_byte)
        out["validate"] = validate
        if config.patience:
            out["early_stop"] = hooks.EarlyStop(validate, config.patience, run.folder("best"))
    prompts = sample_prompts(held_out, words)
    if prompts and getattr(model, "supports_cache", False):
        every = config.sample_every or max(1, math.ceil(numbers.steps / 5))
        out["sample"] = hooks.Sample(lambda: samples(model, words, prompts, numbers.sequence_length), every)
    out["tensorboard"] = hooks.TensorBoard(validate)
    return out


def sample_prompts(held_out: Segments, words: TokenizerFolder, count: int = 3, length: int = 24) -> list[list[int]]:
    """Beginnings of held-out documents; of a conversation, all before its first supervised token."""
    out = []
    for i in range(min(count, len(held_out))):
        ids = held_out.ids(i).tolist()
        supervised = held_out.mask(i).tolist() if held_out.kind == "chat" else []
        out.append(ids[: supervised.index(1)] if 1 in supervised else ids[:length])
    return [p for p in out if p]


def samples(model: Any, words: TokenizerFolder, prompts: list[list[int]], limit: int) -> list[dict[str, str]]:
    """What the model says now, greedily."""
    from tutelage.engine import Engine, Sampling

    answer = min(40, limit // 2)
    model.eval()
    engine = Engine(model, slots=len(prompts), max_length=limit)
    prompts = [p[-(limit - answer) :] for p in prompts]
    done = engine.generate(prompts, Sampling(max_tokens=answer, temperature=0.0, stop_ids=words.stop_ids))
    model.train()
    return [{"prompt": words.decode(p), "text": words.decode(c.ids)} for p, c in zip(prompts, done, strict=True)]


def say_plan(
    config: Train, numbers: Numbers, shape: dict[str, Any], machine: Machine, device: torch.device, done: int = 0
) -> None:
    """Time and memory, before the first step (promise 11); `done` steps were made by the run that this one extends."""
    tokens = (numbers.steps - done) * numbers.rows_per_step * numbers.sequence_length
    flops = tokens * train_flops_per_token(shape, numbers.sequence_length)
    log.say(f"time: {explain(flops, machine.peak_flops(device.type, config.dtype), device.type)}")
    need = memory(
        shape,
        numbers.micro_rows,
        numbers.sequence_length,
        config.optimizer.name,
        config.dtype,
        config.checkpointing,
        kernels.available(),
        ranks=ranks_sharing(config),
    )
    cards = machine.accelerators if device.type == "cuda" else ()
    here = cards[0].memory_bytes if cards else machine.memory_bytes
    log.say(f"memory: {need.explain()}; {here / 1e9:,.0f} GB here{'' if need.low <= here else ': IT WILL NOT FIT'}")


def say_packing(report: dict[str, float]) -> None:
    """Nothing is dropped or cut silently (promise 2)."""
    for key, value in report.items():
        if value and key not in ("segments", "rows", "fill", "targets", "pieces", "tokens"):
            log.say(f"  {key}: {value:,.0f}")


def facts(state: State, shape: dict[str, Any], cpu: str, numbers: Numbers, parent: Parent | None) -> dict[str, Any]:
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
        "numbers": numbers.derived,
    }
    if parent is not None:
        out["extended_from"] = {"run": parent.name, "step": parent.steps}
    if isinstance(validate, hooks.Validate) and validate.latest is not None:
        out["validation_loss"] = validate.latest
        if validate.tokens_per_byte:
            out["bits_per_byte_in_run"] = validate.latest / math.log(2) * validate.tokens_per_byte
    return out
