"""Tries a model folder's chat template in a process that can be killed, before it runs here: a template is a program, and one of
a stranger's may run without an end or write gigabytes."""

from __future__ import annotations

from pathlib import Path

from tutelage.chat.templates import styles
from tutelage.errors import ArtifactError
from tutelage.rewards.worker import Workers
from tutelage.tokenizer.load import TokenizerFolder

SECONDS = 10.0  # of processor time, for what a server asks of a template at the start and one short conversation


def check_template(folder: Path) -> None:
    """Raises `ArtifactError` for a template that takes more than `SECONDS` of processor time or 1 GiB of memory. Those that we
    ship are not tried."""
    source = TokenizerFolder.open(folder).template
    if source is None or any(source == each.source for each in styles().values()):
        return
    workers = Workers(f"{__name__}:render", seconds=SECONDS)
    try:
        found = workers.ask(str(folder.absolute()))
    finally:
        workers.close()
    if found.lost:
        raise ArtifactError(
            "the chat template takes too long, or too much memory", file=folder / "chat_template.jinja", found=found.lost,
            expected=f"a short conversation within {SECONDS:g} s of processor time and 1 GiB",
            fix="mend the template, or take it out and fine-tune with a style",
        )  # fmt: skip


def render(folder: str) -> int:
    """Characters of a short conversation. Runs in the process that may be killed; what the template refuses is for the server to
    say, which reads it the same way."""
    from tutelage.chat.render import Renderer
    from tutelage.errors import UserError

    try:
        renderer = Renderer(Path(folder))
        _ = renderer.stop_ids
        return len(renderer.text([{"role": "user", "content": "a"}]))
    except UserError:
        return 0
