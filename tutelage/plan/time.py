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
