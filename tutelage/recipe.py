"""A recipe is a set of named stages. The runner plans them, runs or resumes those that are not finished, and skips the rest.

A single command is a recipe of one stage. A run's digest covers the settings that can change the result, the content of its
inputs, and the source files that the stage imports. Nothing else makes it run again.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tutelage import log
from tutelage.config.base import Section, SourceLocations, artifacts_of, assign, build, identity_of, load_yaml, located, nearest
from tutelage.config.spec import RENAMED, StageSpec
from tutelage.config.train import Train, extended
from tutelage.errors import ArtifactError, ConfigError, UserError
from tutelage.plan.code import code_digest
from tutelage.plan.time import Span
from tutelage.references import find
from tutelage.rundir import Artifact, RunDir


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected time and memory of a stage, as ranges."""

    seconds: Span
    memory_bytes: Span
    because: str  # formula of the time, with its numbers
    room: str  # formula of the memory

    def __add__(self, other: Estimate) -> Estimate:
        """Times of two parts that run one after the other, and the memory of both."""
        because, room = (" + ".join(filter(None, pair)) for pair in ((self.because, other.because), (self.room, other.room)))
        return Estimate(self.seconds + other.seconds, self.memory_bytes + other.memory_bytes, because, room)


class Unknown(Exception):
    """An estimate that is not possible yet; the text is the reason that the plan shows: `known after corpus`."""


@dataclass(slots=True)
class Planned:
    """One stage of a recipe, with what is known before it runs."""

    name: str
    kind: str
    config: Section
    inputs: dict[str, Artifact] = field(default_factory=dict)
    waits_for: dict[str, Planned] = field(default_factory=dict)  # inputs that do not exist yet, and the stages that make them
    run: RunDir | None = None  # set when everything is known
    estimate: Estimate | Unknown | None = None  # None: nothing to do

    @property
    def directory(self) -> RunDir:
        """The run directory, once everything is known."""
        assert self.run is not None, f"{self.name} waits for {list(self.waits_for)}"
        return self.run

    @property
    def status(self) -> str:
        if self.run is None:
            return f"run after {', '.join(p.name for p in self.waits_for.values())}"
        if self.run.done:
            return "hit"
        return "resume" if (self.run.path / "run.json").exists() else "run"


