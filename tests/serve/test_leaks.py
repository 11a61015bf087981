"""What is left of two thousand requests: nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine import small
from tests.serve.running import Running
from tutelage.engine import Sequence
from tutelage.serve.app import create_app
from tutelage.serve.engine_thread import PendingResponse

NAME, CHAT = "tiny", [{"role": "user", "content": "the cat"}]
REQUESTS: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/chat/completions", {"model": NAME, "messages": CHAT, "max_tokens": 2}, 200),
    ("/v1/chat/completions", {"model": NAME, "messages": CHAT, "max_tokens": 3, "stream": True, "n": 2}, 200),
    ("/v1/chat/completions", {"model": NAME, "messages": CHAT, "max_tokens": 3, "response_format": {"type": "json_object"}}, 200),
    ("/v1/completions", {"model": NAME, "prompt": ["the", "cat sat"], "max_tokens": 2, "echo": True, "logprobs": 1}, 200),
    ("/v1/completions", {"model": NAME, "prompt": "x", "max_tokens": 2, "stream": True, "temperature": 0}, 200),
    ("/v1/embeddings", {"model": NAME, "input": ["the cat", "door"]}, 200),
    ("/tokenize", {"prompt": "the cat sat"}, 200),
    ("/detokenize", {"tokens": [5, 6, 7]}, 200),
    ("/v1/completions", {"model": NAME, "prompt": "x", "max_tokens": 10_000}, 400),
    ("/v1/nothing", {}, 404),
]


def ask(client: httpx.Client, count: int) -> None:
    for i in range(count):
        path, body, status = REQUESTS[i % len(REQUESTS)]
        assert client.post(path, json=body).status_code == status, path


def held(running: Running) -> dict[str, int]:
    """Threads, open files and tasks of the event loop, and what requests are made of."""

    async def tasks() -> int:
        return len(asyncio.all_tasks())

    gc.collect()
    found = [type(thing) for thing in gc.get_objects()]
    return {
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "tasks": asyncio.run_coroutine_threadsafe(tasks(), running.loop).result(10),
        "responses": found.count(PendingResponse),
        "sequences": found.count(Sequence),
    }


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")
def test_nothing_grows(tmp_path: Path) -> None:
    """A server that must be started again every week."""
    engine = small.engine(tmp_path / "t", context=128, slots=4)
    running = Running(create_app(engine, engine.renderer, NAME))
    try:
        with httpx.Client(base_url=running.url, timeout=120) as client:
            ask(client, 200)  # threads of pools, compiled grammars, the cache
            before, memory = held(running), resident_mb()
            ask(client, 2000)
            after = held(running)
        assert after["responses"] == after["sequences"] == 0
        assert after["threads"] <= before["threads"] + 1 and after["files"] <= before["files"] + 1, (before, after)
        assert after["tasks"] <= before["tasks"], (before, after)
        assert resident_mb() < memory + 8  # 4 kB a request
    finally:
        running.close()
