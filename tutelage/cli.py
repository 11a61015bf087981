"""The command line. Only what the asked command needs is imported: `tutelage --help` answers in under a second."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tutelage import __version__
from tutelage.errors import UserError

STAGE_HELP = {
    # name: one line of help; the stages themselves are described in stages/__init__.py
    "data": "Collect, clean, deduplicate and split text or conversations.",
    "tokenizer": "Train a byte-level BPE tokenizer and measure it.",
    "tokens": "Turn records into memory-mapped token shards.",
    "pretrain": "Train on plain text, from scratch or on from a checkpoint.",
    "sft": "Fine-tune a checkpoint on conversations.",
    "evaluate": "Measure a model on held-out text and questions, beside honest yardsticks.",
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

Runs = Annotated[Path, typer.Option("--runs", help="folder that holds the runs")]
Sets = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="change one setting, such as optimizer.lr=1e-3")]
Force = Annotated[bool, typer.Option("--force", help="run again even if the result is there")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")]
RUNS = Path("runs")


def main() -> None:
    """Entry point: user errors are printed without a traceback and exit with 2."""
    asked = next((a for a in sys.argv[1:] if not a.startswith("-")), None)
    for name, text in STAGE_HELP.items():
        app.command(name, help=text, rich_help_panel="Stages")(stage_command(name) if name == asked else _placeholder)
    try:
        app()
    except UserError as error:
        from tutelage import log

        log.say(f"error: {error}", style="bold red")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        from tutelage import log

        log.say("interrupted; the same command again resumes")
        raise SystemExit(130) from None


def _placeholder() -> None:
    """Stands in a help page for a stage whose options were not asked for."""


def stage_command(name: str) -> Any:
    """A command with one option for every setting of the stage's section."""
    from tutelage.config.base import assign, build, parse_set, parse_value
    from tutelage.stages import STAGES

    section = STAGES[name].config()

    def command(**options: Any) -> None:
        from tutelage.console import show_plan
        from tutelage.recipe import Runner

        settings, root = options.pop("set_"), options.pop("runs")
        force, dry_run = options.pop("force"), options.pop("dry_run")
        values: dict[str, Any] = {}
        for key, text in options.items():
            if isinstance(text, list):
                if text:
                    values[key] = text
            elif text is not None:
                values[key] = parse_value(text)
        for setting in settings:
            assign(values, *parse_set(setting))
        config = build(section, values)
        runner = Runner(STAGES, root, force=force)
        planned = runner.plan(name, name, config)
        if dry_run:
            show_plan([planned], runner)
            return
        print(runner.run(planned).path)

    parameters = [_option(key, field) for key, field in section.model_fields.items()]
    for key, annotation, default in (
        ("set_", Sets, []),
        ("runs", Runs, RUNS),
        ("force", Force, False),
        ("dry_run", DryRun, False),
    ):
        parameters.append(inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _option(key: str, field: Any) -> inspect.Parameter:
    names = [f"--{key}"] + ([f"--{key.replace('_', '-')}"] if "_" in key else [])
    required = field.is_required()
    default = "" if required or field.default is None or str(field.default) == "" else f" [default: {_short(field.default)}]"
    text = (field.description or "") + (" [required]" if required else default)
    if str(field.annotation).startswith("list"):
        annotation: Any = Annotated[list[str], typer.Option(*names, help=text, show_default=False)]
        return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=[], annotation=annotation)
    annotation = Annotated[str | None, typer.Option(*names, help=text, show_default=False, metavar="VALUE")]
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _short(value: object) -> str:
    return "section, see --set" if hasattr(value, "model_fields") else str(value)


@app.command(rich_help_panel="Whole recipes")
def run(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe")],
    set_: Sets = [],  # noqa: B006 (typer copies it)
    runs: Runs = RUNS,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Plan a recipe, run or resume what is missing, skip what is there."""
    from tutelage.config.base import parse_set
    from tutelage.console import show_next, show_plan
    from tutelage.recipe import Runner, load_recipe, plan_recipe, run_recipe
    from tutelage.stages import STAGES

    loaded = load_recipe(recipe, STAGES, [parse_set(s) for s in set_])
    runner = Runner(STAGES, runs, loaded.name, force=force)
    show_plan(plan_recipe(loaded, runner), runner)
    if dry_run:
        return
    finished = run_recipe(loaded, runner)
    show_next(finished)


@app.command("runs", rich_help_panel="Looking")
def runs_(runs: Runs = RUNS) -> None:
    """List all runs: what they are, whether they finished, how long they took."""
    from tutelage.console import show_runs

    show_runs(runs)


@app.command(rich_help_panel="Looking")
def show(run: Annotated[str, typer.Argument(help="a run directory, or recipe/stage")], runs: Runs = RUNS) -> None:
    """Draw the chain from data to this run, with its numbers."""
    from tutelage.console import show_run

    show_run(run, runs)


@app.command(rich_help_panel="Looking")
def doctor() -> None:
    """Check this machine: Python, torch, compiler, cores, memory, measured rates, optional libraries."""
    from tutelage.plan.doctor import doctor as checks
    from tutelage.plan.doctor import print_doctor

    raise SystemExit(print_doctor(checks()))


@app.command(rich_help_panel="Using")
def chat(
    model: Annotated[str, typer.Argument(help="a model folder, a run, or recipe/stage")],
    message: Annotated[str | None, typer.Option("--message", "-m", help="ask once, print the answer, leave")] = None,
    system: Annotated[str | None, typer.Option(help="system prompt")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="longest answer")] = 128,
    runs: Runs = RUNS,
) -> None:
    """Talk to a model in the terminal."""
    from tutelage.engine import Sampling
    from tutelage.rundir import find
    from tutelage.serve.terminal import chat as talk

    talk(find(model, "model", runs).path, system=system, once=message, sampling=Sampling(max_tokens, temperature=temperature))


@app.command(rich_help_panel="Using")
def serve(
    model: Annotated[str, typer.Argument(help="a model folder, a run, or recipe/stage")],
    host: Annotated[str, typer.Option(help="address to listen on; other machines reach only what you bind")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port")] = 8000,
    api_key: Annotated[list[str], typer.Option("--api-key", help="accept only requests with one of these keys")] = [],  # noqa: B006
    insecure: Annotated[bool, typer.Option("--insecure", help="listen beyond loopback without a key")] = False,
    runs: Runs = RUNS,
) -> None:
    """Serve a model behind the OpenAI API."""
    from tutelage.rundir import find
    from tutelage.serve.app import serve as listen

    listen(find(model, "model", runs).path, host=host, port=port, api_keys=tuple(api_key), insecure=insecure)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="print the version and stop")] = False) -> None:
    if version:
        print(f"tutelage {__version__}")
        raise typer.Exit


if __name__ == "__main__":
    main()