class Runner:
    """Runs stages of one recipe below `root/recipe/`."""

    def __init__(self, table: Mapping[str, StageSpec], root: Path, recipe: str = "cli", *, force: bool = False) -> None:
        self.table, self.root, self.recipe, self.force = table, root, recipe, force
        self.finished: dict[str, RunDir] = {}
        self.planned: dict[str, Planned] = {}
        self.checked: set[str] = set()

    def plan(self, name: str, kind: str, config: Section, extend: Mapping[str, Any] | None = None) -> Planned:
        """Resolves inputs (a path, `recipe/stage`, or `$stage` of this recipe) and, where all are there, the run directory.
        With `extend`: of a child of the finished run of these settings (see `config.train.extended`)."""
        if extend:
            config = self._child(name, kind, config, extend)
        planned = Planned(name, kind, config)
        for key, wanted in artifacts_of(type(config)).items():
            value = getattr(config, key)
            if value is None:
                continue
            if value.startswith("$"):
                if value[1:] not in self.planned:
                    raise ConfigError(
                        f"`{value}` is not a stage of this recipe",
                        field=key,
                        found=value,
                        expected="a folder, or a finished run as recipe/stage; `$stage` has a meaning only inside a recipe",
                    )
                done = self.finished.get(value[1:])
                if done is None or not done.done:
                    planned.waits_for[key] = self.planned[value[1:]]
                    continue
                value = str(done.path)
            planned.inputs[key] = find(value, wanted, self.root)
        self.planned[name] = planned
        if not planned.waits_for:
            digest = self.digest(kind, config, planned.inputs)
            path = self.root / self.recipe / f"{name}-{digest[:12]}"
            planned.run = RunDir(path, kind, digest, planned.inputs, getattr(config, "seed", 0))
        self._check(planned)
        return planned

    def _check(self, planned: Planned) -> None:
        """Checks each stage once; finished ones are not checked."""
        if planned.name in self.checked or (planned.status == "hit" and not self.force):
            return
        if (check := self.table[planned.kind].check()) is not None:
            check(planned)
            self.checked.add(planned.name)

    def _child(self, name: str, kind: str, config: Section, extend: Mapping[str, Any]) -> Section:
        """The settings of a child of the finished run of `config`."""
        if not isinstance(config, Train):
            raise ConfigError(f"`{name}` does not train, so it can't be extended", found=f"a stage of the kind {kind}")
        found = self.plan(name, kind, config)
        if found.run is not None and found.run.finished:
            if (fault := found.run.fault()) is not None:
                raise fault
            return extended(config, str(found.run.path), extend)
        raise ArtifactError(
            f"there is no finished run of these settings of `{name}` to extend",
            file=found.run.path if found.run else None,
            found="an unfinished one" if found.status == "resume" else "none" if found.run else found.status,
            fix="run the same without --extend (and --force) first; a run of other code or settings is named with `extends`",
        )

    def digest(self, kind: str, config: Section, inputs: Mapping[str, Artifact]) -> str:
        row = self.table[kind]
        covered = {
            "stage": kind,
            "config": identity_of(config),
            "inputs": {n: a.digest for n, a in inputs.items()},
            "code": code_digest(row.module),
            "outside": row.outside_digest(config),
        }
        return hashlib.sha256(json.dumps(covered, sort_keys=True, default=str).encode()).hexdigest()

    def run(self, planned: Planned) -> RunDir:
        """Runs, resumes or finds one stage, and reports which."""
        with self.attempt(planned) as facts:
            if facts is not None:
                facts.update(self.table[planned.kind].run()(planned.config, planned.run))
        return planned.directory

    @contextmanager
    def attempt(self, planned: Planned) -> Iterator[dict[str, Any] | None]:
        """Reports what is done with a stage, and holds its run directory while the body runs it. Yields the facts to fill in;
        None where the result exists already or another rank makes it."""
        run, row = planned.directory, self.table[planned.kind]
        self.finished[planned.name] = run
        if run.done and not self.force:
            log.say(f"{planned.name}: hit, {run.path}", style="green")
            yield None
            return
        if log.rank() != 0 and not row.ranks:
            _wait(run)
            yield None
            return
        self._check_extension(planned)
        fault = run.fault() if run.finished and not self.force else None
        if fault is not None:
            log.say(f"{planned.name}: {fault.file}: {fault.message}; it is made again", style="yellow")
        verb = "forced, running" if self.force else "resuming" if planned.status == "resume" else "miss, running"
        log.say(f"{planned.name}: {verb}, {run.path}", style="bold")
        run.nested = self.nested
        resolved = planned.config.model_dump()
        resolved.update({key: str(found.run or found.path) for key, found in planned.inputs.items()})
        with run.attempt(resolved, fresh=self.force) as facts:
            yield facts

    def _check_extension(self, planned: Planned) -> None:
        """Refuses a run that cannot continue the one it extends before it has a folder; deriving its settings finds out."""
        if getattr(planned.config, "extends", None) is not None and planned.status == "run":
            self.estimate(planned)

    def estimate(self, planned: Planned) -> Estimate | Unknown | None:
        """Expected time and memory of a stage, or what has to be known first; None for a finished one."""
        if planned.status == "hit" and not self.force:
            return None
        try:
            estimate = self.table[planned.kind].estimate()
            return Unknown("no estimate") if estimate is None else estimate(planned)
        except Unknown as reason:
            return reason

    def nested(self, kind: str, values: dict[str, Any]) -> RunDir:
        """A stage that another stage needs, such as its tokens: cached and recorded like any other."""
        config = build(self.table[kind].config(), values)
        runner = Runner(self.table, self.root, self.recipe)
        return runner.run(runner.plan(kind, kind, config))


