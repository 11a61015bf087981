"""Time of a training run before it starts, as a range: FLOPs over the measured product rate and the share of it that is used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Range:
    """A quantity that is only known roughly."""

    low: float
    likely: float
    high: float

    def __mul__(self, factor: float) -> Range:
        return Range(self.low * factor, self.likely * factor, self.high * factor)

    __rmul__ = __mul__


@dataclass(frozen=True, slots=True)
class Span:
    """The two ends of a quantity of which no value between them is likelier.

    Example:
        >>> print((Span(2e6, 3e6) / Span(1e6, 4e6)).said("s"))
        0.5 to 3 s
    """

    low: float
    high: float

    def __add__(self, other: Span) -> Span:
        return Span(self.low + other.low, self.high + other.high)

    def __mul__(self, other: Span | float) -> Span:
        times = other if isinstance(other, Span) else Span(other, other)
        return Span(self.low * times.low, self.high * times.high)

    def __truediv__(self, rate: Span) -> Span:
        return Span(self.low / rate.high, self.high / rate.low)

    def said(self, unit: str) -> str:
        """For people: 2.1 to 2.6 MB, 45 to 83k tokens, 500 questions."""
        scale, letter = next(((s, x) for s, x in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if self._fits(s)), (1.0, ""))
        low, high = (f"{x / scale:.0f}" if x / scale >= 10 else f"{x / scale:.2g}" for x in (self.low, self.high))
        numbers = low if low == high else f"{low} to {high}"
        return f"{numbers} {letter}{unit}" if len(unit) <= 4 else f"{numbers}{letter} {unit}"

    def _fits(self, scale: float) -> bool:
        return self.high >= scale and (self.low >= 0.1 * scale or not self.low)


NOTHING = Span(0, 0)

# Shares of the product rate that training uses (MFU). CPU: compiled peers reach 0.5 on two cores, an eager loop 0.4. GPU:
# published runs lie between 0.21 (OPT, BLOOM 0.32) and 0.51 (LLaMA 13B); small models on large cards are below all of them.
MFU = {"cpu": Range(0.40, 0.55, 0.65), "cuda": Range(0.20, 0.40, 0.50)}


def train_seconds(flops: float, peak_flops: float, device: str = "cpu", mfu: Range | None = None) -> Range:
    """Seconds for `flops` on a machine whose matrix products reach `peak_flops` a second; `mfu` where it was measured."""
    if peak_flops <= 0:
        raise ValueError("the machine's rate is not positive")
    share = mfu or MFU["cuda" if device.startswith("cuda") else "cpu"]
    best = flops / peak_flops
    return Range(best / share.high, best / share.likely, best / share.low)


def sustained_flops(peak_flops: float, device: str = "cpu") -> float:
    """The FLOP/s that a run is likely to keep up: for a budget given in minutes."""
    return peak_flops * MFU["cuda" if device.startswith("cuda") else "cpu"].likely


def duration(seconds: float) -> str:
    """For people: 45 s, 12 min, 3.4 h, 21 d."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    for size, unit in ((60.0, "min"), (3600.0, "h")):
        if seconds / size < 100:
            return f"{seconds / size:.{0 if seconds / size >= 10 else 1}f} {unit}"
    return f"{seconds / 86400:,.0f} d"


def explain(flops: float, peak_flops: float, device: str = "cpu") -> str:
    """The estimate as one line of text, with its formula."""
    share = MFU["cuda" if device.startswith("cuda") else "cpu"]
    found = train_seconds(flops, peak_flops, device)
    return (
        f"{duration(found.low)} to {duration(found.high)} = {flops:.3g} FLOPs / ({peak_flops / 1e9:,.0f} GFLOP/s measured x "
        f"{share.low:.0%} to {share.high:.0%} used)"
    )
