"""Chat in the terminal: `tutelage chat MODEL`. Imports no `transformers`, and torch only once a model is to be loaded."""

from __future__ import annotations

import contextlib
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.errors import UserError
from tutelage.log import console, say

if TYPE_CHECKING:
    from tutelage.engine import Engine, Sampling

HELP = "/reset forgets the conversation, /system TEXT sets the instructions (and forgets), /exit leaves. Ctrl-C stops an answer."


class Chat:
    """A conversation with one engine: what was said so far, and how to answer."""

    def __init__(self, engine: Engine, system: str | None, sampling: Sampling) -> None:
        self.engine, self.sampling = engine, sampling
        self.messages: list[dict[str, Any]] = []
        self.system = system
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str, write: Any) -> str:
        """Says `text`, writes the answer as it comes, returns it. An interrupted one is kept as far as it got."""
        turns = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        events = self.engine.stream(turns, self.sampling)
        with contextlib.closing(events):  # type: ignore[type-var]
            try:
                for event in events:
                    pieces.append(event.text)
                    write(event.text)
            except KeyboardInterrupt:
                say(" (stopped)", style="dim")
        reply = "".join(pieces)
        self.messages = [*turns, {"role": "assistant", "content": reply}]
        return reply


def chat(
    model_folder: Path | str, *, system: str | None = None, sampling: Sampling | None = None, once: str | None = None,
    max_length: int | None = None, device: str = "cpu", dtype: str = "float32",
) -> None:  # fmt: skip
    """Talks in the terminal until /exit, Ctrl-D or Ctrl-C at the prompt; with `once`, answers that one message on stdout.

    Raises `ArtifactError` for a folder that is no model, `ContextOverflow` when the one message does not fit.
    """
    talk = Chat(open_engine(model_folder, max_length, device, dtype), system, sampling or _default_sampling())
    if once is not None:
        talk.answer(once, _write)
        _write("\n")
        return
    say(f"{Path(model_folder).name}: {HELP}", style="dim")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` editing and history)
    while (line := _ask()) is not None:
        if line and not _command(talk, line):
            break


def open_engine(model_folder: Path | str, max_length: int | None, device: str, dtype: str) -> Engine:
    """An engine for one conversation."""
    from tutelage.data.render import Renderer
    from tutelage.engine import Engine
    from tutelage.models.load import load

    renderer = Renderer(Path(model_folder))
    return Engine(load(model_folder, device=device, dtype=dtype), renderer, 1, max_length, seed=secrets.randbits(31))


def _default_sampling() -> Sampling:
    from tutelage.engine import Sampling

    return Sampling(temperature=0.7, top_p=0.95)


def _command(talk: Chat, line: str) -> bool:
    """Does what a line asks; False to leave."""
    word, _, rest = line.partition(" ")
    if word in ("/exit", "/quit"):
        return False
    if word == "/reset":
        talk.reset()
    elif word == "/system":
        talk.system = rest.strip() or None
        talk.reset()
    elif word.startswith("/"):
        say(HELP)
    else:
        try:
            talk.answer(line, _write)
            _write("\n")
        except UserError as error:
            say(f"{error}\n/reset forgets the conversation", style="red")
    return True


def _ask() -> str | None:
    """The next line; None at its end (Ctrl-D) or on Ctrl-C."""
    try:
        if not sys.stdin.isatty():
            return _plain_line()
        return input("\001\033[1m\002> \001\033[0m\002").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def _plain_line() -> str | None:
    line = sys.stdin.readline()
    return line.strip() if line else None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
