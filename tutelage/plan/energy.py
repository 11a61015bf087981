"""Energy, emissions and cost of a run. Each figure says whether it was measured or estimated.

kWh = watts x hours / 1000 x PUE; grams of CO2 equivalent = kWh x the grid's intensity (Patterson et al. 2021).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from tutelage.errors import ConfigError
from tutelage.plan.machine import core_count, memory_bytes

RAPL = Path("/sys/class/powercap")
Origin = Literal["measured", "estimated"]


@functools.cache
def prices(file: Path | None = None) -> dict[str, Any]:
    """The table of watts, grids and prices: ours, or the user's `file` (whole, not merged)."""
    text = (
        file.read_text(encoding="utf-8") if file else files("tutelage.plan").joinpath("prices.yaml").read_text(encoding="utf-8")
    )
    table: dict[str, Any] = yaml.safe_load(text)
    return table


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """What a run took. `origin` is that of `kwh`; grams and cost are always kWh times a table's figure."""

    kwh: float  # PUE included
    watts: float  # mean
    origin: Origin
    because: str  # where the watts come from
    pue: float
    grams_co2: float
    grams_per_kwh: float
    country: str
    cost: float  # of the electricity
    currency: str

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def explain(self) -> str:
        cost = f"{self.cost:.3g} {self.currency} of electricity (estimated)"
        return (
            f"{self.kwh:.4g} kWh ({self.origin}: {self.because}, PUE {self.pue:g}), {self.grams_co2:.3g} g CO2 "
            f"(estimated: {self.grams_per_kwh:g} g/kWh, {self.country}), {cost}"
        )


def energy(
    seconds: float,
    device: str,
    *,
    count: int = 1,
    watts: float | None = None,
    joules: float | None = None,
    country: str | None = None,
    pue: float | None = None,
    table: Mapping[str, Any] | None = None,
) -> Energy:
    """Energy of `seconds` on `count` devices named `device` (a GPU in the table, else this machine's CPU).

    `joules` is a measurement (`Meter`) and wins; `watts` (of one device) is the user's own figure. Raises `ConfigError` for a
    country that the table lacks.
    """
    table = table or prices()
    defaults = table["defaults"]
    country, pue = country or defaults["country"], defaults["pue"] if pue is None else pue
    grid = table["grid_grams_per_kwh"]
    if country not in grid:
        raise ConfigError(
            "no grid intensity for this country", field="country", found=country, expected=f"one of: {', '.join(grid)}"
        )
    origin: Origin = "estimated"
    if joules is not None:
        origin, power, because = "measured", joules / max(seconds, 1e-9), "the processor's own counters (RAPL)"
    elif watts is not None:
        power, because = watts * count, f"{count} x {watts:g} W, given"
    else:
        power, because = _table_watts(device, count, table)
    kwh = power * seconds / 3.6e6 * pue
    return Energy(
        kwh=kwh, watts=power, origin=origin, because=because, pue=pue, grams_co2=kwh * grid[country], grams_per_kwh=grid[country],
        country=country, cost=kwh * defaults["electricity_per_kwh"], currency=defaults["currency"],
    )  # fmt: skip


def _table_watts(device: str, count: int, table: Mapping[str, Any]) -> tuple[float, str]:
    name = max((n for n in table["devices"] if n.lower() in device.lower()), key=len, default=None)
    if name is not None:
        one = float(table["devices"][name])
        return one * count, f"{count} x {one:g} W, board power of {name}"
    defaults, cores, gigabytes = table["defaults"], core_count(), memory_bytes() / 1e9
    power = cores * defaults["cpu_watts_per_core"] + gigabytes * defaults["memory_watts_per_gb"]
    return power, (
        f"{cores} cores x {defaults['cpu_watts_per_core']:g} W + {gigabytes:.0f} GB x {defaults['memory_watts_per_gb']:g} W"
    )


def rent(seconds: float, device: str, count: int = 1, table: Mapping[str, Any] | None = None) -> tuple[float, float] | None:
    """Low and high price of renting the devices for so long, in USD; None for a device without a price."""
    found = (table or prices())["rent_per_hour"]
    name = max((n for n in found if n.lower() in device.lower()), key=len, default=None)
    if name is None:
        return None
    low, high = found[name]
    hours = seconds / 3600 * count
    return low * hours, high * hours


class Meter:
    """Reads the processor's energy counters (RAPL) from now on; `joules()` is None where they can't be read.

    They count the whole package, whoever uses it, and virtual machines rarely have them.
    """

    def __init__(self, root: Path = RAPL) -> None:
        self.domains = [d for d in sorted(root.glob("intel-rapl:[0-9]*")) if d.name.count(":") == 1]
        self.start = self._read()

    def _read(self) -> list[int] | None:
        try:
            values = [int((d / "energy_uj").read_text()) for d in self.domains]
        except (OSError, ValueError):
            return None
        return values or None

    def joules(self) -> float | None:
        """Energy since the meter was made. A counter wraps about once an hour under load: one wrap is undone."""
        now = self._read()
        if self.start is None or now is None:
            return None
        total = 0
        for domain, before, after in zip(self.domains, self.start, now, strict=True):
            if after < before:
                after += int((domain / "max_energy_range_uj").read_text())
            total += after - before
        return total / 1e6
