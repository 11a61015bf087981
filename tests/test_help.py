"""Help texts: each one is read alone, in a terminal, by somebody who has not seen its neighbours."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import typer

from tests.pipeline import tutelage
from tutelage.cli.main import app
from tutelage.config.base import Section, subsection
from tutelage.config.rewards import REWARD_TYPES
from tutelage.stages import FILE_COMMANDS, STAGES

UNITS = {  # end of a setting's name: what its help has to name
    "seconds": "second", "_mb": "MB", "_gib": "GiB", "chars": "character", "steps": "step", "_every": "step",
    "warmup": "step", "epochs": "passes", "max_tokens": "token", "batch_tokens": "token", "micro_tokens": "token",
    "sequence_length": "token", "max_length": "token", "max_target": "token", "vocab_size": "token", "micro_rows": "row",
    "share": "share|0 to 1", "threads": "thread", "workers": "process", "size": "parameter|token", "days": "day",
    "per_minute": "per minute",
}  # fmt: skip
FRAGMENT = re.compile(r"(?i)(of|in|for|to|where|how|what|which|whose|that|and|or|also|its|with|by) ")


def settings(section: type[Section], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        yield f"{prefix}.{name}", field.description or ""
        if (inner := subsection(field)) is not None:
            yield from settings(inner, f"{prefix}.{name}")


def every_text() -> dict[str, str]:
    """Help by the dotted name of a setting, or by command and option."""
    found: dict[str, str] = {}
    for name, spec in (STAGES | FILE_COMMANDS).items():
        found |= dict(settings(spec.config(), name))
    for name, term in REWARD_TYPES.items():
        found |= dict(settings(term, f"rewards.{name}"))
    group = typer.main.get_command(app)
    waiting = [("tutelage", group)]
    while waiting:
        path, command = waiting.pop()
        waiting += [(f"{path} {n}", c) for n, c in getattr(command, "commands", {}).items()]
        if command.name in (*STAGES, *FILE_COMMANDS, "extend-vocab"):
            continue  # their options are the settings
        found |= {f"{path} --{p.name}": getattr(p, "help", None) or "" for p in command.params if p.name != "help"}
    return found


def test_every_help_text_stands_alone() -> None:
    """`--seed N  of the data order`: a fragment whose beginning is in another line."""
    wrong = {
        name: text
        for name, text in every_text().items()
        if not re.match(r"[A-Z0-9`]", text) or FRAGMENT.match(text) or not text.rstrip(")").endswith((".", "…"))
    }
    assert not wrong, wrong


def test_numbers_have_units() -> None:
    """`--max-tokens N  longest answer`, which may be words, characters or seconds."""
    wrong = {}
    for name, text in every_text().items():
        key = re.split(r"[. ]", name)[-1].removeprefix("--")
        unit = next((u for end, u in UNITS.items() if key.endswith(end)), None)
        if unit is not None and not re.search(unit, text, re.I):
            wrong[name] = text
    assert not wrong, wrong


def test_every_stage_says_what_it_does() -> None:
    """A stage whose line in `tutelage --help` is empty, a fragment, or two lines."""
    for spec in (STAGES | FILE_COMMANDS).values():
        assert re.fullmatch(r"[A-Z].*\.", spec.help), spec
        assert re.split(r"\W", spec.help)[0].lower() not in ("of", "the", "a", "what"), spec


def test_serve_is_readable_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """Texts in a column of 16 characters, since one long option made all of them so narrow; options cut to `--no-prefix-ca…`."""
    page = tutelage(capsys, "serve", "--help", columns=80).out
    assert "…" not in page and max(map(len, page.splitlines())) <= 80 and len(page.splitlines()) < 100
    assert "Address to listen on; other machines reach" in page


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_nested_settings_are_grouped(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A hundred paragraphs below the options; defaults that are another section's."""
    page = tutelage(capsys, stage, "--help", columns=100).out
    for key, field in STAGES[stage].config().model_fields.items():
        if (inner := subsection(field)) is not None:
            title = next(line for line in page.splitlines() if (field.description or "").rstrip(".") in line)
            part = page[page.index(title) :].split("╰")[0]
            assert all(f"--set {key}.{name}=" in part for name in inner.model_fields)
            assert not re.search(r"^│\s+│$", part, re.M)  # single-spaced
    assert f"--set optimizer.name={'muon' if stage == 'sft' else 'adamw'}" in page
