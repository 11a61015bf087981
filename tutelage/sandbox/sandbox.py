"""`Sandbox`: the side that asks. Programs run in processes of `launcher.py`, one program at a time in each."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tutelage.errors import SandboxError
from tutelage.sandbox.limits import Limits, Outcome
from tutelage.sandbox.proof import prove

START_SECONDS = 60.0
PATIENCE = 30.0  # seconds beyond a program's own before its launcher is given up
_MODULE = "tutelage.sandbox.launcher"
_CODE = f"import sys; sys.path.insert(0, sys.argv.pop(1)); from {_MODULE} import main; main()"
_FIX = (
    "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in Docker "
)
_FIX += "--security-opt seccomp=unconfined --security-opt systempaths=unconfined), or install bubblewrap"


class Sandbox:
    """Runs model-written Python, `parallel` programs at a time (none given: one a core). Safe to use from several threads.

    A program sees Python's standard library and a folder of its own that is gone afterwards: no network, no other files, no
    other programs. At first use the walls are tried; `SandboxError` where one does not hold. Close it, or use it in a `with`.

    Example:
        with Sandbox() as sandbox:
            sandbox.run("print(input()[::-1])", stdin="abc").stdout  # "cba\\n"
    """

    def __init__(self, limits: Limits | None = None, parallel: int | None = None) -> None:
        self.limits = limits or Limits()
        self.parallel = parallel or os.cpu_count() or 1
        self._free = threading.BoundedSemaphore(self.parallel)
        self._idle: list[_Launcher] = []
        self._proving = threading.Lock()
        self._walls: tuple[str, ...] = ()
        weakref.finalize(self, _end_all, self._idle)

    @property
    def walls(self) -> tuple[str, ...]:
        """The walls that were tried and hold. Raises `SandboxError` where they don't."""
        with self._proving:
            if not self._walls:
                self._walls = self._prove()
        return self._walls

    def run(self, code: str | Sequence[str], stdin: str = "") -> Outcome:
        """Runs a program, or the parts of one, which share their names: one that fails ends it (`Outcome.finished`)."""
        parts = (code,) if isinstance(code, str) else tuple(code)
        return self._run(self.walls, parts, self.limits, stdin)

    def run_all(self, programs: Iterable[str | Sequence[str]]) -> list[Outcome]:
        """The outcomes of several programs, in their order."""
        with ThreadPoolExecutor(self.parallel) as threads:
            return list(threads.map(self.run, programs))

    def close(self) -> None:
        _end_all(self._idle)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, walls: tuple[str, ...], parts: tuple[str, ...], limits: Limits, stdin: str = "") -> Outcome:
        request = {"parts": parts, "stdin": stdin, "limits": asdict(limits)}
        with self._free:
            launcher = next((one for one in iter(self._take, None) if one.alive), None) or _Launcher(walls)
            try:
                found = launcher.ask(request, limits.seconds + PATIENCE)
            except BaseException:
                launcher.end()
                raise
            self._idle.append(launcher)
        return Outcome(**found)

    def _take(self) -> _Launcher | None:
        return self._idle.pop() if self._idle else None

    def _prove(self) -> tuple[str, ...]:
        walls, why = choose(), ""
        for tried in walls:
            try:
                first = _Launcher(tried)
            except SandboxError as error:
                why = error.message
                continue
            self._idle.append(first)
            prove(lambda parts, limits, tried=tried: self._run(tried, parts, limits), self.limits, first.pid)  # type: ignore[misc]
            return tried
        raise SandboxError("no walls can be put up here, so no model-written code is run", found=why, fix=_FIX)


def choose() -> list[tuple[str, ...]]:
    """Sets of walls to try, the best first. Raises `SandboxError` on a system that has none."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise SandboxError(
            "the sandbox needs Linux on x86-64 or ARM64", found=f"{sys.platform}, {platform.machine()}",
            fix="run rewards and tools that run code there",
        )  # fmt: skip
    from tutelage.sandbox import landlock  # the calls of Linux are not to be had elsewhere

    more = ("landlock", "seccomp") if landlock.version() else ("seccomp",)
    return [("namespaces", *more)] + ([("bwrap", *more)] if shutil.which("bwrap") else [])


class _Launcher:
    def __init__(self, walls: tuple[str, ...]) -> None:
        root = Path(__file__).parents[2]
        self._popen = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-c", _CODE, str(root), json.dumps(walls)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PATH": os.environ.get("PATH", os.defpath)},
            start_new_session=True,  # Ctrl-C stops what asks, not this
        )  # fmt: skip
        self.pid = self._popen.pid
        try:
            self.ask(None, START_SECONDS)
        except SandboxError:
            self.end()
            raise

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def ask(self, request: Any, seconds: float) -> dict[str, Any]:
        """The launcher's next line. Raises `SandboxError` where there is none, or where it says that a wall was refused."""
        assert self._popen.stdin is not None and self._popen.stdout is not None
        timer = threading.Timer(seconds, self._popen.kill)
        timer.start()
        try:
            if request is not None:
                self._popen.stdin.write(json.dumps(request).encode() + b"\n")
                self._popen.stdin.flush()
            found: dict[str, Any] = json.loads(self._popen.stdout.readline())
        except (OSError, ValueError) as error:  # nothing, or half a line
            raise SandboxError(
                "the sandbox's own process ended", fix="run again; the machine may have run out of memory"
            ) from error
        finally:
            timer.cancel()
        if "failed" in found:
            raise SandboxError(f"a wall of the sandbox was refused: {found['failed']}", fix=_FIX)
        return found

    def end(self) -> None:
        self._popen.kill()
        with contextlib.suppress(OSError):
            self._popen.communicate()


def _end_all(launchers: list[_Launcher]) -> None:
    while launchers:
        launchers.pop().end()
