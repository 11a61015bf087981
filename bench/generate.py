"""Generation against `transformers.generate`, its continuous batching and llama.cpp: 128 greedy tokens after 64, batch 1 and 16.

    python bench/generate.py --peers FOLDER --peer-scripts FOLDER --data FOLDER [--rounds 5] [--size 100m]

Random weights of the 5.77M Qwen3 shape (or of one of about 100M), written once as a Hugging Face folder that every contender
reads. Each round runs every contender in a process of its own, in an order that turns; a process gives the median of its runs.
The peers' generate.py is in `--peer-scripts`. Prints a JSON line per contender and round, then a line of ratios per batch and
type of weights: ours over theirs, median over rounds with a 95% bootstrap interval, and for batch 1 the share of the memory
bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
import compare
import run as driver

PROMPT, NEW = 64, 128
LARGE = {
    "vocab_size": 16384, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
    "intermediate_size": 2304,
}  # fmt: skip
PAIRS = {"float32": ("hf", "hf_continuous", "llama_f32"), "int8": ("llama_q8_0",)}


def write_weights(folder: Path, size: str, tokenizer: Path) -> None:
    """A model of random weights as a Hugging Face folder."""
    from tutelage.models.config import DecoderConfig
    from tutelage.models.export import save
    from tutelage.models.init import build

    shape = common.QWEN3 | (LARGE if size == "100m" else {})
    save(build(DecoderConfig.from_hf(shape), 0), folder, tokenizer)


def ours(args: argparse.Namespace) -> None:
    """One contender: our engine, in this process."""
    import numpy as np
    import torch

    from tutelage.engine import Engine, Sampling
    from tutelage.models.open import load

    model: Any = load(args.weights)
    prompts = np.load(args.prompts)[: args.batch, :PROMPT].tolist()
    engine = Engine(model.eval(), slots=args.batch, max_length=PROMPT + NEW, dtype=args.dtype, prefix_cache=False)
    how = Sampling(NEW, temperature=0.0, ignore_eos=True)
    engine.generate(prompts, how)
    times = []
    for _ in range(args.repeat):
        started = time.perf_counter()
        done = engine.generate(prompts, how)
        times.append(time.perf_counter() - started)
    rate = args.batch * NEW / statistics.median(times)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    record = {
        "job": "generate", "peer": "tutelage", "tokens_per_s": round(rate, 1), "head": list(done[0].ids[:8]),
        "bandwidth": round(weights * rate / bandwidth(), 3) if args.batch == 1 and args.dtype == "float32" else None,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(json.dumps(record), flush=True)


def write_prompts(args: argparse.Namespace, file: Path) -> None:
    """The peers' own prompts [16, 64], made by their code."""
    code = (
        "import sys, types; sys.path.insert(0, sys.argv[1]); import common, numpy; "
        "a = types.SimpleNamespace(data=sys.argv[2], work=sys.argv[3], seed=0); "
        f"numpy.save(sys.argv[4], common.blocks(a, 16, {PROMPT}).numpy())"
    )
    parts = [str(args.peers / "PEERS/bin/python"), "-c", code, str(args.peer_scripts), str(args.data), str(args.peers / "work")]
    subprocess.run([*parts, str(file)], check=True, capture_output=True)


def bandwidth() -> float:
    """Bytes a second of reading memory that no cache holds: a sum over 512 MB."""
    import torch

    x = torch.ones(1 << 27)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - started)
    return float(x.nbytes / min(times))


def commands(args: argparse.Namespace, weights: Path, prompts: Path) -> dict[str, dict[str, list[str]]]:
    """Job -> contender -> command."""
    own = [sys.executable, str(Path(__file__).resolve()), "--ours", "--weights", str(weights), "--prompts", str(prompts)]
    own += ["--repeat", str(args.repeat)]
    python, work = args.peers / "PEERS/bin/python", args.peers / "work" / args.size
    work.mkdir(exist_ok=True)
    if not (work / "tokenizer").exists():
        (work / "tokenizer").symlink_to(args.peers / "work" / "tokenizer")
    script = [str(python), str(args.peer_scripts / "generate.py"), "--data", str(args.data), "--work", str(work)]
    script += ["--weights", str(weights), "--repeat", str(args.repeat)]
    peers = {
        "hf": [*script, "--peer", "hf"],
        "hf_continuous": [*script, "--peer", "hf_continuous"],
        "llama_f32": [*script, "--peer", "llama_cpp", "--kind", "f32"],
        "llama_q8_0": [*script, "--peer", "llama_cpp", "--kind", "q8_0"],
    }
    out = {}
    for batch in (1, 16):
        for dtype, names in PAIRS.items():
            rows = {"tutelage": [*own, "--batch", str(batch), "--dtype", dtype]}
            rows |= {name: [*peers[name], "--batch", str(batch)] for name in names}
            out[f"batch {batch}, {dtype}"] = rows
    return out


def compare_all(args: argparse.Namespace, scratch: Path) -> None:
    weights, prompts = scratch / "weights", scratch / "prompts.npy"
    tokenizer = args.peers / "work" / "tokenizer"
    write_prompts(args, prompts)
    write_weights(weights, args.size, tokenizer)
    records: list[dict[str, Any]] = []
    for number in range(args.rounds):
        for job, rows in commands(args, weights, prompts).items():
            names = list(rows)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                found, errors = driver.run(rows[name], 900)
                if not found:
                    driver.say(f"{job} {name} failed:\n{errors[-800:]}")
                    continue
                records.append(
                    {**found[-1], "job": job, "peer": name, "round": number, "disturbed": found[-1]["other_cpu"] > 0.1}
                )
                print(json.dumps(records[-1]), flush=True)
    for job in dict.fromkeys(r["job"] for r in records):
        found = compare.ratios(records, job, "tokens_per_s")
        rates = {n: statistics.median(r["tokens_per_s"] for r in records if r["job"] == job and r["peer"] == n) for n in
                 dict.fromkeys(r["peer"] for r in records if r["job"] == job)}  # fmt: skip
        shares = [r["bandwidth"] for r in records if r["job"] == job and r.get("bandwidth")]
        line = {"job": job, "size": args.size, "tokens_per_s": rates, "ratios": [r.to_json() for r in found]}
        print(json.dumps(line | ({"bandwidth_share": statistics.median(shares)} if shares else {})), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("5m", "100m"), default="5m")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    compare.run_or_compare(parser, ours, compare_all)


if __name__ == "__main__":
    main()
