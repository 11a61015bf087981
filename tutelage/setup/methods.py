"""From a stage's settings to the method it trains with. Imports without torch, so that `preflight` checks the same."""

from __future__ import annotations

from collections.abc import Sequence

from tutelage.config.base import nearest
from tutelage.config.stages import Preference, Reward, Rl
from tutelage.errors import ConfigError
from tutelage.objectives import TABLE, Objective, method, objective

# Settings of a stage that are passed to its method
PREFERENCE_SETTINGS = (
    "beta", "label_smoothing", "offset", "gamma", "sft", "tau", "average", "prompts", "desirable_weight", "undesirable_weight",
)  # fmt: skip
REWARD_SETTINGS = ("centring", "loss", "delta")
PREFERENCE_DATA = ("preferences", "ratings")
POLICY_NAMES = {"kl_weight": "kl", "kl": "kl_estimator", "entropy_weight": "entropy"}  # an objective's names of settings: ours
ALSO_CALLED = {"sigmoid": "dpo", "bradley_terry": "reward"}


def check_method(name: str, names: Sequence[str], what: str = "is of this stage") -> None:
    """Raises `ConfigError` for a method that is none of `names`."""
    if name not in names:
        near = ALSO_CALLED.get(name) or nearest(name, list(names))
        known = " (it is a method of another stage)" if name in TABLE else ""
        raise ConfigError(
            f"no method of this name {what}{known}", field="method", found=name, expected=", ".join(names),
            fix=f"did you mean `{near}`?" if near in names else None,
        )  # fmt: skip


def preference_method(config: Preference) -> Objective:
    """The objective of `preference`. Raises `ConfigError` for a method that does not learn from preferences or ratings."""
    check_method(config.method, [name for name, row in TABLE.items() if row.data in PREFERENCE_DATA and row.part == "policy"])
    chosen = objective(config.method, **{key: getattr(config, key) for key in PREFERENCE_SETTINGS})
    if config.reference is not None and not method(config.method).reference:
        raise ConfigError("this method keeps no reference", field="reference", found=config.method, fix="leave `reference` out")
    return chosen


def reward_method(config: Reward, data: str | None, name: str) -> Objective:
    """The objective of `reward` for data of a kind (None: not known yet). Raises `ConfigError` for a method that does not learn
    from such data."""
    if data is not None:
        known = [name for name, row in TABLE.items() if row.part == "reward" and row.data == data]
        check_method(name, known, f"learns from {data}")
    return objective(name, **{key: getattr(config, key) for key in REWARD_SETTINGS})


def policy_method(config: Rl) -> Objective:
    """The objective of `rl`. Raises `ConfigError` for a method that does not learn from rollouts."""
    check_method(config.method, [name for name, row in TABLE.items() if row.data == "rollouts"])
    return objective(
        config.method, POLICY_NAMES, clip_low=config.clip_low, clip_high=config.clip_high,
        kl_weight=config.kl if config.kl and config.kl_in == "loss" else None,
        kl=config.kl_estimator if config.kl_in == "loss" else None, delta=config.delta, value_clip=config.value_clip,
        entropy_weight=config.entropy or None, temperature=None if config.temperature == 1 else config.temperature,
    )  # fmt: skip
