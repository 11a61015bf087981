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

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tutelage.unicode import printable


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting inside an error's text, which is spelled by whoever prints the error: `key=value` in Python, `--key value` on a
    command line, `key: value` in a recipe.

    Example:
        raise DataError("a broken row", fix=f"mend it, or leave such rows out with {Setting('on_error', 'skip')}")
    """

    key: str  # dotted for a nested section
    value: str

    @property
    def plain(self) -> str:
        return f"{self.key}={self.value}"

    def __str__(self) -> str:
        """In marks that no text holds (Unicode keeps them for programs), so that f-strings and sums of texts carry it along."""
        return f"{_BEGIN}{self.plain}{_END}"


_BEGIN, _END = "\ufdd0", "\ufdd1"
_MARKED = re.compile(f"{_BEGIN}([^={_END}]*)=([^{_END}]*){_END}")


class ErrorText(str):
    """A text with settings in it. Reads as Python has them; `spelled` gives another spelling."""

    __slots__ = ("marked",)
    marked: str

    def __new__(cls, text: str) -> ErrorText:
        marked = text.marked if isinstance(text, ErrorText) else text
        self = super().__new__(cls, _MARKED.sub(r"\1=\2", marked))
        self.marked = marked
        return self

    def spelled(self, spelling: Callable[[Setting], str]) -> str:
        return _MARKED.sub(lambda found: spelling(Setting(found[1], found[2])), self.marked)


def with_settings(text: str | None) -> str | None:
    """The text of an error to build another one from: with its settings, which an f-string would take out."""
    return text.marked if isinstance(text, ErrorText) else text


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
        self.message, self.file, self.line, self.field = ErrorText(message), file, line, field
        self.found, self.expected, self.fix = found, _text(expected), _text(fix)
        super().__init__(self.render())

    def but(self, **changes: Any) -> Self:
        """The same error with some of its fields changed.

        Example:
            raise error.but(field=f"rewards.{error.field}") from error
        """
        other = type(self).__new__(type(self))
        texts = {key: _text(changes[key]) for key in ("message", "expected", "fix") if key in changes}
        other.__dict__.update(self.__dict__ | changes | texts)
        other.args = (other.render(),)
        return other

    def render(self, spelling: Callable[[Setting], str] | None = None) -> str:
        """The text for people, with its settings in this spelling; in Python's where none is given."""

        def told(text: str | None) -> str | None:
            return text.spelled(spelling) if spelling is not None and isinstance(text, ErrorText) else text

        file = None if self.file is None else printable(str(self.file))
        where = "" if file is None else f"{file}:{self.line}: " if self.line else f"{file}: "
        rows = [where + printable(told(self.message) or "", lines=True)]
        shown = None if self.found is None else _short(self.found)
        for label, value in (("field", self.field), ("found", shown), ("expected", told(self.expected)), ("fix", told(self.fix))):
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


def _text(text: str | None) -> ErrorText | None:
    return None if text is None else ErrorText(text)


def _short(value: object, limit: int = 160) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = printable(text[: limit * 8])
    return text if len(text) <= limit else text[: limit - 1] + "…"
