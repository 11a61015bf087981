"""Settings that change nothing where others are as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tutelage.config.base import Section
from tutelage.errors import ConfigError


def reject_unused(config: Section, idle: Mapping[str, Iterable[str]]) -> None:
    """Raises `ConfigError` for a setting that is not as it is when left out, though it changes nothing. `idle`: the names of such
    settings, by why they are ("" where that goes without saying).

    Example:
        reject_unused(config, {f"{Setting('kl', '0')}": ("reference", "kl_in") if config.kl == 0 else ()})
    """
    for why, names in idle.items():
        for name in names:
            default = type(config).model_fields[name].default
            if getattr(config, name) != default:
                raise ConfigError(
                    f"this setting changes nothing here{f', with {why}' if why else ''}", field=name,
                    found=getattr(config, name), expected=f"{default}, as it is when left out",
                    fix=f"leave {name} out, or set what it goes with",
                )  # fmt: skip
