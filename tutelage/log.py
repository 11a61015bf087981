"""What a run says: the console (rich, on stderr), a log file per attempt, and metrics.jsonl.

Results that a program may want to read go to stdout; everything for people goes through here to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich.console import Console

from tutelage.errors import ErrorText, Setting
from tutelage.files import whole_file
from tutelage.unicode import printable

T = TypeVar("T")
console = Console(stderr=True, highlight=False)
_log_files: list[TextIO] = []  # of the runs being made, the innermost last


_spelling: Callable[[Setting], str] = lambda setting: setting.plain  # noqa: E731


@contextmanager
def spelling(how: Callable[[Setting], str]) -> Iterator[None]:
    """Settings in lines for people are spelled like this inside: a command's users type `--key value`."""
    global _spelling
    before, _spelling = _spelling, how
    try:
        yield
    finally:
        _spelling = before


def to_file(path: Path) -> None:
    """Copies everything said until the matching `close_file` to `path` as well, without colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _log_files.append(path.open("a", encoding="utf-8"))


def close_file() -> None:
    _log_files.pop().close()


def say(text: str, *, style: str | None = None) -> None:
    """One line for people. The text is plain: brackets are not markup, and what a terminal would obey is written as an escape."""
    text = printable(ErrorText(text).spelled(_spelling), lines=True)
    if rank() == 0:
        console.print(text, style=style, soft_wrap=True, markup=False, emoji=False)
    for file in _log_files:
        file.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        file.flush()


def rank() -> int:
    """Rank of this process under `torchrun`; 0 outside it."""
    return int(os.environ.get("RANK", "0"))


def interactive() -> bool:
    return sys.stderr.isatty()


def counted(items: Sequence[T], what: str, every: float = 15.0) -> Iterator[T]:
    """The items one by one; says every so many seconds how far it is, how fast, and how long it will take."""
    started = said = time.monotonic()
    for number, item in enumerate(items):
        yield item
        now = time.monotonic()
        if now - said >= every and number + 1 < len(items):
            said, left = now, (now - started) / (number + 1) * (len(items) - number - 1)
            say(f"{what}: {number + 1:,} of {len(items):,}, {left:,.0f} s left")


class Metrics:
    """metrics.jsonl: one object a line, append only, each line flushed so that a killed run keeps what it said."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, **fields: Any) -> None:
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drops the lines of steps after `step`: a resumed run writes them again."""
        self.begin_with(self.path, step)

    def begin_with(self, path: Path, step: int) -> None:
        """Starts over with the lines up to `step` of the metrics in `path`. Says how many in between can't be read; a last one
        that a kill cut short is no loss."""
        self._file.close()
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        places = [_step_of(x) for x in lines]
        broken = [number for number, place in enumerate(places, 1) if place is None and number < len(lines)]
        if broken or (step > 0 and not lines):
            what = f"{len(broken)} damaged lines are left out, the first is line {broken[0]}" if broken else "no steps are there"
            say(f"{path}: {what}; curves have a gap, the training has none", style="yellow")
        kept = [x for x, place in zip(lines, places, strict=True) if place is not None and place <= step]
        with whole_file(self.path) as f:
            f.write("".join(f"{x}\n" for x in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float | None:
    """The step of a line; None for one that is damaged or cut by a kill."""
    try:
        return float(json.loads(line).get("step", -1))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
