"""What the server adds to the engine: time to the first token over in-process, and throughput of 16 clients on loopback.

    python bench/server.py [--rounds 5] [--size 5m|100m]

Random weights of the 5.77M Qwen3 shape, or of one of about 100M; prompts of 64 tokens, 128 new, greedy. The server is a process
of its own (`tutelage serve`), and so is the client, which speaks HTTP itself: what a heavy client costs is not the server's.
Each round: the engine in a process of its own, the server without streaming, the server with streaming, in an order that turns.
First tokens are of one request at a time. Prints a JSON line: medians over rounds, the server's share of the in-process rate, and
the share of the CPU time that server and client took of what all of it took.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import generate

PROMPT, NEW, CLIENTS = 64, 128, 16


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(8, 4000) for _ in range(PROMPT)] for _ in range(count)]


def inside(weights: Path, repeat: int) -> dict[str, float]:
    """The engine in this process: seconds to a first token alone, and tokens a second of 16 answers."""
    from tutelage.engine import Engine, Sampling
    from tutelage.models.open import load

    engine = Engine(load(weights), slots=CLIENTS, max_length=PROMPT + NEW, prefix_cache=False)
    texts = prompts(CLIENTS)
    engine.generate(texts, Sampling(4, temperature=0.0, ignore_eos=True))
    firsts, rates = [], []
    for text in texts * 2:
        began = time.perf_counter()
        engine.generate([text], Sampling(1, temperature=0.0, ignore_eos=True))
        firsts.append(time.perf_counter() - began)
    for _ in range(repeat):
        began = time.perf_counter()
        engine.generate(texts, Sampling(NEW, temperature=0.0, ignore_eos=True))
        rates.append(CLIENTS * NEW / (time.perf_counter() - began))
    return {"first_ms": 1000 * statistics.median(firsts), "tokens_per_s": statistics.median(rates)}


async def _ask(port: int, text: list[int], new: int, stream: bool) -> tuple[float, int]:
    """One request on a connection of its own: seconds to its first token, chunks of text."""
    body = {"model": "m", "prompt": text, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": stream}
    data = json.dumps(body).encode()
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    # A server without keys answers only requests whose Host names this machine.
    head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(data)}\r\nconnection: close\r\n\r\n".encode() + data)
    await writer.drain()
    first, chunks = 0.0, 0
    async for line in reader:
        if not line.startswith(b'data: {"id"') and not line.startswith(b'{"id"'):
            continue
        first = first or time.perf_counter() - began
        chunks += 1
    writer.close()
    assert first, "no answer"
    return first, chunks


async def _clients(port: int, repeat: int, stream: bool) -> dict[str, float]:
    texts = prompts(CLIENTS)
    await asyncio.gather(*(_ask(port, t, 4, stream) for t in texts))
    firsts = [(await _ask(port, t, 1, True))[0] for t in texts * 2]
    rates, chunks = [], 0
    for _ in range(repeat):
        began = time.perf_counter()
        done = await asyncio.gather(*(_ask(port, t, NEW, stream) for t in texts))
        rates.append(CLIENTS * NEW / (time.perf_counter() - began))
        chunks = sum(c for _, c in done)
    return {"first_ms": 1000 * statistics.median(firsts), "tokens_per_s": statistics.median(rates), "chunks": chunks}


def outside(weights: Path, repeat: int, stream: bool) -> dict[str, float]:
    """The same through `tutelage serve`, asked by this process."""
    command = [sys.executable, "-m", "tutelage", "serve", str(weights), "--name", "m", "--port", "0"]
    options = ["--no-prefix-cache", "--slots", str(CLIENTS), "--max-length", str(PROMPT + NEW)]
    server = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        line = next(x for x in server.stdout if "http://" in x)
        port = int(line.split("http://")[1].split(":")[1].split("/")[0])
        before = _cpu(server.pid), time.process_time()
        found = asyncio.run(_clients(port, repeat, stream))
        after = _cpu(server.pid), time.process_time()
        return found | {"server_cpu_s": after[0] - before[0], "client_cpu_s": after[1] - before[1]}
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def _cpu(pid: int) -> float:
    values = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")


def one(args: argparse.Namespace) -> dict[str, float]:
    if args.job == "inside":
        return inside(args.weights, args.repeat)
    return outside(args.weights, args.repeat, args.job == "stream")


def compare_all(args: argparse.Namespace, weights: Path) -> None:
    jobs = ["inside", "whole", "stream"]
    found: dict[str, list[dict[str, float]]] = {job: [] for job in jobs}
    own = [sys.executable, str(Path(__file__).resolve()), "--weights", str(weights), "--repeat", str(args.repeat)]
    for number in range(args.rounds):
        for job in jobs[number % 3 :] + jobs[: number % 3]:
            done = subprocess.run([*own, "--job", job], capture_output=True, text=True, check=False, timeout=900)
            assert done.returncode == 0, done.stderr[-2000:]
            found[job].append(json.loads(done.stdout.splitlines()[-1]))

    def median(job: str, key: str, base: str | None = None, minus: bool = False) -> float:
        rows = [r[key] for r in found[job]]
        if base is not None:
            rows = [a - b[key] if minus else a / b[key] for a, b in zip(rows, found[base], strict=True)]
        return round(statistics.median(rows), 3)

    line: dict[str, Any] = {
        "job": "server",
        "size": args.size,
        "first_token_ms_over": median("stream", "first_ms", "inside", True),
    }
    line |= {f"{job}_tokens_per_s": median(job, "tokens_per_s") for job in jobs}
    line |= {f"{job}_share": median(job, "tokens_per_s", "inside") for job in jobs[1:]}
    for job in jobs[1:]:
        shares = [r["client_cpu_s"] / (r["client_cpu_s"] + r["server_cpu_s"]) for r in found[job]]
        line[f"{job}_client_cpu_share"] = round(statistics.median(shares), 3)
    print(json.dumps(line | {"chunks_per_answer": median("stream", "chunks") / CLIENTS, "rounds": args.rounds}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--size", choices=("5m", "100m"), default="5m")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--job", choices=("inside", "whole", "stream"), help="run one part (what the driver calls)")
    args = parser.parse_args()
    if args.job:
        print(json.dumps(one(args)), flush=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "weights"
        generate.write_weights(weights, args.size, make_tokenizer(Path(scratch) / "tokenizer"))
        compare_all(args, weights)


def make_tokenizer(folder: Path) -> Path:
    """A tokenizer of 4,096 tokens, trained on the Python documentation that Python brings along."""
    import pydoc_data.topics

    from tutelage.tokenizer.train import train

    train(list(pydoc_data.topics.topics.values()), vocab_size=4096, out=folder)
    return folder


if __name__ == "__main__":
    main()
