"""No test hangs forever: a test past `faulthandler_timeout` (pyproject.toml) ends with the tracebacks of all threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_hanging_test_is_ended(tmp_path: Path) -> None:
    """A test that waits for a lock nobody releases: the run, and CI with it, waits for hours and says nothing."""
    (tmp_path / "test_hangs.py").write_text("import threading\n\ndef test_waits():\n    threading.Event().wait(300)\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"),
               "-o", "faulthandler_timeout=1", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "Timeout" in done.stderr and "test_waits" in done.stderr, done.stdout + done.stderr
