"""Every command of the README runs, in order, in one shell, as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.M | re.S)


def test_every_command_of_the_readme_runs(root: Path, tmp_path: Path) -> None:
    """Guards against a README whose options, names or paths are not those of the program."""
    if shutil.which("curl") is None:
        pytest.skip("the README's example of a request needs curl")
    for name in ("recipes", "docs"):
        (tmp_path / name).symlink_to(root / name)
    script = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    for language, text in BLOCK.findall((root / "README.md").read_text(encoding="utf-8")):
        if language == "python":
            text = f"python - <<'END'\n{text}END\n"
        script.append(text)
    assert len(script) > 10
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert '"choices"' in done.stdout and "bits per byte" in done.stderr + done.stdout
