"""Chat in the terminal: `tutelage chat MODEL`. Imports no `transformers`, and torch only once a model is to be loaded."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage import log
from tutelage.cli.chat_session import Chat, command
from tutelage.errors import UserError
from tutelage.log import console, say

if TYPE_CHECKING:
    from tutelage.engine import Engine, Sampling

HISTORY_LINES = 1000
BLOCK = '"""'
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def chat(
    model_folder: Path | str, *, system: str | None = None, sampling: Sampling | None = None, once: str | None = None,
    max_length: int | None = None, device: str = "cpu", dtype: str = "float32", history: bool = True,
) -> None:  # fmt: skip
    """Talks in the terminal until /exit or Ctrl-D; with `once`, answers that one message on stdout.

    history: keep what is typed for the arrow keys of the next time; only on a terminal.
    Raises `ArtifactError` for a folder that is no model, `ContextOverflow` when the one message does not fit.
    """
    talk = Chat(open_engine(model_folder, max_length, device, dtype), system, sampling or _default_sampling())
    if once is not None:
        talk.answer(once, _write)
        _write("\n")
        return
    say(f"{Path(model_folder).name}: /help lists the commands, Ctrl-D leaves", style="dim")
    with line_editing(history):
        while (text := ask()) is not None:
            if text and not _do(talk, text):
                break


def open_engine(model_folder: Path | str, max_length: int | None, device: str, dtype: str) -> Engine:
    """An engine for one conversation."""
    from tutelage.chat.render import Renderer
    from tutelage.engine import Engine
    from tutelage.models.open import load

    renderer = Renderer(Path(model_folder))
    return Engine(load(model_folder, device=device, dtype=dtype), renderer, 1, max_length, seed=secrets.randbits(31))


def _default_sampling() -> Sampling:
    from tutelage.engine import Sampling

    return Sampling(temperature=0.7, top_p=0.95)


def _do(talk: Chat, text: str) -> bool:
    """Does what was typed; False to leave."""
    try:
        if text.startswith("/"):
            return command(talk, text)
        answer = talk.answer(text, _write)
        _write("\n")
        if log.interactive():
            say(answer.line(talk.engine.context_length), style="dim")
    except (UserError, OSError) as error:
        say(str(error), style="red")
    except KeyboardInterrupt:  # before the answer began
        say(" (stopped)", style="dim")
    return True


def ask() -> str | None:
    """What is typed next: a line, lines joined by a backslash at their ends, or a block between triple quotes; None at the end.

    Ctrl-C at the prompt drops what was typed so far.
    """
    try:
        first = _line("> ")
        if first is None or first.startswith("/"):
            return first
        return _block(first) if first.lstrip().startswith(BLOCK) else _joined(first)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        console.print()
        say("Ctrl-D or /exit leaves", style="dim")
        return ""


def _joined(line: str) -> str:
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        line = _line(". ") or ""
    return "\n".join([*lines, line]).strip()


def _block(first: str) -> str:
    """Lines as they are, up to the closing quotes or the end of the input."""
    line: str | None = first.lstrip()[len(BLOCK) :]
    lines = []
    while line is not None and BLOCK not in line:
        lines.append(line)
        line = _line(". ")
    return "\n".join([*lines, (line or "").partition(BLOCK)[0]]).strip("\n")


def _line(prompt: str) -> str | None:
    """The next line without its end; None after the last one (Ctrl-D)."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    try:
        return input(f"\001\033[1m\002{prompt}\001\033[0m\002")
    except EOFError:
        console.print()
        return None


def history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "tutelage" / "chat_history"


@contextlib.contextmanager
def line_editing(history: bool) -> Iterator[None]:
    """Editing and arrow keys at a terminal's prompt. With `history`, what is typed is kept in a file for its owner alone."""
    try:
        import readline
    except ImportError:  # a Python built without it
        readline = None  # type: ignore[assignment]
    if readline is None or not (history and sys.stdin.isatty()):
        yield
        return
    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)
        readline.read_history_file(path)
    except OSError as error:
        say(f"{path}: {error.strerror}, so what is typed is not kept (--no-history)", style="dim")
        yield
        return
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        readline.write_history_file(path)
        path.chmod(0o600)


def visible(text: str) -> str:
    """A model's text for a terminal: control characters, which could move the cursor or rewrite what stands there, and those
    that turn the direction of writing, are written as escapes; line breaks and tabs stay."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _write(text: str) -> None:
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
