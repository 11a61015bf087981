"""Settings as a command line has them: as options, in help, and in the words of errors."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from tutelage.errors import UserError
from tutelage.files import named_folder

THIS_RUN = "This run"
Runs = Annotated[
    Path,
    typer.Option(
        "--runs", help="folder that holds the runs", rich_help_panel=THIS_RUN, metavar="FOLDER", parser=named_folder
    ),
]  # fmt: skip
RUNS = Path("runs")

FILE_COMMANDS = {
    # name: one line of help of a command that makes one file of another
    "generate": "Answer every row of a file: prompts, conversations, or an OpenAI batch file.",
    "label": "Label every row of a file with a classifier or a tagger.",
}

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


def epilog(name: str) -> str | None:
    """The nested settings, which have no options of their own."""
    from tutelage.config.base import subsection
    from tutelage.stages import STAGES

    lines = []
    for key, field in STAGES[name].config().model_fields.items():
        inner = subsection(field)
        if inner is not None:
            lines += [f"--set {key}.{k}={f.default}  {f.description}" for k, f in inner.model_fields.items()]
    return "More settings, with their defaults:\n\n" + "\n\n".join(x.replace("[", "\\[") for x in lines) if lines else None


def section_of_files(command: str) -> Any:
    """The section of a command that makes one file of another."""
    from tutelage.config import stages

    return getattr(stages, command.capitalize())


SETTING = re.compile(r"(?<![\w.-])(?<!--set )([a-z_]+)=(\{[^}]*\}|[\w.+/-]*\w)")


def spoken(error: UserError, command: str | None) -> str:
    """The error with its settings as the user typed them. The code writes `key=value`, which is how Python has them; a stage's
    command takes `--key value`, and a recipe `key: value`."""
    from tutelage.config.base import known_keys
    from tutelage.stages import STAGES

    asked = STAGES if command == "run" else [command] if command in STAGES else []
    sections = [STAGES[name].config() for name in asked]
    if command in FILE_COMMANDS:
        sections = [section_of_files(command)]
    known = {key for section in sections for key in known_keys(section)}

    def form(found: re.Match[str]) -> str:
        key, value = found.groups()
        if key not in known:
            return found[0]
        return f"{key}: {value}" if command == "run" else f"--{key.replace('_', '-')} {shlex.quote(value)}"

    for part in ("message", "expected", "fix"):
        setattr(error, part, SETTING.sub(form, text) if (text := getattr(error, part)) else text)
    return error.render()