def _wait(run: RunDir, poll_seconds: float = 0.2) -> None:
    """Waits for rank 0's file. No process group is open meanwhile, so nothing can time out."""
    while not run.done:
        time.sleep(poll_seconds)


@dataclass(slots=True)
class Recipe:
    """A parsed recipe file."""

    name: str
    about: str
    stages: dict[str, tuple[str, Section]]  # name -> (kind, config)
    extensions: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> what `--extend` asks of its finished run
    places: SourceLocations = field(default_factory=SourceLocations)

    def plan(self, name: str, runner: Runner) -> Planned:
        """Plans one stage. Raises configuration errors with the stage's name and place."""
        kind, config = self.stages[name]
        try:
            return runner.plan(name, kind, config, self.extensions.get(name))
        except UserError as error:
            if error.file is not None:
                raise
            raise located(error, self.places, f"stages.{name}") from error


TOP = ("name", "about", "scales", "stages")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def load_recipe(
    path: Path, table: Mapping[str, StageSpec], settings: list[tuple[str, Any]], extend: Sequence[tuple[str, Any]] = ()
) -> Recipe:
    """Reads a recipe, applies `--set` (`scale=NAME`, `stage.key=value`) and `--extend`, and checks every key. Raises
    `ConfigError`."""
    values, lines = load_yaml(path)
    places = SourceLocations(path, lines)
    for key in values:
        if key not in TOP:
            raise ConfigError(
                f"unknown key `{key}`", **places.of(key), expected=f"one of: {', '.join(TOP)}", fix=_did_you_mean(key, list(TOP))
            )
    stages = values.get("stages")
    if not isinstance(stages, dict) or not stages:
        raise ConfigError("a recipe needs `stages`: a mapping of names to stages", **places.of("stages"))
    title = str(values.get("name", path.stem))
    for key, name in (("name", title), *((f"stages.{n}", n) for n in stages)):
        if not NAME.fullmatch(name):  # it becomes the name of a folder, and the first part of a `--set`
            raise ConfigError("not a name", **places.of(key), found=name, expected="letters, digits, - and _, as in my_base")
    for key, value, where in _settings(values, settings, places):
        stage = key.partition(".")[0]
        if stage not in stages:
            raise ConfigError(
                f"unknown stage `{stage}` in the setting `{key}`",
                **({"file": where} if isinstance(where, str) else {"file": path, "line": where}),
                expected=f"one of: scale, {', '.join(stages)}",
                fix=_did_you_mean(stage, ["scale", *stages]),
            )
        assign(stages, key, value)
        places.replace(f"stages.{key}", where)
    out: dict[str, tuple[str, Section]] = {}
    for name, raw in stages.items():
        out[name] = _stage(name, raw, table, places, out)
    return Recipe(title, str(values.get("about", "")), out, _extensions(extend, list(out)), places)


def _extensions(extend: Sequence[tuple[str, Any]], stages: list[str]) -> dict[str, dict[str, Any]]:
    """The changes for each stage that is extended."""
    out: dict[str, dict[str, Any]] = {}
    for key, value in extend:
        stage, _, setting = key.partition(".")
        if stage not in stages or not setting:
            raise ConfigError(
                "an extension in a recipe says which stage goes how far",
                found=f"{key}={value}",
                expected=f"STAGE.steps=N, with one of: {', '.join(stages)}",
                fix=_did_you_mean(stage, stages) if stage not in stages else None,
            )
        out.setdefault(stage, {})[setting] = value
    return out


