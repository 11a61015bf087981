"""All benchmarks against the peers, both sides in one run: interleaved rounds, median of the per-round ratios, one table a job.

    python bench/run.py --peers FOLDER --peer-scripts FOLDER --data FOLDER --rounds 5

`--peers` holds the peers' environments PEERS and LITGPT and the scratch folder `work` that the peers' `prepare.py` filled.
`--peer-scripts` holds `pretrain_hf.py`, `pretrain_litgpt.py`, `sft_trl.py`. What is missing is named, and the rest runs.
Writes bench/results/<date>.json: machine, versions, every record, ratios.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import common
import compare

HERE = Path(__file__).resolve().parent
JOBS = ("pretrain", "sft", "startup", "tokens")
TICK, CORES = os.sysconf("SC_CLK_TCK"), os.cpu_count() or 1


@dataclass
class Plan:
    """What will run, and what could not be found."""

    contenders: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # job -> name -> command
    missing: dict[str, list[str]] = field(default_factory=dict)


def cpu() -> tuple[float, float, float]:
    """Seconds used by everything, stolen by the hypervisor, and used by our finished children."""
    values = [int(x) / TICK for x in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]]
    kids = resource.getrusage(resource.RUSAGE_CHILDREN)
    return values[0] + values[1] + values[2], values[7], kids.ru_utime + kids.ru_stime


def wait_idle(patience: float) -> None:
    """Returns once the machine was idle for two seconds, or after `patience` seconds."""
    end, calm = time.monotonic() + patience, 0
    while calm < 2 and time.monotonic() < end:
        before = cpu()[0]
        time.sleep(1)
        calm = calm + 1 if cpu()[0] - before < 0.1 * CORES else 0


def run(command: list[str], timeout: float) -> tuple[list[dict[str, Any]], str]:
    """The JSON lines of a command with the share of the cores that others took, and its errors."""
    before, started = cpu(), time.monotonic()
    try:
        done = subprocess.run(command, text=True, capture_output=True, timeout=timeout)
        lines, errors = [x for x in done.stdout.splitlines() if x.startswith("{")], done.stderr
    except subprocess.TimeoutExpired:
        lines, errors = [], f"no end after {timeout:.0f} s"
    after, wall = cpu(), time.monotonic() - started
    other = (after[0] - before[0] - (after[2] - before[2])) / wall / CORES
    steal = (after[1] - before[1]) / wall / CORES
    extra = {"wall_s": round(wall, 1), "other_cpu": round(other, 3), "steal": round(steal, 3)}
    rows = []
    for line in lines:
        try:
            rows.append({**json.loads(line), **extra})
        except ValueError:
            continue  # a library's own output that only looks like ours
    return [r for r in rows if "job" in r], errors


def plan(args: argparse.Namespace, scratch: Path) -> Plan:
    """The contenders of each job, by what is there."""
    out = Plan({"pretrain": {}, "sft": {}}, {"pretrain": [], "sft": []})
    rows, counts = scratch / "rows.npy", ["--steps", str(args.steps), "--warmup", str(args.warmup)]
    ours = [sys.executable, str(HERE / "pretrain.py"), "--rows", str(rows), *counts, *args.ours]
    out.contenders["pretrain"]["tutelage"] = ours
    if args.peers and args.peer_scripts and args.data:
        plan_peers(args, rows, counts, out)
    else:
        for job in ("pretrain", "sft"):
            out.missing[job].append("peers left out: give --peers, --peer-scripts and --data")
    out.missing["pretrain"].append("nanochat left out (no checkout at hand)")
    out.contenders["pretrain"]["tutelage_one_pass"] = [*ours, "--micro", "16", "--label", "_one_pass"]
    if not rows.exists():
        common.make_rows(rows, (args.steps + args.warmup) * common.BATCH)
    return out


def plan_peers(args: argparse.Namespace, rows: Path, counts: list[str], out: Plan) -> None:
    """Adds the peers whose environments are there, and our side of the job that needs their tokenizer."""
    work = args.peers / "work"
    hugging, lit = args.peers / "PEERS/bin/python", args.peers / "LITGPT/bin/python"
    shared = ["--data", str(args.data), "--work", str(work)]

    def peer(python: Path, script: str, *rest: str) -> list[str]:
        return [str(python), str(HERE / "peer.py"), str(args.peer_scripts), script, *shared, *counts, *rest]

    pretrain, sft = out.contenders["pretrain"], out.contenders["sft"]
    if hugging.exists() and (work / "tokenizer").is_dir():
        make_peer_rows(hugging, args, work, rows)
        for name in ("trainer", "trainer_compile", "loop_compile"):
            pretrain[name] = peer(hugging, "pretrain_hf.py", "--peer", name)
        ours = [sys.executable, str(HERE / "sft.py"), "--data", str(args.data), "--tokenizer", str(work / "tokenizer"), *counts]
        sft["tutelage"] = [*ours, *args.ours]
        for mode in ("pad", "packing_wrapped", *(("packing", "padding_free", "pad_sorted") if args.full else ())):
            sft[f"trl_{mode}"] = peer(hugging, "sft_trl.py", "--mode", mode)
    else:
        out.missing["pretrain"].append(f"transformers left out (no {hugging}, or no {work / 'tokenizer'})")
        out.missing["sft"].append(f"left out: needs the peers' tokenizer and TRL (no {hugging}, or no {work / 'tokenizer'})")
    if lit.exists() and (work / "rows.pt").exists():
        pretrain["litgpt"] = peer(lit, "pretrain_litgpt.py", "--rows", str(work / "rows.pt"))
    else:
        out.missing["pretrain"].append(f"litgpt left out (no {lit}, or no {work / 'rows.pt'})")


def make_peer_rows(python: Path, args: argparse.Namespace, work: Path, file: Path) -> None:
    """The peers' own rows as a numpy file, made by their code in their environment."""
    count = (args.steps + args.warmup) * common.BATCH
    code = (
        "import sys, types; sys.path.insert(0, sys.argv[1]); import common, numpy; "
        "a = types.SimpleNamespace(data=sys.argv[2], work=sys.argv[3], seed=0); "
        f"numpy.save(sys.argv[4], common.blocks(a, {count}).numpy())"
    )
    subprocess.run(
        [str(python), "-c", code, str(args.peer_scripts), str(args.data), str(work), str(file)], check=True, capture_output=True
    )


