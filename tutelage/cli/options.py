"""Settings as options of a command, and as lines of its help page."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from tutelage.config.spec import RENAMED, hyphens
from tutelage.files import named_folder

THIS_RUN = "This run"
RUNS = Path("runs")
Runs = Annotated[
    Path,
    typer.Option("--runs", help="Folder of runs.", rich_help_panel=THIS_RUN, metavar="FOLDER", parser=named_folder),
]
Sets = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one setting, such as optimizer.lr=1e-3. Repeatable.", rich_help_panel=THIS_RUN
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Run again even if the result is there.", rich_help_panel=THIS_RUN, metavar=" ")
]
Extend = Annotated[
    list[str],
    typer.Option(
        "--extend",
        metavar="KEY=VALUE",
        help="Continue the finished run of these settings in a new run: steps=2000 (the number of all steps), tokens=… or "
        "epochs=…. Repeatable, with keys of the schedule.",
        rich_help_panel=THIS_RUN,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.", rich_help_panel=THIS_RUN, metavar=" ")]

METAVARS = {int: "N", float: "X", bool: "true|false", list: "ITEM", dict: "{KEY: VALUE}"}


class Commands(TyperGroup):
    """Names the new command where an old one is typed."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in RENAMED:
            ctx.fail(f"No such command '{args[0]}'. It is called '{hyphens(RENAMED[args[0]])}' now.")
        return super().resolve_command(ctx, args)


class SettingsCommand(TyperCommand):
    """A command that spells settings as its users type them, and whose help page ends with the settings of nested sections, which
    have no options of their own."""

    def invoke(self, ctx: Any) -> Any:
        from tutelage import log
        from tutelage.cli.spelling import spelling_of

        with log.spelling(spelling_of(ctx.info_name)):
            return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        section = getattr(self.callback, "section", None)
        if section is not None:
            show_nested(section)


def show_nested(section: Any) -> None:
    """One panel a nested section, one line a setting."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from tutelage.config.base import subsection

    console = Console(highlight=False)
    for key, field in section.model_fields.items():
        if (inner := subsection(field)) is None:
            continue
        lines = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
        lines.add_column(no_wrap=True, style="bold cyan")
        lines.add_column(overflow="fold")
        defaults = field.default
        for name, one in inner.model_fields.items():
            value = _typed(getattr(defaults, name) if isinstance(defaults, inner) else one.default)
            lines.add_row(Text(f"--set {key}.{name}={value}"), Text(one.description or ""))
        title = (field.description or key).rstrip(".").replace("[", "\\[")
        console.print(Panel(lines, title=f"{title}, with defaults", title_align="left", border_style="dim"))


def _typed(value: Any) -> str:
    """A value as `--set` takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def parameter(key: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def options_of(section: Any) -> list[inspect.Parameter]:
    """An option for every setting of a section but those of nested sections: required ones first, then inputs."""
    from tutelage.config.base import extra_of, subsection

    fields = sorted(section.model_fields.items(), key=lambda x: (not x[1].is_required(), "artifact" not in extra_of(x[1])))
    return [option(key, field) for key, field in fields if subsection(field) is None]


def changes_of(section: Any) -> list[inspect.Parameter]:
    """`--set`, and `--extend` for a stage that can be extended."""
    extend = [parameter("extend", Extend, [])] if "extends" in section.model_fields else []
    return [parameter("set_", Sets, []), *extend]


def option(key: str, field: Any) -> inspect.Parameter:
    """One setting as an option. The value stays text: the section checks it, for commands, recipes and Python alike."""
    from tutelage.config.base import extra_of

    required, kinds = field.is_required(), takes(field)
    facts = [" | ".join(choices)] if (choices := _choices(field)) else []
    if not required and field.default not in (None, "", [], {}):
        facts.append(f"default: {str(field.default).lower() if isinstance(field.default, bool) else field.default}")
    metavar = str(extra_of(field).get("artifact", "")).upper() or METAVARS.get(kinds[0], "VALUE")
    panel = "Required" if required else "Inputs" if "artifact" in extra_of(field) else "Settings"
    several = list in kinds
    text = str(field.description) + (" Repeatable." if several else "")
    text = (f"{text} ({'; '.join(facts)})" if facts else text).replace("[", "\\[")
    shown = typer.Option(f"--{hyphens(key)}", help=text, show_default=False, metavar=metavar, rich_help_panel=panel)
    annotation: Any = Annotated[list[str], shown] if several else Annotated[str | None, shown]
    return parameter(key, annotation, [] if several else None)


def takes(field: Any) -> tuple[type, ...]:
    """The plain types of a setting's value, without None: (str,), (int, str), (list,)."""
    found: list[type] = []

    def walk(annotation: Any) -> None:
        origin = get_origin(annotation)
        if origin is Annotated:
            walk(get_args(annotation)[0])
        elif origin is Literal:
            found.append(Literal)  # type: ignore[arg-type]
        elif origin in (list, dict):
            found.append(origin)
        elif origin is not None:
            for inner in get_args(annotation):
                walk(inner)
        elif annotation is not type(None):
            found.append(annotation)

    walk(field.annotation)
    return tuple(found)


def _choices(field: Any) -> list[str]:
    """The words that a setting takes, where it takes nothing else."""
    words = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return [w for w in words if w not in (field.description or "")] and list(words)


def explicit_values(section: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The settings that were typed, read as recipes read them."""
    from tutelage.config.base import parse_value

    values: dict[str, Any] = {}
    for key, text in options.items():
        if text is None or text == []:
            continue
        plain = isinstance(text, list) or takes(section.model_fields[key]) == (str,)
        values[key] = text if plain else parse_value(text)
    return values


def this_run() -> list[inspect.Parameter]:
    return [parameter("runs", Runs, RUNS), parameter("force", Force, False), parameter("dry_run", DryRun, False)]


def with_options(command: Any, parameters: list[inspect.Parameter], section: Any) -> Any:
    """The command with these parameters, for typer; its help page lists the nested settings of `section`."""
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.section = section
    return command
