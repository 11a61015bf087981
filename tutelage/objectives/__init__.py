"""Objectives: one pure function a file, and one explicit table.

An objective takes the named parts that are trained and one micro-batch, and returns named terms `(sum, unit)`. It never
divides: the loop does, by the unit's count over the whole global batch. A new method is a file and a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from tutelage.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tutelage.models.interface import Batch


@dataclass(frozen=True, slots=True)
class Term:
    """One named part of a loss."""

    sum: Tensor  # scalar, summed over the micro-batch
    unit: str  # whose global count it is divided by: tokens | sequences | pairs


Objective = Callable[["dict[str, nn.Module]", "Batch"], dict[str, Term]]

TABLE = {
    # name: (module, function)
    "next_token": ("tutelage.objectives.next_token", "next_token"),
}


def objective(name: str) -> Objective:
    """The function of a name in the table."""
    if name not in TABLE:
        raise ConfigError("unknown objective", found=name, expected=f"one of: {', '.join(TABLE)}")
    module, function = TABLE[name]
    found: Objective = getattr(import_module(module), function)
    return found
