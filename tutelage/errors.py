"""The error tree. Everything a user can mend is a `UserError`; an invariant of ours is an `assert`.

TutelageError
└── UserError                 printed without a traceback, exit code 2
    ├── ConfigError           a key or value of a recipe, a `--set` or a flag
    ├── DataError             a row, a file, an encoding, a shape of data
    ├── ArtifactError         a run, model or tokenizer folder that is missing, unfinished or does not fit
    ├── StorageError          disk full, read-only output, a run held by another process
    ├── MissingExtra          an optional library that is not installed
    ├── RewardError           a reward that is no number, raises, hangs, or says the same of every answer
    ├── WorkerError          a child process that cannot be started or cannot load its function
    ├── SandboxError          walls for model-written code that can't be put up or do not hold
    └── TrainingStopped       a run that must not go on: non-finite loss, nothing trained
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from tutelage.unicode import printable


class TutelageError(Exception):
    """Base of everything this package raises on purpose."""


class UserError(TutelageError):
    """Something the user can mend. The message says what was found, where, what was expected and what to do.

    Example:
        >>> print(UserError("not valid JSON", file="a.jsonl", line=3, found="{'a': 1}", fix="use double quotes"))
        a.jsonl:3: not valid JSON
          found:    {'a': 1}
          fix:      use double quotes
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        field: str | None = None,
        found: object = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.message, self.file, self.line, self.field = message, file, line, field
        self.found, self.expected, self.fix = found, expected, fix
        super().__init__(self.render())

    def but(self, **changes: Any) -> Self:
        """The same error with some of its fields changed.

        Example:
            raise error.but(field=f"rewards.{error.field}") from error
        """
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__ | changes)
        other.args = (other.render(),)
        return other

    def render(self) -> str:
        file = None if self.file is None else printable(str(self.file))
        where = "" if file is None else f"{file}:{self.line}: " if self.line else f"{file}: "
        rows = [where + printable(self.message, lines=True)]
        shown = None if self.found is None else _short(self.found)
        for label, value in (("field", self.field), ("found", shown), ("expected", self.expected), ("fix", self.fix)):
            if value is not None:
                rows.append(f"  {label + ':':<9} {printable(value, lines=True)}")
        return "\n".join(rows)


class ConfigError(UserError):
    """A key or value of a recipe, a `--set` or a flag."""


class DataError(UserError):
    """A row, a file, an encoding or a shape of data."""


class ArtifactError(UserError):
    """A run, model or tokenizer folder that is missing, unfinished or does not fit."""


class StorageError(UserError):
    """Disk full, read-only output, or a run held by another process."""


class RewardError(UserError):
    """A reward that is no number, raises, hangs, or says the same of every answer."""


class WorkerError(UserError):
    """A child process that cannot be started or cannot load its function."""


class SandboxError(UserError):
    """Walls for model-written code that can't be put up or do not hold."""


class TrainingStopped(UserError):
    """A run that must not go on."""


class MissingExtra(UserError):
    """An optional library is not installed."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs `{library}`, which is not installed", fix=f'pip install "tutelage[{extra}]"')


def _short(value: object, limit: int = 160) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = printable(text[: limit * 8])
    return text if len(text) <= limit else text[: limit - 1] + "…"
