"""Commands that turn one file into another: `generate`, `predict`."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer

from tutelage.cli.options import explicit_values, option, parameter, this_run, with_options
from tutelage.config.base import build
from tutelage.config.spec import StageSpec


def make(spec: StageSpec) -> Any:
    """The command: `model` and `input` are arguments, every other setting is an option."""
    section = spec.config()

    def command(**options: Any) -> None:
        from tutelage.cli.show import show_config

        root, force, dry_run = (options.pop(key) for key in ("runs", "force", "dry_run"))
        config: Any = build(section, explicit_values(section, options))
        import_module(spec.module).run(config, root, force=force, dry_run=dry_run)
        show_config(config) if dry_run else print(config.output)

    fields = dict(section.model_fields)
    places = [parameter(key, Annotated[str, typer.Argument(help=fields.pop(key).description)]) for key in ("model", "input")]
    output = typer.Option("--output", "-o", help=fields.pop("output").description, metavar="FILE")
    places.append(parameter("output", Annotated[str, output]))
    return with_options(command, [*places, *(option(key, field) for key, field in fields.items()), *this_run()], section)
