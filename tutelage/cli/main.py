"""The command line. Only what the asked command needs is imported: `tutelage --help` answers in under a second."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tutelage import __version__
from tutelage.cli.commands import chat, keys_app, serve
from tutelage.cli.options import FILE_COMMANDS, RUNS, THIS_RUN, Runs, epilog, option, parameter, section_of_files, spoken, takes
from tutelage.errors import UserError

STAGE_HELP = {
    # name: one line of help; the stages themselves are described in stages/__init__.py
    "data": "Collect, clean, deduplicate and split text or conversations.",
    "tokenizer": "Train a byte-level BPE tokenizer and measure it.",
    "tokens": "Turn records into memory-mapped token shards.",
    "pretrain": "Train on plain text, from scratch or on from a checkpoint.",
    "sft": "Fine-tune a checkpoint on conversations.",
    "reward": "Train a model that scores answers as people did.",
    "sample": "Answer each prompt several times and judge the answers.",
    "select": "Choose good answers, or the best and the worst, to train on.",
    "distil": "Train a model on what a larger one predicts.",
    "vocabulary": "Give a checkpoint new tokens for the texts of a field.",
    "adapt": "Adapt a checkpoint to a field with replay, and measure gain and loss.",
    "prefer": "Train towards preferred answers: DPO and its family.",
    "rl": "Train on a model's own answers, by rewards: GRPO and its family, PPO.",
    "merge": "Make an adapter part of its base: a whole model.",
    "classify": "Train a classifier of texts, or of their parts, and measure it beside word counts.",
    "translate": "Train an encoder-decoder to make one text of another: translation, summaries.",
    "evaluate": "Measure a model on held-out text and questions, and compare it with baselines.",
    "report": "One HTML page about a run and everything it came from.",
}

app = typer.Typer(
    help="Raise a language model: from raw text to an assistant, offline on a laptop or on a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Sets = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="change one setting, such as optimizer.lr=1e-3", rich_help_panel=THIS_RUN),
]
Force = Annotated[
    bool, typer.Option("--force", help="run again even if the result is there", rich_help_panel=THIS_RUN, metavar=" ")
]
Extend = Annotated[
    list[str],
    typer.Option(
        "--extend",
        metavar="KEY=VALUE",
        help="go on from the finished run of these settings, in a run of its own: steps=2000 (all steps), also tokens, epochs",
        rich_help_panel=THIS_RUN,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the plan and stop", rich_help_panel=THIS_RUN, metavar=" ")]
VERSION = f"tutelage {__version__}"


def main() -> None:
    """Entry point: user errors are printed without a traceback and exit with 2."""
    if sys.argv[1:] == ["--version"]:  # to read an option typer imports pydantic
        print(VERSION)
        return
    asked = next((a for a in sys.argv[1:] if not a.startswith("-")), None)
    for name, text in STAGE_HELP.items():
        add = app.command(name, help=text, rich_help_panel="Stages", epilog=epilog(name) if name == asked else None,
                          context_settings={"token_normalize_func": _underscores})  # fmt: skip
        add(stage_command(name) if name == asked else _placeholder)
    for name, text in FILE_COMMANDS.items():
        add = app.command(name, help=text, rich_help_panel="Using", context_settings={"token_normalize_func": _underscores})
        add(file_command(name) if name == asked else _placeholder)
    try:
        app()
    except UserError as error:
        from tutelage import log

        log.say(f"error: {spoken(error, asked)}", style="bold red")
        raise SystemExit(2) from None


def _underscores(name: str) -> str:
    """--vocab-size is --vocab_size, the key that recipes use."""
    return name.replace("-", "_")


def _placeholder() -> None:
    """Stands in a help page for a stage whose options were not asked for."""


def stage_command(name: str) -> Any:
    """A command with one option for every setting of the stage's section."""
    from tutelage.config.base import assign, build, extra_of, parse_set, subsection
    from tutelage.stages import STAGES

    section = STAGES[name].config()

    def command(**options: Any) -> None:
        from tutelage import log
        from tutelage.cli.show import show_config, show_plan
        from tutelage.recipe import Runner

        settings, root = options.pop("set_"), options.pop("runs")
        force, dry_run = options.pop("force"), options.pop("dry_run")
        extend = dict(parse_set(text) for text in options.pop("extend", []))
        values = _given(section, options)
        for setting in settings:
            assign(values, *parse_set(setting))
        config = build(section, values)
        runner = Runner(STAGES, root, force=force)
        planned = runner.plan(name, name, config, extend)
        if dry_run:
            planned.estimate = runner.estimate(planned)
            show_plan([planned], runner)
            show_config(planned.config)
            return
        made = runner.run(planned)
        if log.rank() == 0:  # `$(torchrun …)` is one path
            print(made.path)

    fields = sorted(section.model_fields.items(), key=lambda x: (not x[1].is_required(), "artifact" not in extra_of(x[1])))
    parameters = [option(key, field) for key, field in fields if subsection(field) is None]
    extend = [parameter("extend", Extend, [])] if "extends" in section.model_fields else []
    return _with_options(command, [*parameters, parameter("set_", Sets, []), *extend, *_this_run()])


