"""What a program must not be able to do, each as a function that does it. This file is run inside, as model-written code is.

An act that returns was possible; one that was stopped raises.
"""

from __future__ import annotations

import ctypes
import glob
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

STOPPED = (OSError, MemoryError, ValueError, RuntimeError)


def open_a_socket(facts: dict[str, Any]) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()


def connect_to_this_machine(facts: dict[str, Any]) -> None:
    socket.create_connection(("127.0.0.1", facts["port"]), timeout=1).close()


def read_a_file_outside(facts: dict[str, Any]) -> None:
    with open(facts["file"], encoding="utf-8") as file:
        file.read()


def write_a_file_outside(facts: dict[str, Any]) -> None:
    folders = [os.path.dirname(facts["file"]), "/", "/dev", "/usr/lib", os.path.dirname(os.__file__)]
    for folder in folders[: facts.get("folders")]:
        try:
            with open(f"{folder}/written-by-a-program", "w", encoding="utf-8") as file:
                file.write("x")
            return
        except OSError:
            continue
    raise PermissionError


def list_processes_outside(facts: dict[str, Any]) -> None:
    if not [name for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]:
        raise PermissionError


def signal_a_process_outside(facts: dict[str, Any]) -> None:
    os.kill(facts["pid"], 0)


def trace_a_process_outside(facts: dict[str, Any]) -> None:
    _system_call("ptrace", 0x4206, facts["pid"], 0, 0)  # PTRACE_SEIZE


def make_namespaces(facts: dict[str, Any]) -> None:
    _system_call("unshare", 0x10000000)


def become_another_user(facts: dict[str, Any]) -> None:
    os.setuid(facts["user"])


def run_another_program(facts: dict[str, Any]) -> None:
    program = glob.glob("/lib*/ld-*")[0]
    child = os.posix_spawn(program, [program, "--version"], {}, file_actions=[(os.POSIX_SPAWN_CLOSE, 1)])
    os.waitpid(child, 0)


def raise_its_own_limits(facts: dict[str, Any]) -> None:
    for name in ("AS", "CPU", "NPROC"):
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return
        except ValueError:
            continue
    raise PermissionError


def see_the_environment(facts: dict[str, Any]) -> None:
    if not os.environ:
        raise PermissionError


def use_open_files_of_others(facts: dict[str, Any]) -> None:
    for descriptor in range(4, 1024):
        try:
            os.fstat(descriptor)
            return
        except OSError:
            continue
    raise PermissionError


def start_too_many_processes(facts: dict[str, Any]) -> None:
    children = []
    try:
        for _ in range(facts["processes"] + 1 + facts["threads"]):
            child = os.fork()
            if not child:
                time.sleep(30)
                os._exit(0)
            children.append(child)
    finally:
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)


def start_too_many_threads(facts: dict[str, Any]) -> None:
    over = threading.Event()
    try:
        for _ in range(facts["processes"] + facts["threads"] + 1):
            threading.Thread(target=over.wait, daemon=True).start()
    finally:
        over.set()


def fill_the_memory(facts: dict[str, Any]) -> None:
    held = bytearray(facts["memory"] + (64 << 20))
    held[-1] = 1


def fill_the_disk(facts: dict[str, Any]) -> None:
    names = [f"full-{number}" for number in range(5)]
    try:
        for name in names:
            with open(name, "wb") as file:
                file.write(bytes(facts["disk"] // 4))
    finally:
        for name in names:
            if os.path.exists(name):
                os.remove(name)


def _system_call(name: str, *arguments: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*(ctypes.c_long(a) for a in arguments)) < 0:
        raise OSError(ctypes.get_errno(), name)


ACTS: tuple[Callable[[dict[str, Any]], None], ...] = (
    open_a_socket, connect_to_this_machine, read_a_file_outside, write_a_file_outside, list_processes_outside,
    signal_a_process_outside, trace_a_process_outside, make_namespaces, become_another_user, run_another_program,
    raise_its_own_limits, see_the_environment, use_open_files_of_others, start_too_many_processes, start_too_many_threads,
    fill_the_memory, fill_the_disk,
)  # fmt: skip


def report(facts: dict[str, Any]) -> None:
    """Prints what became of each act: "done", or what stopped it. Another error than `STOPPED` proves nothing and is raised."""
    out = {}
    for act in ACTS:
        try:
            act(facts)
            out[act.__name__] = "done"
        except STOPPED as error:
            out[act.__name__] = repr(error)
    print(json.dumps(out))
