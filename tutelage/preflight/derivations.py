"""The derived numbers of a planned training stage, as its run will print them, as far as its inputs are known."""

from __future__ import annotations

from typing import Any

from tutelage.config.train import Train
from tutelage.errors import ConfigError
from tutelage.plan.shape import Derived
from tutelage.preflight.estimates import SOME_TOKENS, data_range, derived
from tutelage.recipe import Planned, Unknown


def derivation(planned: Planned) -> list[tuple[str, str, str]] | Unknown | None:
    """(name, value, reason) of every derived number; None for a stage that derives none before it runs.

    A number that depends on the size of the data is a range until the data has been encoded, and waits for the stage that makes
    the data where that has not run.
    """
    if not isinstance(planned.config, Train):
        return None
    try:
        found = derived(planned, SOME_TOKENS)
    except Unknown as reason:
        return reason
    except ConfigError as error:  # a family that is not ours
        return Unknown(f"not known: {error.message}")
    try:
        low, *rest = data_range(planned, found)
        return _rows(low, rest[-1] if rest else low, None)
    except Unknown as reason:
        # The size of the data is open: what another size would change has to wait.
        return _rows(found, derived(planned, 10 * SOME_TOKENS), str(reason))


def _rows(low: Derived, high: Derived, waits: str | None) -> list[tuple[str, str, str]]:
    others: dict[str, Any] = {name: (value, reason) for name, value, reason in high.rows()}
    rows = []
    for name, value, reason in low.rows():
        other, why = others[name]
        if value == other:
            rows.append((name, value, reason if reason == why else "derived"))
        elif waits is not None:
            rows.append((name, "?", waits))
        else:
            rows.append((name, f"{value} - {other}", reason if reason == why else f"{reason}; or {why}"))
    return rows
