"""Settings in an error as the user would type them: a command takes `--key value`, a recipe `key: value`."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from tutelage.config.base import known_keys
from tutelage.config.spec import hyphens
from tutelage.errors import Setting, UserError
from tutelage.stages import FILE_COMMANDS, STAGES


def spelled(error: UserError, command: str) -> str:
    """The text of an error for the user of a command. A setting that the command does not have stays `key=value`: it belongs to
    another command, or to a file."""
    return error.render(spelling_of(command))


def spelling_of(command: str) -> Callable[[Setting], str]:
    """How a command's users write a setting: those of `run` in a recipe."""
    if command == "run":
        return _in_recipe
    table = {hyphens(name): spec for name, spec in (STAGES | FILE_COMMANDS).items()}
    known = set(known_keys(table[command].config())) if command in table else set()
    return lambda setting: _option(setting) if setting.key in known else setting.plain


def _option(setting: Setting) -> str:
    """`--key value`; a setting of a nested section has no option."""
    if "." in setting.key:
        return f"--set {shlex.quote(setting.plain)}"
    return f"--{hyphens(setting.key)} {shlex.quote(setting.value)}"


def _in_recipe(setting: Setting) -> str:
    *sections, key = setting.key.split(".")
    return "".join(f"{name}: {{" for name in sections) + f"{key}: {setting.value}" + "}" * len(sections)
