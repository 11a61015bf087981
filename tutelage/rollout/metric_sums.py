"""Metrics of rollouts as sums and maxima that add up over batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tutelage.train import distributed


@dataclass(slots=True, frozen=True)
class MetricSums:
    """Named means, each as a sum and a count, and named maxima. Every rank has the same names."""

    sums: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    largest: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: MetricSums) -> MetricSums:
        nothing = (0.0, 0.0)
        pairs = {n: (self.sums.get(n, nothing), other.sums.get(n, nothing)) for n in {**self.sums, **other.sums}}
        return MetricSums(
            {name: (a[0] + b[0], a[1] + b[1]) for name, (a, b) in pairs.items()},
            {n: max(t.largest[n] for t in (self, other) if n in t.largest) for n in {**self.largest, **other.largest}},
        )

    def metrics(self) -> dict[str, float]:
        """The metrics over all ranks; the mean of nothing is 0."""
        totals = distributed.sum_values({name: total for name, (total, _) in self.sums.items()})
        counts = distributed.sum_values({name: count for name, (_, count) in self.sums.items()})
        return {name: totals[name] / (counts[name] or 1.0) for name in self.sums} | distributed.max_values(dict(self.largest))
