"""The loop: batches in, steps, hooks, checkpoints. It knows no objective, no model family and no data format."""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tutelage import log
from tutelage.config.train import Schedule, warmup_steps
from tutelage.errors import Setting, TrainingStopped
from tutelage.files import whole_folder
from tutelage.train import checkpoint, distributed
from tutelage.train.checkpoint import Progress
from tutelage.train.failure import stop_with_rows
from tutelage.train.optim import Optimizers
from tutelage.train.schedule import factor
from tutelage.train.step import StepConfig, StepResult, gradients, train_step
from tutelage.train.watch import UpdateWatch

if TYPE_CHECKING:
    from tutelage.data.tokens.loader import Source

WATCHED = 5  # steps after which every trainable tensor has to have moved
OF_HOOKS = ("best", "samples")  # folders of a run directory in which hooks keep what a child run takes over


class Hook(Protocol):
    """Optional behaviour. `after_step` may set `state.stop`; `state_dict` is kept in checkpoints."""

    def start(self, state: State) -> None: ...
    def after_step(self, state: State) -> None: ...
    def finish(self, state: State) -> None: ...  # the run came to its end
    def close(self) -> None: ...  # always called last, after an error too
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(slots=True)
class Job:
    """Everything a training run is made of."""

    recipe: StepConfig
    source: Source
    optimizers: Optimizers
    schedule: Schedule
    steps: int
    folder: Path  # the run directory
    metrics: log.Metrics
    hooks: dict[str, Hook] = field(default_factory=dict)
    flops_per_token: float = 0.0
    peak_flops: float = 0.0  # this machine's measured rate of matrix products
    identity: str = ""  # digest of the settings that may not change between attempts
    checkpoint_seconds: float = 600.0  # time between checkpoints when checkpoint_every is 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    start_from: Path | None = None  # the last checkpoint of the run that this one extends; not asked once it has one of its own


@dataclass(slots=True)
class State:
    """What hooks see."""

    job: Job
    progress: Progress
    result: StepResult | None = None
    lr_factor: float = 0.0
    step_seconds: float = 0.0
    step_tokens: int = 0
    stop: str | None = None  # reason to end the run after this step

    @property
    def last(self) -> bool:
        return self.progress.step >= self.job.steps or self.stop is not None


def train(job: Job) -> State:
    """Runs or resumes a job to its last step. Raises `TrainingStopped`; on Ctrl-C it saves a checkpoint and raises
    `KeyboardInterrupt`."""
    state = State(job, Progress(identity=job.identity))
    checkpoints = job.folder / "checkpoints"
    found = checkpoint.latest_whole(checkpoints)
    if found is not None:
        resume(state, found)
    elif log.rank() == 0:
        job.metrics.truncate_after(-1)  # of an attempt that was killed before its first checkpoint
    try:
        if found is None:
            dry_run(job)  # before the hooks: a first validation takes longer
            if job.start_from is not None:
                extend(state, job.start_from)
        for hook in job.hooks.values():
            hook.start(state)
        steps(state)
        for hook in job.hooks.values():
            hook.finish(state)
    finally:
        for hook in job.hooks.values():
            hook.close()
    return state


def steps(state: State) -> None:
    """Steps, hooks and checkpoints up to the last step."""
    job = state.job
    watch = watch_of(state)
    saved_at = time.monotonic()
    with Interrupt() as interrupt:
        while not state.last:
            one_step(state, watch)
            for hook in job.hooks.values():
                hook.after_step(state)
            asked = distributed.any_rank(stop=interrupt.asked, save=due(job, state.progress.step, saved_at))
            if asked["stop"] or asked["save"] or state.last:
                save(state)
                saved_at = time.monotonic()
            if asked["stop"] and not state.last:
                raise KeyboardInterrupt
    watch.check_frozen()


def watch_of(state: State) -> UpdateWatch:
    """Judges what is trained in the first steps of an attempt, and once the learning rate has been at its peak."""
    job, left = state.job, state.job.steps - state.progress.step
    peak = warmup_steps(job.schedule, job.steps) + WATCHED - state.progress.step
    until = None if peak <= 0 else min(max(peak, WATCHED), left)
    return UpdateWatch(job.recipe.parts, min(WATCHED, left), until, job.optimizers)


