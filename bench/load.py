"""Load: many streaming clients at a time against a real `tutelage serve`, and what became of every answer.

    python bench/load.py --model runs/quickstart/sft-…/model --clients 64 --seconds 60

Each client asks again and again for `--seconds`: prompts and answers of many lengths, half greedy and half sampled with a seed. A
tenth of the requests leave in the middle of the answer, a tenth before its first token. Afterwards every job runs alone in an
engine of this process, and each finished stream must be the same text, up to the first token whose two best choices lie
within 2e-4 (for sampled tokens: of the scores with their noise). Prints one JSON line; exit status 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import common

NAME, GAP = "load", 2e-4
WORDS = "the cat sat on a mat and one dog by that door saw two or three birds in their tree while it rained"
DEFINITIONS = {
    "time_to_first_token": "from the request's last byte written to its first piece with text, waiting in the queue included",
    "inter_token": "between two successive pieces with text of one stream as the client reads them; several may come at once",
    "time_per_token": "of each finished stream, from its first piece to its last over its tokens less one",
    "cpu": "processor seconds of the process over seconds of the run, 1.0 is one core",
    "rss": "of the server, sampled every second; ratio of the last quarter's mean to the second quarter's",
    "tokens_per_s": "tokens of all streams that were read to their end, over the seconds of the run",
}


@dataclass(frozen=True)
class Job:
    """A prompt and how it is to be continued."""

    prompt: str
    how: dict[str, Any]  # max_tokens, temperature, ... under the same names in the request and in `Sampling`

    def body(self) -> bytes:
        asked = {"model": NAME, "prompt": self.prompt, **self.how, "stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(asked).encode()


@dataclass
class Tally:
    """What the clients saw."""

    first: list[float] = field(default_factory=list)  # seconds to the first text
    between: list[float] = field(default_factory=list)  # seconds between pieces
    per_token: list[float] = field(default_factory=list)  # seconds a token after the first, one of each finished stream
    finished: list[tuple[int, str, int]] = field(default_factory=list)  # number of the job, text, tokens
    left: Counter[str] = field(default_factory=Counter)  # by when
    errors: Counter[str] = field(default_factory=Counter)
    refused: int = 0  # 429


def make_jobs(count: int, context: int, seed: int) -> list[Job]:
    """Jobs of many lengths, no two alike."""
    rng = random.Random(seed)
    jobs = []
    for i in range(count):
        words = " ".join(rng.choices(WORDS.split(), k=rng.choice((1, 8, 30, context // 12))))
        how: dict[str, Any] = {"max_tokens": rng.randint(4, max(8, min(128, context // 4))), "ignore_eos": rng.random() < 0.5}
        how |= {"temperature": 0.0} if i % 2 else {"temperature": 0.9, "top_p": 0.95, "seed": i}
        jobs.append(Job(f"{i}: {words}", how))
    return jobs


class Server:
    """`tutelage serve` as a process of its own."""

    def __init__(self, model: Path) -> None:
        command = [sys.executable, "-m", "tutelage", "serve", str(model), "--name", NAME, "--port", "0"]
        self.process = subprocess.Popen([*command, "--max-waiting", "4096"], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        said = ""
        for line in self.process.stderr:
            said += line
            if found := re.search(r"at http://(\S+):(\d+)/v1", line):
                self.host, self.port = found[1], int(found[2])
                return
        raise SystemExit(f"the server did not start:\n{said}")

    def rss_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def cpu(self) -> float:
        """Processor seconds so far."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def gauges(self) -> dict[str, float]:
        """Answers that run and wait, and the share of slots in use."""
        with urlopen(f"http://{self.host}:{self.port}/metrics") as reply:
            text = reply.read().decode()
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return {n: float(re.search(rf"^vllm:{n}{{.*}} (\S+)$", text, re.M)[1]) for n in names}  # type: ignore[index]

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(60)


async def ask(server: Server, number: int, job: Job, leave: int | None, tally: Tally) -> None:
    """One request. `leave`: pieces after which the client goes, 0 for before the first."""
    reader, writer = await asyncio.open_connection(server.host, server.port, limit=1 << 20)
    try:
        body = job.body()
        # A server without keys answers only requests whose Host names this machine.
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {server.host}:{server.port}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        last, first, texts, tokens, done = time.perf_counter(), 0.0, list[str](), 0, False
        if leave == 0:
            tally.left["before the first token"] += 1
            return
        status = (await reader.readline()).split()
        if len(status) < 2 or status[1] != b"200":
            tally.refused += status[1:2] == [b"429"]
            tally.errors[str(status[1:2])] += status[1:2] != [b"429"]
            return
        while not done and (line := await reader.readline()):
            if not line.startswith(b"data: "):
                continue
            if done := line.startswith(b"data: [DONE]"):
                break
            piece = json.loads(line[6:])
            if "error" in piece:
                tally.errors[piece["error"]["message"]] += 1
                return
            tokens = (piece["usage"] or {}).get("completion_tokens", tokens)
            if not (text := "".join(choice["text"] for choice in piece["choices"])):
                continue
            now = time.perf_counter()
            (tally.between if texts else tally.first).append(now - last)
            last, first = now, first or now
            texts.append(text)
            if leave is not None and len(texts) >= leave:
                tally.left["in the middle"] += 1
                return
        if done:
            tally.finished.append((number, "".join(texts), tokens))
            if tokens > 1 and texts:
                tally.per_token.append((last - first) / (tokens - 1))
        else:
            tally.errors["a stream without an end"] += 1
    finally:
        writer.close()


