"""The command line. Only what the chosen command needs is imported: `tutelage --help` answers in a fifth of a second."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from tutelage import __version__
from tutelage.cli import options as cli
from tutelage.cli.commands import chat, keys_app, serve
from tutelage.cli.options import RUNS, DryRun, Extend, Force, Runs, Sets
from tutelage.cli.runs import doctor, runs, show
from tutelage.config.spec import hyphens
from tutelage.errors import UserError
from tutelage.stages import FILE_COMMANDS, STAGES

app = typer.Typer(
    cls=cli.Commands,
    help="Raise a language model: from raw text to an assistant, offline on a laptop or on a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERSION = f"tutelage {__version__}"


def main() -> None:
    """Entry point: user errors are printed without a traceback and exit with 2."""
    if sys.argv[1:] == ["--version"]:  # to read an option typer imports pydantic
        print(VERSION)
        return
    command = next((a for a in sys.argv[1:] if not a.startswith("-")), "")
    for panel, table, make in (("Stages", STAGES, stage_command), ("Using", FILE_COMMANDS, file_command)):
        for name, spec in table.items():
            add = app.command(hyphens(name), cls=cli.SettingsCommand, help=spec.help, rich_help_panel=panel,
                              context_settings={"token_normalize_func": hyphens})  # fmt: skip
            add(make(name) if hyphens(name) == command else _placeholder)
    try:
        app()
    except UserError as error:
        from tutelage import log
        from tutelage.cli.spelling import spelled

        log.say(f"error: {spelled(error, command)}", style="bold red")
        raise SystemExit(2) from None


def _placeholder() -> None:
    """Fills a line of the help page for a command that was not chosen: its options are not built."""


def stage_command(name: str) -> Any:
    """A command with one option for every setting of the stage's section."""
    from tutelage.config.base import assign, build, parse_set

    spec, section = STAGES[name], STAGES[name].config()

    def command(**options: Any) -> None:
        from tutelage import log
        from tutelage.cli.show import show_stage_plan
        from tutelage.recipe import Runner

        settings, root = options.pop("set_"), options.pop("runs")
        force, dry_run = options.pop("force"), options.pop("dry_run")
        extend = dict(parse_set(text) for text in options.pop("extend", []))
        values = cli.explicit_values(section, options)
        for setting in settings:
            assign(values, *parse_set(setting))
        runner = Runner(STAGES, root, force=force)
        planned = runner.plan(name, name, build(section, values), extend)
        if dry_run:
            show_stage_plan(planned, runner)
            return
        with runner.attempt(planned) as facts:
            if facts is not None:
                facts.update(import_module(spec.module).run(planned.config, planned.run))
        if log.rank() == 0:  # `$(torchrun …)` is one path
            print(planned.directory.path)

    return cli.with_options(command, [*cli.options_of(section), *cli.changes_of(section), *cli.this_run()], section)


def file_command(name: str) -> Any:
    """`tutelage generate MODEL INPUT --output FILE`, with an option for every other setting of its section."""
    from tutelage.cli.files import make

    return make(FILE_COMMANDS[name])


@app.command(cls=cli.SettingsCommand, rich_help_panel="Whole recipes")
def run(
    recipe: Annotated[Path, typer.Argument(help="Path of a YAML recipe.")],
    set_: Sets = [],  # noqa: B006 (typer copies it)
    extend: Extend = [],  # noqa: B006
    runs: Runs = RUNS,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Plan a recipe, run or resume what is missing, skip what is there."""
    from tutelage.cli.show import show_derivations, show_next, show_plan
    from tutelage.config.base import parse_set
    from tutelage.recipe import Runner, load_recipe, plan_recipe, run_recipe

    loaded = load_recipe(recipe, STAGES, [parse_set(s) for s in set_], [parse_set(s) for s in extend])
    runner = Runner(STAGES, runs, loaded.name, force=force)
    plan = plan_recipe(loaded, runner)
    show_plan(plan, runner)
    if dry_run:
        show_derivations(plan)
    else:
        show_next(run_recipe(loaded, runner))


app.command("runs", rich_help_panel="Looking")(runs)
app.command("show", rich_help_panel="Looking")(show)
app.command("doctor", rich_help_panel="Looking")(doctor)
app.command("chat", rich_help_panel="Using")(chat)
app.command("serve", rich_help_panel="Using")(serve)
app.add_typer(keys_app, name="keys", rich_help_panel="Using")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        print(VERSION)
        raise typer.Exit


if __name__ == "__main__":
    main()
