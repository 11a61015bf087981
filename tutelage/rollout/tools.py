"""Tools that a model may call while it learns, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tutelage.errors import ConfigError

if TYPE_CHECKING:
    from tutelage.engine.tools import Tool

PYTHON_SECONDS = 5.0


def tools_of(names: Sequence[str]) -> list[Tool]:
    """Raises `ConfigError` for an unknown name, and what the sandbox raises where it cannot hold code."""
    from tutelage.engine.tools import calculator

    makers = {"calculator": lambda: calculator, "python": python_tool}
    for name in names:
        if name not in makers:
            raise ConfigError("no such tool", field="tools", found=name, expected=" | ".join(makers))
    return [makers[name]() for name in names]


def python_tool() -> Tool:
    """Runs a program in the sandbox and gives what it printed."""
    from tutelage.engine.tools import Tool
    from tutelage.sandbox.limits import Limits
    from tutelage.sandbox.sandbox import Sandbox

    sandbox = Sandbox(Limits(seconds=PYTHON_SECONDS))
    assert sandbox.walls  # proven now, not when the model first calls

    def run(code: str) -> str:
        done = sandbox.run(code)
        return done.stdout if done.reason == "done" else f"{done.stdout}error: {done.reason} {done.stderr.strip()[-400:]}"

    schema = {
        "type": "object",
        "properties": {"code": {"type": "string", "maxLength": 4000, "description": "a Python program that prints its result"}},
        "required": ["code"],
        "additionalProperties": False,
    }
    return Tool("python", "Runs a Python program and gives what it prints.", schema, run)
