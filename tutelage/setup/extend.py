"""A child run: a finished training gone on with to more steps, in a run directory of its own.

What may differ is how far it goes and the schedule. What was derived for the parent (batch, rates) stays as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage import log
from tutelage.config.base import build, flat, identity_of, load_yaml
from tutelage.config.train import MAY_CHANGE, Train
from tutelage.errors import ArtifactError, ConfigError
from tutelage.rundir import RunDir, read_run
from tutelage.train.schedule import factor


@dataclass(frozen=True, slots=True)
class ParentRun:
    """The finished run that a child run extends."""

    path: Path  # its run directory
    facts: dict[str, Any]  # its run.json
    config: Train

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def numbers(self) -> dict[str, Any]:
        """What was derived for it: `sequence_length`, `batch_tokens` and the rates."""
        return dict(self.facts["numbers"])

    @property
    def steps(self) -> int:
        return int(self.facts["steps"])


def parent_of(config: Train, run: RunDir) -> ParentRun | None:
    """The run that `run`, of the settings `config`, extends; None if it extends none. Raises `ConfigError` naming the first
    setting or input in which they differ, and `ArtifactError` where there is nothing to go on from."""
    if config.extends is None:
        return None
    path = run.input("extends").resolve()
    facts = read_run(path)
    if facts["stage"] != run.stage:
        raise ConfigError(
            "a run can extend only one of its own stage", field="extends", found=f"{facts['stage']}, {path}", expected=run.stage
        )
    parent = ParentRun(path, facts, build(type(config), load_yaml(path / "config.yaml")[0]))
    _check_settings(config, run, parent)
    if facts["stopped_early"]:
        raise ConfigError(
            "a run that stopped early can't be extended: more steps do not help it",
            field="extends",
            found=facts["stopped_early"],
            fix="start a new run with a larger patience",
        )
    start_of(run, parent)
    return parent


def _check_settings(config: Train, run: RunDir, parent: ParentRun) -> None:
    """Raises `ConfigError` naming the first setting or input in which a child run differs from its parent and may not."""
    ours, theirs = flat(identity_of(config)), flat(identity_of(parent.config))
    ours |= {key: found.digest[:12] for key, found in run.inputs.items() if key != "extends"}
    theirs |= {p["name"]: p["digest"][:12] for p in parent.facts["parents"] if p["name"] != "extends"}
    for key in sorted(ours.keys() | theirs.keys()):
        if key.partition(".")[0] not in MAY_CHANGE and ours.get(key) != theirs.get(key):
            raise ConfigError(
                f"`{key}` is not that of the run to extend",
                field=key,
                found=str(ours.get(key)),
                expected=f"{theirs.get(key)}, as in {parent.name}",
                fix=f"only {', '.join(MAY_CHANGE)} may differ; start a new run to change anything else",
            )


def start_of(run: RunDir, parent: ParentRun) -> Path | None:
    """The parent's last checkpoint; None once the child has one of its own. Raises `ArtifactError` if it is gone."""
    from tutelage.train.checkpoint import latest

    if latest(run.folder("checkpoints")) is not None:
        return None
    folder = parent.path / "checkpoints"
    found = latest(folder)
    if found is None or found.name != f"step_{parent.steps:06d}":
        raise ArtifactError(
            "the run to extend has lost its last checkpoint",
            file=folder,
            found=found.name if found else "no checkpoint",
            expected=f"that of step {parent.steps}",
            fix="make it again: its command with --force; or train on from its model with `model`, with a new optimizer",
        )
    return found


def say_rate(parent: ParentRun, config: Train, steps: int) -> None:
    """How the learning rate goes on, and a warning where it jumps up."""
    before = factor(parent.config.schedule, parent.steps - 1, parent.steps)
    after = factor(config.schedule, parent.steps, steps)
    log.say(
        f"extends {parent.name}: the learning rate was {before:.3f} of its peak at the end of it, "
        f"and is {after:.3f} at step {parent.steps + 1} of {steps}"
    )
    if after > before:
        log.say(
            f"warning: the learning rate jumps up, to {after / before:.2g} times that, and undoes part of the decay. Better: "
            "schedule.name=constant while a run may be extended, then --extend schedule.name=wsd, which decays at the end",
            style="yellow",
        )
