"""A server that dies without a word, and the one that is started in its place."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine import small
from tests.serve.running import Process
from tutelage.serve.keys import add_key, read_keys

FIXED = {"model": "tiny", "prompt": "the cat sat", "max_tokens": 40, "temperature": 0, "ignore_eos": True, "logprobs": 1}
ENDLESS = {"model": "tiny", "prompt": "x", "max_tokens": 8000, "ignore_eos": True, "stream": True}
CLIENTS = 6


def fixed(process: Process, headers: dict[str, str]) -> Any:
    reply = httpx.post(f"{process.url}/v1/completions", json=FIXED, headers=headers, timeout=200)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"]


def test_a_killed_server_invents_no_end_and_starts_again(start: Any, tmp_path: Path) -> None:
    """An answer that was cut looks finished; a port, a key file or an answer that the next server cannot take over."""
    folder, keys = str(small.saved(tmp_path, "tiny", 8192)), tmp_path / "keys.json"
    headers = {"authorization": f"Bearer {add_key(keys, 'me')}"}
    first = start(folder, "--keys", str(keys))
    before = fixed(first, headers)
    begun = [threading.Event() for _ in range(CLIENTS)]

    def read(number: int) -> list[str]:
        seen: list[str] = []
        with (
            pytest.raises(httpx.TransportError),
            httpx.stream("POST", f"{first.url}/v1/completions", json=ENDLESS, headers=headers, timeout=200) as reply,
        ):
            for line in reply.iter_lines():
                seen.append(line)
                if len(seen) > 4:
                    begun[number].set()
        return [line.removeprefix("data: ") for line in seen if line]

    with ThreadPoolExecutor(CLIENTS) as pool:
        readers = [pool.submit(read, i) for i in range(CLIENTS)]
        assert all(one.wait(200) for one in begun)
        first.popen.kill()
        assert first.popen.wait(20) < 0
        for reader in readers:
            pieces = [json.loads(line) for line in reader.result(200)]  # "[DONE]" is no JSON
            assert len(pieces) >= 2 and all("error" not in piece for piece in pieces)
            assert all(choice["finish_reason"] is None for piece in pieces for choice in piece["choices"])
    second = start(folder, "--keys", str(keys), port=first.port)
    assert second.url == first.url and httpx.get(f"{second.url}/ready").status_code == 200
    assert fixed(second, headers) == before
    assert [key.name for key in read_keys(keys)] == ["me"]
    assert httpx.get(f"{second.url}/v1/models", headers={"authorization": "Bearer other"}).status_code == 401
