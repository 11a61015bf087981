"""A row of the table of stages. Imports nothing heavy: `tutelage --help` reads the whole table."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage.config.base import Section

RENAMED = {"label": "predict", "prefer": "preference", "vocabulary": "extend_vocab"}  # old name of a stage: its name now


@dataclass(frozen=True, slots=True)
class StageSpec:
    """A row of the table of stages. Everything else is found by the stage's name: the module `tutelage.stages.NAME` with
    `run(config, run) -> facts`, the functions NAME in `preflight/checks.py` and `preflight/estimates.py`, and the help, which is
    the first line of the section's docstring.

    Example:
        "sft": StageSpec("Sft", makes="model", ranks=True)
    """

    section: str  # name of the class in config/stages.py
    makes: str = ""  # type of the artifact
    ranks: bool = False  # every rank of `torchrun` takes part
    outside: str | None = None  # function of stages/sources.py: digest of the inputs that are no artifacts

    @property
    def name(self) -> str:
        """The stage's name: `ExtendVocab` is the section of `extend_vocab`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.section).lower()

    @property
    def module(self) -> str:
        return f"tutelage.stages.{self.name}"

    @property
    def help(self) -> str:
        """One line. Read from the source where the section is not loaded, since pydantic takes longer than a help page may."""
        loaded = sys.modules.get("tutelage.config.stages")
        text = _docstrings()[self.section] if loaded is None else inspect.getdoc(getattr(loaded, self.section))
        return (text or "").partition("\n")[0]

    def config(self) -> type[Section]:
        found: type[Section] = getattr(importlib.import_module("tutelage.config.stages"), self.section)
        return found

    def run(self) -> Callable[..., dict[str, Any]]:
        """The stage's `run(config, run) -> facts`."""
        found: Callable[..., dict[str, Any]] = importlib.import_module(self.module).run
        return found

    def check(self) -> Callable[..., None] | None:
        """`check(planned)` raises where the settings alone are wrong."""
        return getattr(importlib.import_module("tutelage.preflight.checks"), self.name, None)

    def estimate(self) -> Callable[..., Any] | None:
        """`estimate(planned) -> Estimate`, without torch; raises `Unknown`."""
        return getattr(importlib.import_module("tutelage.preflight.estimates"), self.name, None)

    def outside_digest(self, config: Section) -> str | None:
        """Digest of the inputs that are no artifacts."""
        if self.outside is None:
            return None
        found: str | None = getattr(importlib.import_module("tutelage.stages.sources"), self.outside)(config)
        return found


@functools.cache
def _docstrings() -> dict[str, str]:
    """The docstring of every class in this folder, without importing one."""
    found = {}
    for file in Path(__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = ast.get_docstring(node) or ""
    return found


def hyphens(name: str) -> str:
    """`vocab_size`, the key that recipes use, as a command line has it: `vocab-size`."""
    return name.replace("_", "-")
