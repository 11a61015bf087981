"""Optional behaviour of the loop, one small class each: metrics, display, validation, early stop, samples, TensorBoard."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tutelage import log
from tutelage.files import write_json
from tutelage.models.interface import Batch
from tutelage.models.shard import is_sharded, release
from tutelage.train import distributed
from tutelage.train.checkpoint import load_parts, save_parts
from tutelage.train.loop import State
from tutelage.train.step import measure


class Quiet:
    """A hook that does nothing: what the others start from."""

    def start(self, state: State) -> None: ...
    def after_step(self, state: State) -> None: ...
    def finish(self, state: State) -> None: ...
    def close(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Record(Quiet):
    """One line of metrics.jsonl a step."""

    def after_step(self, state: State) -> None:
        if log.rank() == 0:
            state.job.metrics.write(**facts(state))


def facts(state: State) -> dict[str, Any]:
    """The numbers of the step just done."""
    assert state.result is not None
    job, result = state.job, state.result
    speed = state.step_tokens / state.step_seconds
    out: dict[str, Any] = {
        "step": state.progress.step,
        "tokens": state.progress.tokens,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": job.optimizers.rate,
        "lr_factor": state.lr_factor,
        "tokens_per_second": round(speed, 1),
        "seconds": round(state.progress.seconds, 3),
    }
    if job.peak_flops and job.flops_per_token:
        out["mfu"] = round(speed * job.flops_per_token / job.peak_flops, 4)
    if len(result.terms) > 1:
        out |= {f"term/{name.removeprefix('_')}": value for name, value in result.terms.items()}
    return out


class Display(Quiet):
    """The live line on a terminal; elsewhere a line every `every` seconds."""

    def __init__(self, title: str, every: float = 15.0, headline: Callable[[], str] | None = None) -> None:
        """`headline`: the number that matters, where that is not the loss."""
        self.title, self.every, self.headline = title, every, headline
        self.bar: Progress | None = None
        self.said_at = 0.0
        self.speeds: list[tuple[int, float]] = []
        self.validation: float | None = None

    def start(self, state: State) -> None:
        self.said_at = time.monotonic()
        if log.interactive() and log.rank() == 0:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
            )
            self.bar = Progress(*columns, console=log.console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=state.job.steps, completed=state.progress.step, text="first step…")

    def after_step(self, state: State) -> None:
        self.speeds = [*self.speeds[-19:], (state.step_tokens, state.step_seconds)]
        text = self.line(state)
        if self.bar is not None:
            self.bar.update(self.task, completed=state.progress.step, text=text)
        elif time.monotonic() - self.said_at >= self.every or state.last:
            self.said_at = time.monotonic()
            log.say(f"{self.title} {state.progress.step}/{state.job.steps}  {text}")
        if self.bar is not None and state.last:
            log.say(f"{self.title} {state.progress.step}/{state.job.steps}  {text}")

    def line(self, state: State) -> str:
        assert state.result is not None
        tokens, seconds = (sum(x) for x in zip(*self.speeds, strict=True))
        speed = tokens / seconds
        left = (state.job.steps - state.progress.step) * seconds / len(self.speeds)
        first = self.headline() if self.headline else f"loss {state.result.loss:.3f}"
        text = f"{first}  {speed:,.0f} tokens/s"
        if state.job.peak_flops:
            text += f"  {speed * state.job.flops_per_token / state.job.peak_flops:.0%} of the machine's product rate"
        return f"{text}  {duration(left)} left"

    def finish(self, state: State) -> None:
        if state.stop:
            log.say(f"stopped early: {state.stop}")

    def close(self) -> None:
        if self.bar is not None:  # else the terminal stays without its cursor
            self.bar.stop()


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class Validate(Quiet):
    """Loss on fixed validation batches, every `every` steps and at the end. Streams: only sums are kept. `of` names other texts
    than those that are learnt: their numbers stand under names of their own. `term`: the term that counts, if not their sum."""

    def __init__(
        self,
        batches: list[Batch],
        counts: dict[str, float],
        every: int,
        tokens_per_byte: float = 0.0,
        of: str = "",
        term: str = "",
    ) -> None:
        self.batches, self.counts, self.every, self.tokens_per_byte = batches, counts, every, tokens_per_byte
        self.of, self.term = of, term
        self.latest: float | None = None
        self.terms: dict[str, float] = {}
        self.at = -1

    def start(self, state: State) -> None:
        if state.progress.step == 0:
            self.run(state)

    def after_step(self, state: State) -> None:
        if state.progress.step % self.every == 0 or state.last:
            self.run(state)

    def run(self, state: State) -> None:
        terms = measure(state.job.recipe, self.batches, self.counts)
        self.latest, self.terms = terms[self.term] if self.term else state.job.recipe.total(terms), terms
        self.at = state.progress.step
        row: dict[str, Any] = {"step": self.at, "tokens": state.progress.tokens, "validation_loss": self.latest}
        if len(terms) > 1:
            row |= {f"validation/{name.removeprefix('_')}": value for name, value in terms.items()}
        if self.tokens_per_byte:
            row["bits_per_byte"] = self.latest / math.log(2) * self.tokens_per_byte
        if log.rank() == 0:
            own = {k if k in ("step", "tokens") or not self.of else f"{self.of}_{k}": v for k, v in row.items()}
            state.job.metrics.write(**own)
        extra = f"  {row['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in row else ""
        extra += "".join(f"  {self._term(name, value)}" for name, value in terms.items() if name != "loss")
        log.say(f"step {self.at}  {self.of or 'validation'} loss {self.latest:.4f}{extra}")

    def _term(self, name: str, value: float) -> str:
        """A term in words. An accuracy says of how many it is: of one pair it is 0 or 1, whatever the model."""
        name = name.removeprefix("_")
        units = ("pairs", "answers", "examples", "steps") if name == "accuracy" else ()
        counted = [f" of {self.counts[unit]:,.0f} {unit}" for unit in units if self.counts.get(unit)]
        return f"{name} {value:.3f}{''.join(counted[:1])}"

    def state_dict(self) -> dict[str, Any]:
        return {"latest": self.latest, "terms": self.terms, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.latest, self.terms, self.at = state["latest"], state["terms"], state["at"]


class EarlyStop(Quiet):
    """Ends the run after `patience` validations without a better loss, and goes back to the best weights."""

    def __init__(self, validate: Validate, patience: int, folder: Path) -> None:
        self.validate, self.patience, self.folder = validate, patience, folder
        self.best, self.bad, self.at = math.inf, 0, -1

    def start(self, state: State) -> None:
        self._stop_if_due(state)  # a run that was killed after it had stopped does not go on

    def after_step(self, state: State) -> None:
        if self.validate.at != state.progress.step or self.validate.latest is None:
            return
        if self.validate.latest < self.best:
            self.best, self.bad, self.at = self.validate.latest, 0, state.progress.step
            save_parts(self.folder, state.job.recipe.parts)
            return
        self.bad += 1
        self._stop_if_due(state)

    def _stop_if_due(self, state: State) -> None:
        if self.bad >= self.patience:
            state.stop = f"no better validation loss in {self.bad} validations (best {self.best:.4f} at step {self.at})"

    def finish(self, state: State) -> None:
        distributed.barrier()
        if self.at >= 0:
            load_parts(self.folder, state.job.recipe.parts)
            log.say(f"weights of the best validation, step {self.at}")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best if math.isfinite(self.best) else None, "bad": self.bad, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            best = state["best"]
            self.best, self.bad, self.at = math.inf if best is None else best, state["bad"], state["at"]


class Sample(Quiet):
    """Writes what the model says to fixed prompts, to look at while it learns."""

    def __init__(self, generate: Callable[[], list[dict[str, str]]], every: int) -> None:
        self.generate, self.every = generate, every

    def after_step(self, state: State) -> None:
        parts = state.job.recipe.parts.values()
        due = state.progress.step % self.every == 0 or state.last
        if not due or (log.rank() != 0 and not any(is_sharded(part) for part in parts)):
            return
        rows = self.generate()  # greedy: ranks with shards take the same steps
        for part in parts:
            release(part)
        if log.rank() == 0:
            write_json(state.job.folder / "samples" / f"step_{state.progress.step:06d}.json", rows)
            if rows:
                log.say(f"  {rows[0]['prompt']!r} -> {rows[0]['text'][:100]!r}", style="dim")


class TensorBoard(Quiet):
    """Event files beside metrics.jsonl, where `tensorboard` is installed."""

    def __init__(self, validate: Validate | None = None) -> None:
        self.validate = validate
        self.writer: Any = None

    def start(self, state: State) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        if log.rank() == 0:
            self.writer = SummaryWriter(str(state.job.folder / "tensorboard"), purge_step=state.progress.step + 1)

    def after_step(self, state: State) -> None:
        if self.writer is None:
            return
        for key, value in facts(state).items():
            if key not in ("step", "tokens", "seconds"):
                self.writer.add_scalar(f"train/{key}", value, state.progress.step)
        if self.validate is not None and self.validate.at == state.progress.step and self.validate.latest is not None:
            self.writer.add_scalar("validation/loss", self.validate.latest, state.progress.step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
