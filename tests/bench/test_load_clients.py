"""The load test itself, short: every stream is the one its job gets alone, and nothing is left on the server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine import small
from tests.pipeline import environment


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_many_clients(tmp_path: Path, root: Path) -> None:
    """Tokens of one stream in another, an answer cut at the end of a batch, a slot lost to a client who left."""
    model = small.saved(tmp_path, "tiny", 256)
    command = [sys.executable, str(root / "bench" / "load.py"), "--model", str(model), "--clients", "16", "--seconds", "8"]
    done = subprocess.run([*command, "--jobs", "24"], capture_output=True, text=True, env=environment(), timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == found["token_counts_wrong"] == found["refused_429"] == 0 and not found["errors"]
    assert found["checked"] >= 16 and found["idle_afterwards"] and found["left"]["before the first token"] > 0
    assert 0 < found["time_to_first_token_ms"]["p50"] <= found["time_to_first_token_ms"]["p95"]
    assert set(found["definitions"]) >= {"time_to_first_token", "inter_token", "cpu", "rss"}
