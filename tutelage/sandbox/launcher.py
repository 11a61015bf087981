"""The program that runs programs: a process that enters the walls once, and then makes a child for each run.

`tutelage.sandbox.sandbox` starts it and talks to it in lines of JSON. It imports nothing of ours beyond this folder, so that it
starts in some 60 ms; a run is a fork and needs no start of Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from tutelage.sandbox import bubblewrap, program, root, system

PRELOADED = ("collections", "dataclasses", "functools", "heapq", "itertools", "math", "re", "string", "typing")
CHUNK = 1 << 16

Start = Callable[[dict[str, Any], str, Sequence[int]], int]  # (request, token, descriptors 0 to 3) -> process id


def main() -> None:
    """Arguments: the walls, a JSON list. Reads requests until the other side closes; answers each with one line."""
    walls = json.loads(sys.argv[1])
    sys.path.pop(0)  # ours: all that is needed has been imported
    for name in PRELOADED:
        __import__(name)
    base = _address_space()
    try:
        start = _inside(walls) if "namespaces" in walls else _by_bwrap(walls)
    except OSError as error:
        _say({"failed": f"{error.filename or 'a system call'}: {error.strerror}"})
        return
    _say({"ready": walls})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        request["limits"]["base"] = base
        _say(_attend(request, start))


def _inside(walls: Sequence[str]) -> Start:
    """Enters the namespaces, and becomes the first process there: when it is killed, all that it started is too."""
    root.enter()
    first = os.fork()
    if first:
        os.close(0)
        os.close(1)
        _, status = os.waitpid(first, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 255)
    system.prctl(system.PR_SET_PDEATHSIG, signal.SIGKILL)
    ours = os.pidfd_open(os.getpid())

    def start(request: dict[str, Any], token: str, descriptors: Sequence[int]) -> int:
        system.unshare(system.CLONE_NEWPID)  # of the next child
        child = os.fork()
        if child:
            system.call("setns", ours, system.CLONE_NEWPID)
            return child
        return _turn(program.become, request, token, walls, descriptors)

    return start


def _by_bwrap(walls: Sequence[str]) -> Start:
    return lambda request, token, descriptors: os.fork() or _turn(bubblewrap.start, request, token, walls, descriptors)


def _turn(
    into: Callable[..., None], request: dict[str, Any], token: str, walls: Sequence[str], descriptors: Sequence[int]
) -> NoReturn:
    """Turns this child into the program, or says which wall was refused."""
    try:
        _only(descriptors)
        into(request, token, walls)
    except BaseException as error:
        os.write(program.TELL, f"{token} 0 wall {error!r}".encode())
    finally:
        os._exit(1)


def _only(descriptors: Sequence[int]) -> None:
    """Leaves these open as 0, 1, 2, …, and no others."""
    high = [os.dup2(d, 100 + i, inheritable=True) for i, d in enumerate(descriptors)]
    for i, descriptor in enumerate(high):
        os.dup2(descriptor, i, inheritable=True)
    os.closerange(len(descriptors), 4096)


def _attend(request: dict[str, Any], start: Start) -> dict[str, Any]:
    """Runs a program, keeps what it writes, ends it when its time is over."""
    limits, token, began = request["limits"], secrets.token_hex(16), time.monotonic()
    stdin = os.memfd_create("stdin")
    os.write(stdin, request["stdin"].encode("utf-8", "surrogatepass"))
    os.lseek(stdin, 0, os.SEEK_SET)
    pipes = {name: os.pipe() for name in ("stdout", "stderr", "end")}
    child = start(request, token, [stdin, *(write for _, write in pipes.values())])
    for descriptor in (stdin, *(write for _, write in pipes.values())):
        os.close(descriptor)
    kept = {name: Kept(limits["output"]) for name in pipes}
    late = _listen(child, {read: kept[name] for name, (read, _) in pipes.items()}, began + limits["seconds"])
    _, status, usage = os.wait4(child, 0)
    exit_ = os.waitstatus_to_exitcode(status)
    finished, reason = _told(bytes(kept["end"].head), token)
    if late:
        reason = "time"
    elif exit_ == -signal.SIGKILL and usage.ru_utime + usage.ru_stime > 0.5 * limits["cpu_seconds"]:  # two clocks
        reason = "cpu"
    elif not reason:
        reason = "signal" if exit_ < 0 else "exit"
    out = {name: kept[name].text() for name in ("stdout", "stderr")}
    return {**out, "exit": exit_, "reason": reason, "finished": finished, "seconds": time.monotonic() - began}


class Kept:
    """Of what a program writes the beginning and the end, half of `most` bytes each: an error's name stands at its end."""

    def __init__(self, most: int) -> None:
        self.head, self.tail, self.size, self._half = bytearray(), bytearray(), 0, most // 2

    def add(self, data: bytes) -> None:
        self.size += len(data)
        room = self._half - len(self.head)
        self.head += data[:room]
        self.tail += data[room:]
        del self.tail[: max(len(self.tail) - self._half, 0)]

    def text(self) -> str:
        left_out = self.size - len(self.head) - len(self.tail)
        if not left_out:
            return (self.head + self.tail).decode("utf-8", "replace")
        head, tail = (part.decode("utf-8", "replace") for part in (self.head, self.tail))
        return f"{head}\n[{left_out} bytes cut]\n{tail}"


def _listen(child: int, pipes: dict[int, Kept], deadline: float) -> bool:
    """Reads until the program has ended and said all. Whether it had to be ended."""
    handle, late = os.pidfd_open(child), False
    with selectors.DefaultSelector() as selector:
        for descriptor in (handle, *pipes):
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(None if late else max(deadline - time.monotonic(), 0))
            if not ready:
                late = True
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            for key, _ in ready:
                if key.fd == handle:
                    selector.unregister(handle)
                    os.close(handle)
                    continue
                data = os.read(key.fd, CHUNK)
                pipes[key.fd].add(data)
                if not data:
                    selector.unregister(key.fd)
                    os.close(key.fd)
    return late


def _told(said: bytes, token: str) -> tuple[int, str]:
    """How many parts ran to their end and why the program ended, if that is what was said."""
    words = said.decode("ascii", "replace").split(" ", 3)
    if len(words) < 3 or words[0] != token:
        return 0, ""
    if words[2] == "wall":
        _say({"failed": words[3]})
        os._exit(1)
    return (int(words[1]), words[2]) if words[1].isdigit() else (0, "")


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _say(what: dict[str, Any]) -> None:
    data = json.dumps(what).encode() + b"\n"
    with contextlib.suppress(BrokenPipeError):
        while data:
            data = data[os.write(1, data) :]
