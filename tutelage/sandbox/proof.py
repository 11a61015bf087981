"""Tries each forbidden act inside a sandbox before any model-written code runs there."""

from __future__ import annotations

import json
import os
import secrets
import socket
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tutelage.errors import SandboxError
from tutelage.sandbox.limits import Limits, Outcome

Run = Callable[[tuple[str, ...], Limits], Outcome]

_ACTS = Path(__file__).with_name("acts.py")
_HARMLESS = """
import decimal, json, threading
with open("notes.txt", "w") as file:
    file.write("kept")
thread = threading.Thread(target=lambda: print(open("notes.txt").read()))
thread.start()
thread.join()
"""
_ENDLESS = "while True: pass"
PATIENCE = 60.0  # seconds for the acts, on a machine that does other things too


def prove(run: Run, limits: Limits, outside: int) -> None:
    """Raises `SandboxError` that names the act which was possible. `outside`: a process of ours that stands outside."""
    calm = replace(limits, seconds=PATIENCE, cpu_seconds=PATIENCE)
    harmless = run((_HARMLESS,), calm)
    if not harmless.done or harmless.stdout != "kept\n":
        said = (harmless.stderr or harmless.stdout).strip()
        raise SandboxError(
            "the sandbox cannot run a harmless program", found=f"{harmless.reason}: {said}",
            expected="a program that writes a file in its own folder and starts a thread",
            fix="give it more memory, disk, files and at least one thread",
        )  # fmt: skip
    for name, what in _try(run, calm, outside).items():
        if what == "done":
            _refuse(name.replace("_", " "))
    if run((_ENDLESS,), replace(calm, seconds=0.2)).reason != "time":
        _refuse("run past its time")


def _try(run: Run, limits: Limits, outside: int) -> dict[str, str]:
    """What became of each act, told by the program and seen from here."""
    with tempfile.TemporaryDirectory(prefix="tutelage-walls-") as folder, socket.create_server(("127.0.0.1", 0)) as server:
        secret = Path(folder, "secret.txt")
        secret.write_text(secrets.token_hex())
        for path in (Path(folder), secret):
            path.chmod(0o777)  # nothing but the walls is in the way
        facts = {
            "port": server.getsockname()[1], "file": str(secret), "pid": outside, "user": 0, "memory": limits.memory,
            "disk": limits.disk, "processes": limits.processes, "threads": limits.threads,
        }  # fmt: skip
        source = _ACTS.read_text(encoding="utf-8")
        outcome = run((source, f"report({json.dumps(facts)})"), limits)
        try:
            out: dict[str, str] = json.loads(outcome.stdout)
        except ValueError:
            out = {}
        if not outcome.done or not out:
            raise SandboxError("the walls could not be tried", found=f"{outcome.reason}: {outcome.stderr.strip()[-400:]}")
        server.settimeout(0)
        try:
            server.accept()
            out["connect_to_this_machine"] = "done"
        except BlockingIOError:
            pass
        if sorted(os.listdir(folder)) != [secret.name]:
            out["write_a_file_outside"] = "done"
    return out


def _refuse(act: str) -> None:
    raise SandboxError(
        f"a program in the sandbox could {act}: no model-written code is run on this machine", found=act,
        expected="that every forbidden act is stopped",
        fix="run on Linux 5.13 or newer where user namespaces are allowed (`tutelage doctor` shows the walls), or leave out "
        "rewards and tools that run code",
    )  # fmt: skip