def one_step(state: State, watch: UpdateWatch) -> None:
    job, progress = state.job, state.progress
    started = time.monotonic()
    batch = job.source.next(progress.step)
    state.lr_factor = factor(job.schedule, progress.step, job.steps)
    job.optimizers.set_factor(state.lr_factor)
    result = train_step(job.recipe, batch, job.optimizers)
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        stop_with_rows(job.recipe, batch, result, progress.step, job.folder)
    if result.grad_norm > 0:  # without a signal nothing has to move: a batch of rollouts that are all worth the same
        watch.after_step()
    tokens = int(batch.counts["processed"])
    state.result, state.step_tokens = result, tokens
    state.step_seconds = time.monotonic() - started
    progress.step += 1
    progress.loss = result.loss
    progress.tokens += tokens
    progress.seconds += state.step_seconds
    progress.flops += job.flops_per_token * tokens
    job.source.on_weights(progress.step)


def dry_run(job: Job) -> None:
    """Runs the largest batch forward and backward before step 1, so that a run that does not fit fails in its first second."""
    try:
        gradients(job.recipe, job.source.largest())
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        raise TrainingStopped(
            "the largest batch does not fit in memory",
            found=(str(error) or type(error).__name__).splitlines()[0],
            fix=f"lower micro_rows (the global batch stays the same) or set {Setting('checkpointing', 'layer')}",
        ) from error
    finally:
        for part in job.recipe.parts.values():
            part.zero_grad(set_to_none=True)


def resume(state: State, found: Path) -> None:
    """Goes on from a checkpoint of this run."""
    job = state.job
    progress = checkpoint.load(found, job.recipe.parts, job.optimizers)
    if progress.identity != job.identity:
        raise TrainingStopped(
            f"the checkpoint in {found} belongs to other settings",
            found=progress.identity,
            expected=job.identity,
            fix="start a new run with --force",
        )
    restore(state, progress, job.metrics.path)
    if log.rank() == 0:
        checkpoint.drop_after(found.parent, progress.step)
    log.say(f"resuming after step {progress.step} of {job.steps}")


def extend(state: State, found: Path) -> None:
    """Goes on from a checkpoint of another run, whose curves, samples and best weights become the beginning of this one's."""
    job, other = state.job, found.parent.parent
    checkpoint.check(found)
    progress = checkpoint.load(found, job.recipe.parts, job.optimizers)
    for name in OF_HOOKS:
        if (other / name).exists() and log.rank() == 0:
            with whole_folder(job.folder / name) as out:
                shutil.copytree(other / name, out, dirs_exist_ok=True)
    restore(state, replace(progress, identity=job.identity), other / "metrics.jsonl")
    log.say(f"going on after step {progress.step} of {job.steps} from {found}")


def restore(state: State, progress: Progress, metrics: Path) -> None:
    """Gives source and hooks their state at a checkpoint, and keeps the lines of `metrics` up to it."""
    job = state.job
    job.source.load_state_dict(progress.source)
    for name, hook in job.hooks.items():
        hook.load_state_dict(progress.hooks.get(name, {}))
    if log.rank() == 0:  # one file for all ranks
        job.metrics.begin_with(metrics, progress.step)
    state.progress = progress


def due(job: Job, step: int, saved_at: float) -> bool:
    if job.checkpoint_every:
        return step % job.checkpoint_every == 0
    return time.monotonic() - saved_at >= job.checkpoint_seconds


def save(state: State) -> None:
    job, progress = state.job, state.progress
    progress.source = job.source.state_dict()
    progress.hooks = {name: hook.state_dict() for name, hook in job.hooks.items()}
    checkpoint.save(job.folder / "checkpoints", job.recipe.parts, job.optimizers, progress)
    if log.rank() == 0:
        checkpoint.prune(job.folder / "checkpoints", job.keep_checkpoints)
    distributed.barrier()


class Interrupt:
    """The first Ctrl-C (or SIGTERM) asks for a checkpoint after the step; the second ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        self._old: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._old[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: whoever started it handles signals
                return self
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log.say("stopping after this step, with a checkpoint (once more: at once)")
