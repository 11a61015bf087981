"""Every stage as a Python function, under the same names as on the command line and in recipes.

from tutelage import api

corpus = api.data(sources=["docs/"])
words = api.tokenizer(data=corpus, vocab_size=4096)
base = api.pretrain(data=corpus, tokenizer=words, size="3m")
print(base.path, base.facts["loss"])
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tutelage.config.base import assign, build, nearest
from tutelage.config.spec import RENAMED
from tutelage.config.stages import Generate, Predict
from tutelage.errors import ConfigError
from tutelage.files import named_folder
from tutelage.recipe import Runner, load_recipe, run_recipe
from tutelage.rundir import RunDir
from tutelage.stages import FILE_COMMANDS, STAGES

FUNCTIONS = (*STAGES, "run", *FILE_COMMANDS)


def stage(
    name: str, *, runs: str | Path = "runs", force: bool = False, extend: dict[str, Any] | None = None, **settings: Any
) -> RunDir:
    """Runs, resumes or finds one stage. Inputs may be folders, `recipe/stage` names or the `RunDir` of another call.
    Keys of nested sections are given as mappings (`optimizer={"lr": 1e-3}`). `extend={"steps": 2000}` continues the finished
    training of these settings in a new run. Raises the errors of `tutelage.errors`."""
    if name not in STAGES:
        near = nearest(RENAMED.get(name, name), list(STAGES))
        raise ConfigError(
            f"unknown stage `{name}`", expected=f"one of: {', '.join(STAGES)}", fix=f"did you mean `{near}`?" if near else None
        )
    values: dict[str, Any] = {}
    for key, value in settings.items():
        assign(values, key, _plain(value))
    runner = Runner(STAGES, named_folder(runs), force=force)
    return runner.run(runner.plan(name, name, build(STAGES[name].config(), values), extend))


def _plain(value: Any) -> Any:
    """Runs and paths as the text that a command line would have."""
    if isinstance(value, RunDir):
        return str(value.path)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def run(
    recipe: str | Path, *, runs: str | Path = "runs", force: bool = False, extend: dict[str, Any] | None = None, **settings: Any
) -> dict[str, RunDir]:
    """Runs a recipe; settings are those of `--set`, such as `scale="smoke"` or `**{"base.steps": 10}`, and `extend` is that of
    `--extend`, such as `{"base.steps": 20}`."""
    plain = [(key, _plain(value)) for key, value in settings.items()]
    loaded = load_recipe(Path(recipe), STAGES, plain, list((extend or {}).items()))
    return run_recipe(loaded, Runner(STAGES, named_folder(runs), loaded.name, force=force))


def generate(*, runs: str | Path = "runs", force: bool = False, **settings: Any) -> dict[str, Any]:
    """Answers every row of a file: `model`, `input`, `output` and the other settings of the command.

    Returns rows, errors, tokens and seconds. Interrupted, the same call goes on. Raises the errors of `tutelage.errors`.
    """
    from tutelage.stages.generate import run as answer

    return answer(build(Generate, {key: _plain(value) for key, value in settings.items()}), named_folder(runs), force=force)


def predict(*, runs: str | Path = "runs", force: bool = False, **settings: Any) -> dict[str, Any]:
    """Predicts the labels of every row of a file: `model`, `input`, `output` and the other settings of the command.

    Returns rows, how many were cut, how often each label was predicted, and seconds. Raises the errors of `tutelage.errors`.
    """
    from tutelage.stages.predict import run as classify_rows

    return classify_rows(build(Predict, {key: _plain(value) for key, value in settings.items()}), named_folder(runs), force=force)


def __getattr__(name: str) -> Callable[..., RunDir]:
    if name not in STAGES:
        hint = f"it is called `{RENAMED[name]}` now" if name in RENAMED else f"there are: {', '.join(FUNCTIONS)}"
        raise AttributeError(f"tutelage.api has no stage {name!r}; {hint}")

    def call(**settings: Any) -> RunDir:
        return stage(name, **settings)

    call.__doc__ = STAGES[name].help
    return call


def __dir__() -> list[str]:
    return [*globals(), *STAGES]
