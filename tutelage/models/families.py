"""The decoder families that run on our own decoder, read from `families.yaml`. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import yaml


@dataclass(slots=True, frozen=True)
class Rule:
    """One module on disk and what it is in memory."""

    disk: str  # "*" stands for the layer's number
    ours: tuple[str, ...]  # several where the file has them fused, in row order
    transpose: bool = False  # weights stored [in, out]


@dataclass(slots=True, frozen=True)
class DiskLayout:
    """How a family names and fuses its tensors in safetensors files."""

    prefix: str  # put before names that lack it
    rules: tuple[Rule, ...]


@dataclass(slots=True, frozen=True, kw_only=True)
class Family:
    """What tells one decoder family from another.

    Example:
        >>> family("qwen3").traits["qk_norm"]
        'head'
    """

    name: str  # `model_type` in config.json
    architecture: str
    scorer: str  # the class in `transformers` that has a score head in place of the language head
    disk: DiskLayout
    keys: dict[str, str | None]  # our field -> key in config.json where they differ; None: the family has no such key
    norms: dict[str, str | None]  # attention_in, attention_out, mlp_in, mlp_out -> module name
    windows: str  # none | all | from_layer | every | no_rope
    ropes: str  # one | per_window | no_rope | learned
    traits: dict[str, Any]  # "$key" = the value of that key of config.json
    defaults: dict[str, Any]  # values of keys that a config.json leaves out
    activations: dict[str, str] = field(default_factory=dict)  # names to be read as another


@cache
def _table() -> dict[str, Any]:
    text = files("tutelage.models").joinpath("families.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return table


def names() -> tuple[str, ...]:
    """`model_type` of every family of ours."""
    return tuple(k for k in _table() if k not in ("base", "layouts", "recomputed"))


def recomputed() -> tuple[str, ...]:
    """Name endings of tensors in old files that are not weights."""
    return tuple(_table()["recomputed"])


@cache
def family(name: str) -> Family:
    """The family of a `model_type`. Raises `KeyError` for one that is not ours."""
    if name not in names():
        raise KeyError(name)
    base, own = _table()["base"], _table()[name]
    row = {**base, **own}
    for key in ("traits", "defaults"):
        row[key] = {**base[key], **own.get(key, {})}
    layout = _table()["layouts"][row["disk"]]
    rules = tuple(Rule(r["disk"], tuple(r["ours"]), r.get("transpose", False)) for r in layout["rules"])
    return Family(**{**row, "name": name, "disk": DiskLayout(layout["prefix"], rules)})