async def client(server: Server, jobs: list[Job], tally: Tally, until: float, rng: random.Random) -> None:
    while time.perf_counter() < until:
        number, chance = rng.randrange(len(jobs)), rng.random()
        leave = 0 if chance < 0.1 else rng.randint(1, 8) if chance < 0.2 else None
        try:
            await ask(server, number, jobs[number], leave, tally)
        except (OSError, ValueError) as error:
            tally.errors[repr(error)] += 1


async def sample(server: Server, seen: list[float]) -> None:
    while True:
        seen.append(server.rss_mb())
        await asyncio.sleep(1)


async def drive(server: Server, jobs: list[Job], clients: int, seconds: float) -> tuple[Tally, list[float], dict[str, float]]:
    """Runs the clients; what they saw, the server's memory each second, and processor time."""
    tally, memory = Tally(), list[float]()
    await asyncio.gather(*(ask(server, i, job, None, Tally()) for i, job in enumerate(jobs[:clients])))  # warm-up
    sampling = asyncio.create_task(sample(server, memory))
    began, cpu, own = time.perf_counter(), server.cpu(), time.process_time()
    crowd = (client(server, jobs, tally, began + seconds, random.Random(i)) for i in range(clients))
    await asyncio.gather(*crowd)
    took = time.perf_counter() - began
    sampling.cancel()
    return tally, memory, {
        "seconds": took, "server": (server.cpu() - cpu) / took, "client": (time.process_time() - own) / took
    }  # fmt: skip


def check(model: Path, jobs: list[Job], tally: Tally) -> dict[str, Any]:
    """Every finished stream against its job run alone."""
    from tutelage.chat.render import Renderer
    from tutelage.engine import Engine, Sampling
    from tutelage.models.open import load

    engine = Engine(load(model), Renderer(model), slots=1, prefix_cache=False)
    assert engine.vocabulary is not None
    alone = {
        n: engine.generate([jobs[n].prompt], Sampling(**jobs[n].how, logprobs=2))[0] for n in {n for n, *_ in tally.finished}
    }
    near = sum(s.top[0][1] - s.top[1][1] < GAP for n, c in alone.items() if n % 2 for s in c.scores)
    ties, wrong, lost = 0, list[str](), 0
    for number, text, tokens in tally.finished:
        want = alone[number]
        if text == want.text:
            lost += tokens != len(want.ids)
            continue
        place, raw = 0, b""
        while place < len(want.ids) and text.encode().startswith(raw := raw + engine.vocabulary.of(want.ids[place])):
            place += 1
        gap = gap_at(engine, jobs[number], place)
        ties += gap < GAP
        if gap >= GAP:
            wrong.append(f"job {number} at token {place}, gap {gap:.2g}")
    return {
        "checked": len(tally.finished), "wrong": len(wrong), "wrong_examples": wrong[:3], "token_counts_wrong": lost,
        "parted_at_near_ties": ties, "near_ties_in_greedy_references": near,
    }  # fmt: skip


def gap_at(engine: Any, job: Job, place: int) -> float:
    """How far the two best choices for a token lie apart when the job runs alone."""
    from tutelage.engine import Sampling, sampler

    found = [float("inf")]

    def noted(scores: Any) -> list[int]:
        best = scores.topk(2, dim=-1).values
        found.append(float(best[0, 0] - best[0, 1]))
        return original(scores)  # type: ignore[no-any-return]

    original, sampler._largest = sampler._largest, noted
    try:
        engine.generate([job.prompt], Sampling(**job.how))
    finally:
        sampler._largest = original
    return found[min(place, len(found) - 2) + 1]


def quantiles(values: list[float]) -> dict[str, float]:
    """Milliseconds."""
    cuts = statistics.quantiles(values, n=20) if len(values) > 1 else [0.0] * 19
    return {"p50": round(cuts[9] * 1000, 2), "p95": round(cuts[18] * 1000, 2), "max": round(max(values, default=0) * 1000, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--jobs", type=int, default=96, help="different requests")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    context = json.loads((args.model / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    jobs = make_jobs(args.jobs, context, args.seed)
    others = common.others()
    server = Server(args.model)
    try:
        tally, memory, cpu = asyncio.run(drive(server, jobs, args.clients, args.seconds))
        deadline = time.perf_counter() + 30
        while any(idle := server.gauges().values()) and time.perf_counter() < deadline:
            time.sleep(0.1)
    finally:
        server.end()
    others = (common.others() - others) / cpu["seconds"] - cpu["server"]
    quarter = max(1, len(memory) // 4)
    found = check(args.model, jobs, tally)
    common.emit(
        "load", "tutelage serve", clients=args.clients, seconds=round(cpu["seconds"], 1), **found,
        errors=dict(tally.errors), refused_429=tally.refused, left=dict(tally.left), idle_afterwards=not any(idle),
        time_to_first_token_ms=quantiles(tally.first), inter_token_ms=quantiles(tally.between),
        time_per_token_ms=quantiles(tally.per_token),
        tokens_per_s=round(sum(tokens for *_, tokens in tally.finished) / cpu["seconds"], 1),
        requests_per_s=round((len(tally.finished) + tally.left.total()) / cpu["seconds"], 1),
        cpu={"server": round(cpu["server"], 2), "client": round(cpu["client"], 2), "others": round(others, 2)},
        rss_mb={"first": round(memory[0], 1), "last": round(memory[-1], 1),
                "ratio": round(statistics.mean(memory[-quarter:]) / statistics.mean(memory[quarter : 2 * quarter]), 3)},
        definitions=DEFINITIONS,
    )  # fmt: skip
    if found["wrong"] or found["token_counts_wrong"] or tally.errors or any(idle):
        sys.exit(1)


if __name__ == "__main__":
    main()
