"""From the records of interleaved rounds to ratios with intervals, and tables."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]
OURS = "tutelage"


@dataclass(frozen=True)
class Ratio:
    """Ours over theirs, round by round."""

    peer: str
    field: str
    median: float
    low: float  # 95% interval of the median: bootstrap over rounds
    high: float
    rounds: int

    def to_json(self) -> Record:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def bootstrap_median(values: Sequence[float], draws: int = 10_000, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the median. With five rounds it is nearly their range: more rounds make it narrower."""
    x = np.asarray(values, np.float64)
    picks = np.random.default_rng(0).integers(0, len(x), (draws, len(x)))
    medians = np.median(x[picks], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def usable(records: Iterable[Record], job: str) -> dict[int, dict[str, Record]]:
    """Round -> contender -> record of a job. Rounds in which anything was disturbed are left out where five others remain."""
    rounds: dict[int, dict[str, Record]] = defaultdict(dict)
    for record in records:
        if record["job"] == job:
            rounds[record["round"]][record["peer"]] = record
    clean = {r: found for r, found in rounds.items() if not any(x["disturbed"] for x in found.values())}
    return clean if len(clean) >= 5 else dict(rounds)


def less_base(record: Record) -> float | None:
    """Peak memory less the process before the model was built, in MB."""
    base = record.get("base_rss_mb")
    return None if base is None else float(record["peak_rss_mb"]) - float(base)


def value_of(record: Record, field: str) -> float | None:
    return less_base(record) if field == "less_base_mb" else record.get(field)


def ratios(records: Iterable[Record], job: str, field: str, ours: str = OURS) -> list[Ratio]:
    """Ours over each peer in the rounds that have both."""
    rounds = usable(records, job)
    peers = sorted({p for found in rounds.values() for p in found if not p.startswith(OURS)})
    out = []
    for peer in peers:
        pairs = [(value_of(f[ours], field), value_of(f[peer], field)) for f in rounds.values() if ours in f and peer in f]
        each = [a / b for a, b in pairs if a and b]
        if each:
            low, high = bootstrap_median(each)
            out.append(Ratio(peer, field, statistics.median(each), low, high, len(each)))
    return out


def summary(records: list[Record], job: str) -> list[Record]:
    """One row a contender: medians over rounds, and the share of the product rate that was measured in the same round."""
    rounds = usable(records, job)
    rates = {r["round"]: r["flops_per_s"] for r in records if r["job"] == "rate"}
    rows = []
    for name in dict.fromkeys(p for found in rounds.values() for p in found):
        mine = [(number, found[name]) for number, found in rounds.items() if name in found]
        speeds = [x["tokens_per_s_median"] for _, x in mine]
        shares = [
            x["tokens_per_s_median"] * x["flops_per_token"] / rates[n] for n, x in mine if "flops_per_token" in x and n in rates
        ]
        bare = [b for _, x in mine if (b := less_base(x)) is not None]
        rows.append(
            {
                "contender": name,
                "rounds": len(mine),
                "tokens_per_s": statistics.median(speeds),
                "worst": min(speeds),
                "best": max(speeds),
                "mfu": statistics.median(shares) if shares else None,
                "peak_mb": statistics.median(x["peak_rss_mb"] for _, x in mine),
                "less_base_mb": statistics.median(bare) if bare else None,
                "loss_end": mine[-1][1].get("loss_end"),
                "fill": mine[-1][1].get("fill"),
                "disturbed": sum(bool(x["disturbed"]) for _, x in mine),
            }
        )
    return sorted(rows, key=lambda row: -float(row["tokens_per_s"]))


def table(job: str, rows: list[Record], found: list[Ratio], missing: list[str]) -> Any:
    """A rich table of a job."""
    from rich.table import Table

    by_peer = {r.peer: r for r in found}
    notes = "; ".join(["ratio: ours / theirs, median of rounds with 95% interval", *missing])
    out = Table(
        "contender", "tokens/s", "range", "share of products", "peak MB", "less base", "ours / theirs", title=job, caption=notes
    )
    for row in rows:
        ratio = by_peer.get(row["contender"])
        out.add_row(
            row["contender"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['worst']:,.0f} to {row['best']:,.0f}" + (f", {row['disturbed']} disturbed" if row["disturbed"] else ""),
            "" if row["mfu"] is None else f"{row['mfu']:.0%}",
            f"{row['peak_mb']:,.0f}",
            "" if row["less_base_mb"] is None else f"{row['less_base_mb']:,.0f}",
            "" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
        )
    return out


def run_or_compare(
    parser: argparse.ArgumentParser,
    ours: Callable[[argparse.Namespace], None],
    rounds: Callable[[argparse.Namespace, Path], None],
) -> None:
    """What a script does that is its own driver: one run of our side, or all sides in a folder that goes away afterwards."""
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--peer-scripts", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ours", action="store_true", help="run our engine once (what the driver calls)")
    args = parser.parse_args()
    if args.ours:
        ours(args)
        return
    if not (args.peers and args.peer_scripts and args.data):
        parser.error("--peers, --peer-scripts and --data are needed to compare")
    with tempfile.TemporaryDirectory() as scratch:
        rounds(args, Path(scratch))
