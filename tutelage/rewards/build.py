"""From settings to a rubric."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from tutelage.config import rewards as config
from tutelage.errors import ConfigError
from tutelage.rewards.rubric import Rubric

# section: "module:class" (settings, *, what a stage wires) -> Reward
TABLE: dict[type[config.Term], str] = {
    config.Maths: "tutelage.rewards.maths:Maths",
    config.Answer: "tutelage.rewards.plain:Answer",
    config.Exact: "tutelage.rewards.plain:Exact",
    config.Numeric: "tutelage.rewards.plain:Numeric",
    config.Length: "tutelage.rewards.plain:Length",
    config.Regex: "tutelage.rewards.patterns:Regex",
    config.Format: "tutelage.rewards.patterns:Format",
    config.JsonSchema: "tutelage.rewards.json_schema:JsonSchema",
    config.Tests: "tutelage.rewards.unit_tests:UnitTests",
    config.RewardModel: "tutelage.rewards.model:RewardModel",
    config.Judge: "tutelage.rewards.judge:Judge",
    config.Function: "tutelage.rewards.function:Function",
    config.Environment: "tutelage.rewards.plain:Environment",
}


def build(terms: Mapping[str, config.Term], **wired: Any) -> Rubric:
    """The rubric of the terms that `config.rewards.terms_of` read.

    wired, by those terms that take it: `score_texts` (lists of ids, prompt and answer -> a score each), `generate`
    (`engine.tools.Generate`), `asked` (rollout -> the prompt as text), `sandbox`. Raises `ConfigError` for a term that needs
    what is not wired, `MissingExtra` for a library that is not installed.
    """
    made: dict[str, tuple[Any, float]] = {}
    try:
        for name, settings in terms.items():
            module, _, kind = TABLE[type(settings)].partition(":")
            make = getattr(import_module(module), kind)
            takes = [p for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY]
            for parameter in takes:
                if parameter.default is parameter.empty and parameter.name not in wired:
                    raise ConfigError(
                        f"reward `{name}` needs `{parameter.name}`, which this stage does not have", field=f"rewards.{name}"
                    )
            try:
                reward = make(settings, **{p.name: wired[p.name] for p in takes if p.name in wired})
            except ConfigError as error:  # a term knows its settings, not the name that it has in the recipe
                raise error.but(field=f"rewards.{name}.{error.field}" if error.field else f"rewards.{name}") from error
            made[name] = (reward, settings.weight)
    except BaseException:
        Rubric(made).close()
        raise
    return Rubric(made)
