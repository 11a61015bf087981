"""A server in a thread of the test's own process."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import openai
import uvicorn


class Running:
    """An application behind a free loopback port."""

    def __init__(self, app: Any) -> None:
        self.socket = socket.socket()
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