def file_command(name: str) -> Any:
    """`tutelage generate MODEL INPUT --output FILE`, and `label` likewise, with an option for every other setting of its
    section."""
    from importlib import import_module

    from tutelage.config.base import build

    section = section_of_files(name)

    def command(**options: Any) -> None:
        from tutelage.cli.show import show_config

        root, force, dry_run = (options.pop(key) for key in ("runs", "force", "dry_run"))
        config: Any = build(section, _given(section, options))
        import_module(f"tutelage.stages.{name}").run(config, root, force=force, dry_run=dry_run)
        show_config(config) if dry_run else print(config.output)

    fields = dict(section.model_fields)
    places = [parameter(key, Annotated[str, typer.Argument(help=fields.pop(key).description)]) for key in ("model", "input")]
    output = typer.Option("--output", "-o", help=fields.pop("output").description, metavar="FILE")
    places.append(parameter("output", Annotated[str, output]))
    return _with_options(command, [*places, *(option(key, field) for key, field in fields.items()), *_this_run()])


def _given(section: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The settings that were typed, read as recipes read them."""
    from tutelage.config.base import parse_value

    values: dict[str, Any] = {}
    for key, text in options.items():
        if text is None or text == []:
            continue
        plain = isinstance(text, list) or takes(section.model_fields[key]) == (str,)
        values[key] = text if plain else parse_value(text)
    return values


def _this_run() -> list[inspect.Parameter]:
    return [parameter("runs", Runs, RUNS), parameter("force", Force, False), parameter("dry_run", DryRun, False)]


def _with_options(command: Any, parameters: list[inspect.Parameter]) -> Any:
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


@app.command(rich_help_panel="Whole recipes")
def run(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe")],
    set_: Sets = [],  # noqa: B006 (typer copies it)
    extend: Extend = [],  # noqa: B006
    runs: Runs = RUNS,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Plan a recipe, run or resume what is missing, skip what is there."""
    from tutelage.cli.show import show_next, show_plan
    from tutelage.config.base import parse_set
    from tutelage.recipe import Runner, load_recipe, plan_recipe, run_recipe
    from tutelage.stages import STAGES

    loaded = load_recipe(recipe, STAGES, [parse_set(s) for s in set_], [parse_set(s) for s in extend])
    runner = Runner(STAGES, runs, loaded.name, force=force)
    show_plan(plan_recipe(loaded, runner), runner)
    if dry_run:
        return
    finished = run_recipe(loaded, runner)
    show_next(finished)


@app.command("runs", rich_help_panel="Looking")
def runs_(
    like: Annotated[str | None, typer.Argument(help="a part of recipe/stage-digest, also with *; none: all runs")] = None,
    stage: Annotated[str | None, typer.Option("--stage", help="runs of this stage, such as sft")] = None,
    status: Annotated[
        str | None, typer.Option("--status", help="done, failed, interrupted, killed, running, damaged, lost")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="remove those runs, after a question")] = False,
    force: Annotated[bool, typer.Option("--force", help="remove also what other runs were made from")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="remove without a question")] = False,
    runs: Runs = RUNS,
) -> None:
    """List runs: what they are, whether they finished, how long they took. With --remove: remove them."""
    from tutelage.cli.show import chosen_runs, show_runs
    from tutelage.errors import ConfigError

    rows = chosen_runs(runs, like, stage, status)
    if not remove:
        if force or yes:
            raise ConfigError("--force and --yes are about --remove", fix="leave them out, or add --remove")
        show_runs(rows, runs)
        return
    from tutelage.cli.removal import remove as remove_runs

    if like is None and stage is None and status is None:
        raise ConfigError(
            "say which runs to remove", field="remove", expected="a part of their names, --stage or --status",
            fix="tutelage runs --status failed --remove; or '*' for all",
        )  # fmt: skip
    remove_runs(runs, rows, needed_too=force, yes=yes)


@app.command(rich_help_panel="Looking")
def show(
    run: Annotated[str, typer.Argument(help="a run directory, or recipe/stage")],
    rollouts: Annotated[bool, typer.Option("--rollouts", help="the answers that it learned from")] = False,
    step: Annotated[int | None, typer.Option("--step", help="of the rollouts; the last one where left out")] = None,
    limit: Annotated[int, typer.Option("--limit", help="prompts shown")] = 5,
    runs: Runs = RUNS,
) -> None:
    """Draw the chain from data to this run, with its numbers; or browse its rollouts."""
    from tutelage.cli.show import show_run
    from tutelage.cli.show_rollouts import show_rollouts

    if rollouts:
        show_rollouts(run, runs, step, limit)
    else:
        show_run(run, runs)


@app.command(rich_help_panel="Looking")
def doctor() -> None:
    """Check this machine: Python, torch, compiler, cores, memory, measured rates, optional libraries."""
    from tutelage.models import kernels
    from tutelage.plan.doctor import doctor as checks
    from tutelage.plan.doctor import print_doctor

    raise SystemExit(print_doctor(checks(kernels.why_not)))


app.command(rich_help_panel="Using")(chat)
app.command(rich_help_panel="Using")(serve)
app.add_typer(keys_app, name="keys", rich_help_panel="Using")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="print the version and stop")] = False) -> None:
    if version:
        print(VERSION)
        raise typer.Exit


if __name__ == "__main__":
    main()
