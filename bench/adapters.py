"""What an adapter's rank costs: held-out loss and memory of LoRA against full fine-tuning, over several seeds.

    python bench/adapters.py --model quickstart/base --data SOURCES --runs RUNS [--ways full,4,16]

A way is `full`, a rank, or `qlora` and a rank; `16+` trains the tables of tokens beside rank 16. Each way is tried at `--rates`
with the first seed, and repeated with the others at its best rate. Prints a JSON line a run: the held-out loss at the end of
training and the largest memory of the process; then a line a way: the mean loss, its spread over seeds, and how far it is from
the first way's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


def adapter(way: str) -> dict[str, Any]:
    """`full`, a rank, or `qlora` and a rank; with `+` the tables of tokens are trained too."""
    if way == "full":
        return {"kind": "none"}
    rank = int(way.removeprefix("qlora").removesuffix("+"))
    quantize = "nf4" if way.startswith("qlora") else "none"
    return {"kind": "lora", "rank": rank, "alpha": 2 * rank, "quantize": quantize, "embeddings": way.endswith("+")}


def one(args: argparse.Namespace) -> None:
    """One training, in this process."""
    import resource

    from tutelage import api

    way, rate, seed = args.one.split(":")
    data = api.data(kind="conversations", sources=args.data, dedup="exact", runs=args.runs)
    amount = {"epochs": args.epochs} if args.epochs else {"steps": args.steps}
    rates = {name: float(rate) for name in ("lr", "matrix_lr", "embedding_lr")}
    if way.endswith("+") and args.table_rate:
        rates["embedding_lr"] = args.table_rate
    run = api.sft(
        model=args.model, data=data, adapter=adapter(way), batch_tokens=args.batch_tokens, seed=int(seed), runs=args.runs,
        optimizer={"name": args.optimizer, **rates}, schedule={"name": "linear", "warmup": args.warmup, "final": 0.05},
        **amount, **({"sequence_length": args.sequence_length} if args.sequence_length else {}),
    )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    facts = run.facts
    print(
        json.dumps({
            "job": "adapters", "way": way, "rate": float(rate), "seed": int(seed), "loss": facts["validation_loss"],
            "peak_rss_mb": round(peak, 1), "train_seconds": facts["train_seconds"], "tokens": facts["tokens"],
        }),
        flush=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, nargs="+", help="sources of conversations")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--ways", default="full,4,16,64,256,qlora16")
    parser.add_argument("--rates", default="0.001,0.003,0.01")
    parser.add_argument("--table_rate", type=float, default=0, help="of tables beside an adapter; the adapter's when left out")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--epochs", type=float, default=0, help="instead of steps")
    parser.add_argument("--batch_tokens", type=int, default=2048)
    parser.add_argument("--sequence_length", type=int, default=0, help="the model's when left out")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args)
        return
    found = [measured(args, way) for way in args.ways.split(",")]
    full = statistics.mean(r["loss"] for r in found[0])
    for rows in found:
        losses = [r["loss"] for r in rows]
        mean = statistics.mean(losses)
        print(
            json.dumps({
                "way": rows[0]["way"], "rate": rows[0]["rate"], "seeds": len(rows), "loss": round(mean, 4),
                "spread": round(statistics.stdev(losses), 4) if len(losses) > 1 else None,
                f"above_{found[0][0]['way']}": f"{mean / full - 1:+.2%}", "peak_rss_mb": max(r["peak_rss_mb"] for r in rows),
            }),
            flush=True,
        )  # fmt: skip


def measured(args: argparse.Namespace, way: str) -> list[dict[str, Any]]:
    """The runs of a way at its best rate."""
    tried = [trained(args, way, rate, 0) for rate in args.rates.split(",")]
    best = min(tried, key=lambda r: r["loss"])
    return [best, *(trained(args, way, str(best["rate"]), seed) for seed in range(1, args.seeds))]


def trained(args: argparse.Namespace, way: str, rate: str, seed: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--one", f"{way}:{rate}:{seed}"], stdout=subprocess.PIPE, text=True, check=True
    )
    print(done.stdout, end="", flush=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


if __name__ == "__main__":
    main()