def rounds_of(args: argparse.Namespace, job: str, commands: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Runs every contender once a round, in an order that turns, each after the machine came to rest."""
    records: list[dict[str, Any]] = []
    names, dead = list(commands), set()
    for number in range(args.rounds):
        wait_idle(args.patience)
        rate, _ = run([sys.executable, str(HERE / "rate.py")], 120)
        records += [{**r, "round": number, "disturbed": False} for r in rate]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            for attempt in range(0 if name in dead else 1 + args.retries):
                wait_idle(args.patience)
                found, errors = run(commands[name], args.timeout)
                found = [r for r in found if r["job"] == job]
                if not found:
                    dead.add(name)
                    say(f"{job} {name} failed and is left out from here on:\n{errors[-1500:]}")
                    break
                record = {**found[-1], "peer": name, "round": number, "attempt": attempt}
                record["disturbed"] = record["other_cpu"] + record["steal"] > args.tolerance and record.get("quiet_steps", 0) < 3
                if not record["disturbed"] or attempt == args.retries:
                    records.append(record)
                    speed = record.get("tokens_per_s_median", 0)
                    say(
                        f"{job} round {number + 1}/{args.rounds} {name}: {speed:,.0f} tokens/s"
                        + (", disturbed" if record["disturbed"] else "")
                    )
                    break
    return records


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def speed_job(args: argparse.Namespace, job: str, made: Plan) -> dict[str, Any]:
    """A training job: its records, ratios and table."""
    from rich.console import Console

    records = rounds_of(args, job, made.contenders[job]) if made.contenders[job] else []
    rows = compare.summary(records, job)
    speed = compare.ratios(records, job, "tokens_per_s_median")
    memory = compare.ratios(records, job, "less_base_mb", "tutelage_one_pass" if job == "pretrain" else compare.OURS)
    console = Console()
    console.print(compare.table(job, rows, speed, made.missing[job]))
    for ratio in memory:
        console.print(
            f"  memory less base at the same batch, ours / {ratio.peer}: {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        )
    found = {"speed": [r.to_json() for r in speed], "memory": [r.to_json() for r in memory]}
    return {"summary": rows, "ratios": found, "missing": made.missing[job], "records": records}


def script_job(name: str, *arguments: str) -> dict[str, Any]:
    """A script that compares for itself: its lines, printed as they come."""
    file = HERE / f"{name}.py"
    if not file.exists():
        return {"missing": [f"no {file.name}"]}
    found, errors = run([sys.executable, str(file), *arguments], 3600)
    for record in found:
        say(json.dumps(record))
    if not found:
        say(f"{name} failed:\n{errors[-1500:]}")
    return {"records": found}


def machine() -> dict[str, Any]:
    from tutelage.plan.machine import measure

    versions = {}
    for name in ("torch", "numpy", "tokenizers", "transformers", "tutelage"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**asdict(measure()), "versions": versions, "python": sys.version.split()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default=",".join(JOBS), help=f"some of {', '.join(JOBS)}")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--peer-scripts", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--only", default="", help="contenders to run, such as tutelage,trainer_compile (default: all)")
    parser.add_argument("--full", action="store_true", help="also TRL's slower modes")
    parser.add_argument("--model", help="for start-up: a model folder or run to chat with")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--timeout", type=float, default=1200)
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for an idle machine before each run")
    parser.add_argument("--tolerance", type=float, default=0.06, help="share of the cores that others may take")
    parser.add_argument("--retries", type=int, default=1, help="of a disturbed run")
    parser.add_argument(
        "--ours", nargs=argparse.REMAINDER, default=[], help="last: options for our own scripts, such as --compile 1"
    )
    args = parser.parse_args()
    for name in ("peers", "peer_scripts", "data"):
        if getattr(args, name) is not None:
            setattr(args, name, getattr(args, name).absolute())
    jobs = args.jobs.split(",")
    if unknown := set(jobs) - set(JOBS):
        parser.error(f"unknown jobs {', '.join(unknown)}: expected some of {', '.join(JOBS)}")
    results: dict[str, Any] = {"started": time.strftime("%Y-%m-%d %H:%M"), "rounds": args.rounds}
    file = args.out / f"{time.strftime('%Y-%m-%d-%H%M')}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        made = plan(args, Path(scratch)) if {"pretrain", "sft"} & set(jobs) else Plan()
        if args.only:
            wanted = args.only.split(",")
            made.contenders = {j: {n: c for n, c in rows.items() if n in wanted} for j, rows in made.contenders.items()}
        for job in jobs:
            if job in ("pretrain", "sft"):
                results[job] = speed_job(args, job, made)
            elif job == "startup":
                results[job] = script_job(job, *(["--model", args.model] if args.model else []))
            else:
                results[job] = script_job(job, "--rounds", str(args.rounds))
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results["machine"] = machine()  # last: torch in this process would show in the memory of its children
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    say(f"written: {file}")


if __name__ == "__main__":
    main()
