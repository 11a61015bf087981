"""Learning from people against TRL, both sides in one run: DPO, reward models, GRPO, LoRA; ratios of rates and of memory.

    python bench/tune.py --peers FOLDER --peer-scripts FOLDER --data FOLDER [--rounds 3] [--jobs dpo,reward,grpo,lora]

Each round runs every contender in a process of its own, in an order that turns. Prints a JSON line per contender and round, then
a line a job: ours over theirs, median over rounds with a 95% bootstrap interval, and our peak memory over theirs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import compare
import run as driver

HERE = Path(__file__).resolve().parent
FIELDS = {
    "dpo": "pairs_per_s", "reward": "pairs_per_s", "grpo": "completions_per_s",
    "lora": "tokens_per_s",
}  # fmt: skip


def commands(args: argparse.Namespace) -> dict[str, dict[str, list[str]]]:
    """Job -> contender -> command."""
    python, work = str(args.peers / "PEERS/bin/python"), args.peers / "work"
    shared = ["--data", str(args.data), "--work", str(work)]
    ours = ["--data", str(args.data), "--tokenizer", str(work / "tokenizer")]

    def peer(script: str, *rest: str) -> list[str]:
        return [python, str(args.peer_scripts / script), *shared, *rest]

    def own(script: str, *rest: str) -> list[str]:
        return [sys.executable, str(HERE / script), *ours, *rest]

    return {
        "dpo": {
            "tutelage": own("answers.py", "--job", "dpo"),
            "trl": peer("preference_trl.py", "--job", "dpo"),
            "trl_precompute": peer("preference_trl.py", "--job", "dpo", "--precompute", "1"),
        },
        "reward": {"tutelage": own("answers.py", "--job", "reward"), "trl": peer("preference_trl.py", "--job", "reward")},
        "grpo": {"tutelage": own("answers.py", "--job", "grpo"), "trl": peer("grpo_trl.py")},
        "lora": {"tutelage": own("sft.py", "--lora", "16"), "trl": peer("sft_trl.py", "--mode", "pad", "--lora", "16")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--peer-scripts", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", default="dpo,reward,grpo,lora")
    args = parser.parse_args()
    wanted = {job: rows for job, rows in commands(args).items() if job in args.jobs.split(",")}
    records: list[dict[str, Any]] = []
    for number in range(args.rounds):
        for job, rows in wanted.items():
            names = list(rows)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                found, errors = driver.run(rows[name], 600)
                if not found:
                    driver.say(f"{job} {name} failed:\n{errors[-800:]}")
                    continue
                record = {**found[-1], "job": job, "peer": name, "round": number}
                record["disturbed"] = record["other_cpu"] > 0.1
                records.append(record)
                print(json.dumps(record), flush=True)
    for job in wanted:
        print(json.dumps(summary(records, job)), flush=True)


def summary(records: list[dict[str, Any]], job: str) -> dict[str, Any]:
    """Rates and ratios of a job."""
    of = {n: [r for r in records if r["job"] == job and r["peer"] == n] for n in dict.fromkeys(r["peer"] for r in records)}
    of = {n: rows for n, rows in of.items() if rows}
    out: dict[str, Any] = {"job": job, "rates": {n: statistics.median(r[FIELDS[job]] for r in rows) for n, rows in of.items()}}
    out["ratios"] = [r.to_json() for r in compare.ratios(records, job, FIELDS[job])]
    if job == "dpo" and "tutelage" in of:
        with_reference = statistics.median(r["pairs_per_s_with_reference"] for r in of["tutelage"])
        out["with_reference"] = {n: round(with_reference / rate, 2) for n, rate in out["rates"].items() if n != "tutelage"}
    memory = {n: statistics.median(r["peak_rss_mb"] for r in rows) for n, rows in of.items()}
    out["memory"] = {n: round(memory.get("tutelage", 0) / value, 3) for n, value in memory.items() if n != "tutelage"}
    return out


if __name__ == "__main__":
    main()
