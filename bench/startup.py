"""Start-up: seconds of `tutelage --help`, and from `tutelage chat MODEL --message hi` to the first character of the answer.

    python bench/startup.py --model runs/quickstart/sft-…/model --repeat 5

Each is the median of fresh processes, files in the page cache (one run before is not counted).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

import common

START = [sys.executable, "-c", "from tutelage.cli.main import main; main()"]


def command() -> list[str]:
    """The installed program beside this Python, else the module."""
    beside = os.path.join(os.path.dirname(sys.executable), "tutelage")
    return [beside] if os.path.exists(beside) else START


def first_output(arguments: list[str]) -> tuple[float, float]:
    """Seconds to the first visible character on stdout and to the end. Raises `SystemExit` when the program fails."""
    started = time.perf_counter()
    with subprocess.Popen([*command(), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        first = 0.0
        while byte := process.stdout.read(1):
            if not first and byte.strip():
                first = time.perf_counter() - started
        errors = process.stderr.read().decode(errors="replace")
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit status {process.returncode}\n{errors}")
    return first, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder or a run; without it only --help is measured")
    parser.add_argument("--message", default="hi")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    helps = [first_output(["--help"])[1] for _ in range(args.repeat + 1)][1:]
    common.emit("startup", "tutelage --help", seconds=round(statistics.median(helps), 3), worst=round(max(helps), 3), limit=1.0)
    if args.model:
        asked = ["chat", args.model, "--message", args.message]
        runs = [first_output(asked) for _ in range(args.repeat + 1)][1:]
        first = statistics.median(f for f, _ in runs)
        common.emit(
            "startup", "tutelage chat, first token", seconds=round(first, 3), worst=round(max(f for f, _ in runs), 3), limit=5.0,
            whole_answer=round(statistics.median(t for _, t in runs), 3),
        )  # fmt: skip


if __name__ == "__main__":
    main()
