"""Objectives: one pure function a file, and one explicit table.

An objective takes the named parts that are trained, one micro-batch and its own settings, and returns named terms
`(sum, unit)`. It never divides: the loop does, by the unit's count over the whole global batch. A method whose terms need a
number of that whole batch has a second function, `prepare`, which runs first over all micro-batches without gradients; what it
returns, divided likewise, is in `batch.answers.shared`. A new method is a file and a row here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tutelage.config.base import nearest
from tutelage.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tutelage.models.interface import Batch


@dataclass(frozen=True, slots=True)
class Term:
    """One named part of a loss. A name that begins with "_" is only measured: it has no weight in the loss."""

    sum: Tensor  # scalar, summed over the micro-batch
    unit: str  # whose global count it is divided by: tokens | sequences | pairs | …


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table."""

    function: str  # "module:function" (parts, batch, *, settings) -> terms
    data: str = "rows"  # what its batches hold: rows | preferences | ratings | rollouts | examples
    reference: bool = False  # whether answers bring the log-probabilities of a reference model, in `per_completion["reference"]`
    prepare: str | None = None  # "module:function" (parts, batch, *, settings) -> terms
    fixed: Mapping[str, Any] = field(default_factory=dict)  # settings that make this method of a family
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of settings, where the function's own are another method's
    part: str = "policy"  # which of the parts it is for: policy | reward


@dataclass(frozen=True, slots=True)
class Objective:
    """A method with its settings."""

    name: str
    function: Callable[..., dict[str, Term]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    preparing: Callable[..., dict[str, Term]] | None = None

    def __call__(self, parts: dict[str, nn.Module], batch: Batch) -> dict[str, Term]:
        return self.function(parts, batch, **self.settings)

    def prepare(self, parts: dict[str, nn.Module], batch: Batch) -> dict[str, Term]:
        """What has to be known of the global batch first; nothing for most methods."""
        return {} if self.preparing is None else self.preparing(parts, batch, **self.settings)


_PREFERENCE, _ABSOLUTE, _KTO = (f"tutelage.objectives.{name}" for name in ("preference", "absolute", "kto"))
_DISTIL = "tutelage.objectives.distil"
_REWARD = "tutelage.objectives.reward"
_POLICY = "tutelage.objectives.policy_gradient:policy_gradient"
_NO_CLIP = {"form": "none", "level": "token", "clip_low": 0.0, "clip_high": 0.0, "delta": None}
TABLE: dict[str, Method] = {
    "next_token": Method("tutelage.objectives.next_token:next_token"),
    "dpo": Method(f"{_PREFERENCE}:dpo", "preferences", reference=True),
    "cdpo": Method(f"{_PREFERENCE}:cdpo", "preferences", reference=True),
    "robust": Method(f"{_PREFERENCE}:robust", "preferences", reference=True),
    "dpo_norm": Method(f"{_PREFERENCE}:dpo_norm", "preferences", reference=True),
    "ipo": Method(f"{_PREFERENCE}:ipo", "preferences", reference=True),
    "hinge": Method(f"{_PREFERENCE}:hinge", "preferences", reference=True),
    "exo_pair": Method(f"{_PREFERENCE}:exo_pair", "preferences", reference=True),
    "discopop": Method(f"{_PREFERENCE}:discopop", "preferences", reference=True),
    "nca_pair": Method(f"{_ABSOLUTE}:nca_pair", "preferences", reference=True),
    "sppo_hard": Method(f"{_ABSOLUTE}:sppo_hard", "preferences", reference=True),
    "apo_zero": Method(f"{_ABSOLUTE}:apo_zero", "preferences", reference=True),
    "apo_down": Method(f"{_ABSOLUTE}:apo_down", "preferences", reference=True),
    "kto": Method(f"{_KTO}:kto", "ratings", reference=True, prepare=f"{_KTO}:reference_point"),
    "orpo": Method("tutelage.objectives.orpo:orpo", "preferences"),
    "simpo": Method("tutelage.objectives.simpo:simpo", "preferences"),
    "cpo": Method("tutelage.objectives.cpo:cpo", "preferences"),
    "cpo_simpo": Method("tutelage.objectives.simpo:simpo", "preferences", defaults={"sft": 1.0}),
    "forward_kl": Method(f"{_DISTIL}:forward_kl"),
    "reverse_kl": Method(f"{_DISTIL}:reverse_kl"),
    "jsd": Method(f"{_DISTIL}:jsd"),
    "reward": Method(f"{_REWARD}:reward", "preferences", part="reward"),
    "rating": Method(f"{_REWARD}:rating", "ratings", part="reward"),
    "process": Method(f"{_REWARD}:process", "ratings", part="reward"),
    "reinforce": Method(_POLICY, "rollouts", fixed={**_NO_CLIP, "unit": "sequences"}),
    "rloo": Method(_POLICY, "rollouts", fixed={"form": "clip", "level": "answer", "unit": "sequences"}),
    "grpo": Method(_POLICY, "rollouts", fixed={"form": "clip", "level": "token", "unit": "sequences"}),
    "dr_grpo": Method(_POLICY, "rollouts", fixed={"form": "clip", "level": "token", "unit": "sequences"}),
    "dapo": Method(_POLICY, "rollouts", fixed={"form": "clip", "level": "token", "unit": "tokens"}, defaults={"clip_high": 0.28}),
    "gspo": Method(
        _POLICY,
        "rollouts",
        fixed={"form": "clip", "level": "sequence", "unit": "sequences"},
        defaults={"clip_low": 3e-4, "clip_high": 4e-4},
    ),
    "cispo": Method(
        _POLICY,
        "rollouts",
        fixed={"form": "cispo", "level": "token", "unit": "tokens", "delta": None},
        defaults={"clip_low": 1.0, "clip_high": 4.0},
    ),
    "ppo": Method("tutelage.objectives.ppo:ppo", "rollouts"),
    "classify": Method("tutelage.objectives.classify:classify", "examples"),
    "tag": Method("tutelage.objectives.classify:tag", "examples"),
}


def method(name: str) -> Method:
    """The row of a name. Raises `ConfigError` with the nearest one."""
    if name not in TABLE:
        near = nearest(name, list(TABLE))
        raise ConfigError(
            "unknown objective",
            found=name,
            expected=f"one of: {', '.join(TABLE)}",
            fix=f"did you mean `{near}`?" if near else None,
        )
    return TABLE[name]


def objective(name: str, called: Mapping[str, str] | None = None, /, **settings: Any) -> Objective:
    """A method with its settings; those that are None keep the method's defaults. `called`: what a stage calls them, where that
    is another name. Raises `ConfigError` for one that the method does not have; of those that it has, the error names what the
    stage can give."""
    row = method(name)
    function = _function(row.function)
    known = [
        p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY and p.name not in row.fixed
    ]
    given = {key: value for key, value in settings.items() if value is not None}
    for key in given:
        if key not in known:
            names = called or {}
            own, offered = names.get(key, key), [names.get(k, k) for k in known if k in settings or not called]
            near = None if called else nearest(own, offered)
            raise ConfigError(
                f"{name} has no setting `{own}`", field=own, found=given[key],
                expected=f"one of: {', '.join(offered)}" if offered else "no settings",
                fix=f"did you mean `{near}`?" if near else f"leave {own} out",
            )  # fmt: skip
    return Objective(name, function, {**row.defaults, **given, **row.fixed}, _function(row.prepare) if row.prepare else None)


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found
