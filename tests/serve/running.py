"""A server in a thread of the test's own process, and one in a process of its own."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import threading
from typing import Any

import openai
import uvicorn

from tests.pipeline import environment


class Running:
    """An application behind a free loopback port."""

    def __init__(self, app: Any) -> None:
        # The protocol by its number, as `listen.py` has it: asyncio turns Nagle's delays of 40 ms off only for that.
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.started = threading.Event()
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
        startup = self.server.startup

        async def started(sockets: Any = None) -> None:
            await startup(sockets)
            self.loop = asyncio.get_running_loop()
            self.started.set()

        self.server.startup = started  # type: ignore[method-assign]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        assert self.started.wait(20)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)


class Process:
    """`tutelage serve` on a port, a free one where it is 0."""

    def __init__(self, *words: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "tutelage", "serve", *words, "--port", str(port)]
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
        self.said: list[str] = []
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.said.append(line)
            if found := re.search(r"at (http://\S+:(\d+))/v1", line):
                self.url, self.port = found[1], int(found[2])
                break
        else:
            raise AssertionError("".join(self.said))
        threading.Thread(target=lambda: self.said.extend(self.popen.stderr), daemon=True).start()  # type: ignore[arg-type]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
