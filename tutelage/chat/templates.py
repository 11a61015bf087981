"""Chat templates: the styles that ship with us, and the sandbox that any checkpoint's own Jinja template runs in.

The environment offers what `transformers` offers to a template (trim_blocks, lstrip_blocks, loop controls, the `generation`
tag, `raise_exception`, `strftime_now`, a `tojson` that escapes nothing), so that a template renders the same text in both.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tutelage.errors import ArtifactError, ConfigError, Setting


@dataclass(slots=True, frozen=True)
class Style:
    """A shipped conversation style.

    Example:
        >>> style("chatml").end_of_turn
        ('<|im_end|>',)
    """

    name: str
    summary: str
    source: str  # the Jinja template
    specials: tuple[str, ...]  # control tokens that a tokenizer of this style needs, in id order
    bos: str | None
    eos: str  # ends a document
    pad: str
    end_of_turn: tuple[str, ...]
    tools: bool  # whether tool turns can be written


@functools.cache
def styles() -> dict[str, Style]:
    """Every shipped style by name."""
    folder = resources.files("tutelage.chat") / "templates"
    table = json.loads((folder / "styles.json").read_text(encoding="utf-8"))
    out = {}
    for name, row in table.items():
        lists: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        out[name] = Style(name=name, source=(folder / f"{name}.jinja").read_text(encoding="utf-8"), **lists)
    return out


def style(name: str) -> Style:
    """The shipped style of that name. Raises `ConfigError` naming the nearest one."""
    known = styles()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            "unknown conversation style",
            field="template",
            found=name,
            expected=", ".join(known),
            fix=f"did you mean {near[0]}?" if near else None,
        )
    return known[name]


class _GenerationTag(Extension):
    """`{% generation %}`: some templates mark assistant text with it. Its body is rendered as it is: spans come from proof."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def compile_template(source: str, now: datetime | None = None) -> Callable[..., str]:
    """The template as a function of `messages, tools, add_generation_prompt, bos_token, ...` that returns text.

    `now` is what `strftime_now` tells (fixed for the life of the function, so that two renderings agree across midnight).
    The sandbox gives a template no attribute of Python's internals and no way to change its arguments.
    Raises `ArtifactError` for Jinja that does not parse.
    """
    try:
        return _environment(now or datetime.now()).from_string(source).render
    except jinja2.TemplateSyntaxError as error:
        raise ArtifactError(
            f"the chat template is not valid Jinja ({error.message})",
            file="chat_template.jinja",
            line=error.lineno,
            fix=f"correct the template, or choose a shipped style: {Setting('template', 'NAME')}",
        ) from error
    except (RecursionError, ValueError, ArithmeticError, TypeError, SyntaxError, MemoryError) as error:
        raise ArtifactError(
            f"the chat template cannot be compiled ({type(error).__name__}: {str(error)[:200]})", file="chat_template.jinja",
            fix="correct the template, or choose a shipped style: template=NAME",
        ) from error  # fmt: skip


def variables(source: str) -> frozenset[str]:
    """Names that a template reads and does not make itself: what it can be told."""
    return frozenset(meta.find_undeclared_variables(_environment(datetime.now()).parse(source)))


def keys_read(source: str) -> frozenset[str]:
    """Names of attributes and keys that a template may read: those it spells, `message.content` as `message['content']`."""
    tree = _environment(datetime.now()).parse(source)
    spelt = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return frozenset(spelt | {node.attr for node in tree.find_all(nodes.Getattr)})


def _environment(moment: datetime) -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = moment.strftime
    return env
