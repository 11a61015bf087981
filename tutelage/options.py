"""Options of the command line: a setting of a section as one, and those that every command has."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

THIS_RUN = "This run"
Runs = Annotated[Path, typer.Option("--runs", help="folder that holds the runs", rich_help_panel=THIS_RUN, metavar="FOLDER")]
RUNS = Path("runs")

METAVARS = {int: "N", float: "X", bool: "true|false", list: "ITEM", dict: "{KEY: VALUE}"}


def parameter(key: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def option(key: str, field: Any) -> inspect.Parameter:
    """One setting as an option. The value stays text: the section checks it, for commands, recipes and Python alike."""
    from tutelage.config.base import extra_of

    required, kinds = field.is_required(), takes(field)
    facts = [" | ".join(choices)] if (choices := _choices(field)) else []
    if not required and field.default not in (None, "", [], {}):
        facts.append(f"default: {str(field.default).lower() if isinstance(field.default, bool) else field.default}")
    metavar = str(extra_of(field).get("artifact", "")).upper() or METAVARS.get(kinds[0], "VALUE")
    panel = "Required" if required else "Inputs" if "artifact" in extra_of(field) else "Settings"
    text = (f"{field.description} ({'; '.join(facts)})" if facts else str(field.description)).replace("[", "\\[")
    several = list in kinds
    shown = typer.Option(
        f"--{key}", help=text + ("; repeat it for more" if several else ""), show_default=False, metavar=metavar,
        rich_help_panel=panel,
    )  # fmt: skip
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