def _settings(
    values: dict[str, Any], settings: list[tuple[str, Any]], places: SourceLocations
) -> Iterator[tuple[str, Any, int | str]]:
    """(key, value, line or words of the command line) of the chosen scale, then of each `--set`."""
    scales = values.get("scales") or {}
    if not isinstance(scales, dict) or not all(isinstance(scale, dict) for scale in scales.values()):
        raise ConfigError(
            "`scales` is a mapping of names to settings", **places.of("scales"), expected="{smoke: {base.steps: 3}}"
        )
    for key, value in settings:
        if key != "scale":
            continue
        if not isinstance(value, str) or (value not in scales and value != "full"):
            names = ["full", *scales]
            raise ConfigError(
                f"unknown scale `{value}`", file=_typed(key, value), expected=f"one of: {', '.join(names)}",
                fix=_did_you_mean(str(value), names),
            )  # fmt: skip
        for inner, given in scales.get(value, {}).items():
            line = places.lines.get(f"scales.{value}.{inner}")  # None: merged in from elsewhere in the file
            yield inner, given, line or places.lines["scales"]
    yield from ((k, v, _typed(k, v)) for k, v in settings if k != "scale")


def _typed(key: str, value: Any) -> str:
    """A `--set` as it was typed, or could have been."""
    return f"--set {key}={value if isinstance(value, str) else json.dumps(value, default=str)}"


def _stage(
    name: str, raw: Any, table: Mapping[str, StageSpec], places: SourceLocations, before: Mapping[str, tuple[str, Section]]
) -> tuple[str, Section]:
    here = f"stages.{name}"
    if not isinstance(raw, dict) or "stage" not in raw:
        raise ConfigError(
            f"`{name}` needs `stage:`, the kind of stage it is", **places.of(here), expected=f"one of: {', '.join(table)}"
        )
    kind = raw["stage"]
    if not isinstance(kind, str) or kind not in table:
        raise ConfigError(
            f"unknown stage kind `{kind}`",
            **places.of(f"{here}.stage"),
            expected=f"one of: {', '.join(table)}",
            fix=_did_you_mean(RENAMED.get(str(kind), str(kind)), list(table)),
        )
    rest = {k: v for k, v in raw.items() if k != "stage"}
    config = build(table[kind].config(), rest, places=places, prefix=f"{here}.")
    for key, wanted in artifacts_of(type(config)).items():
        value = getattr(config, key)
        if not isinstance(value, str) or not value.startswith("$"):
            continue
        where = {**places.of(f"{here}.{key}"), "field": f"{here}.{key}"}
        fitting = [n for n, (k, _) in before.items() if _fits(table[k].makes, wanted)]
        if value[1:] not in before:
            raise ConfigError(
                f"`{value}` is not a stage above `{name}`",
                **where,
                expected=f"one of: {', '.join('$' + b for b in fitting)}" if fitting else f"a stage above that makes {wanted}",
                fix=f"did you mean `${near}`?" if (near := nearest(value[1:], list(before))) else None,
            )
        if value[1:] not in fitting:
            raise ConfigError(
                f"`{key}` takes {wanted}, and `{value}` makes {table[before[value[1:]][0]].makes}",
                **where,
                expected=f"one of: {', '.join('$' + b for b in fitting)}" if fitting else f"a stage above that makes {wanted}",
            )
    return kind, config


def _fits(makes: str, wanted: str) -> bool:
    return wanted in (makes, "run") or (wanted in ("tokenizer", "adapter") and makes == "model")


def _did_you_mean(word: str, names: list[str]) -> str | None:
    close = nearest(word, names)
    return f"did you mean `{close}`?" if close else None


def plan_recipe(recipe: Recipe, runner: Runner) -> list[Planned]:
    """The plan of all stages: what is finished, what will run, and its expected time and memory."""
    out = []
    for name in recipe.stages:
        planned = _plan(recipe, name, runner)
        planned.estimate = runner.estimate(planned)
        out.append(planned)
    return out


def _plan(recipe: Recipe, name: str, runner: Runner) -> Planned:
    """A stage that is done counts as finished for the stages after it."""
    planned = recipe.plan(name, runner)
    if planned.run is not None and planned.run.done and not runner.force:
        runner.finished[name] = planned.run
    return planned


def run_recipe(recipe: Recipe, runner: Runner) -> dict[str, RunDir]:
    """Runs every stage in order; finished stages are hits. All stages are validated before any runs."""
    for name in recipe.stages:
        _plan(recipe, name, runner)
    for name in recipe.stages:
        runner.run(recipe.plan(name, runner))
    return runner.finished
