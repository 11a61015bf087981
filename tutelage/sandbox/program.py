"""The process that becomes the program: it puts up the last walls around itself, runs the code and never returns."""

from __future__ import annotations

import builtins
import linecache
import math
import os
import resource
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

from tutelage.sandbox import landlock, seccomp, system
from tutelage.sandbox.root import DEVICES, FOLDER

OURS = 3  # processes of this user in its namespace that are no thread of the program: two of the launcher, and itself
TELL = 3  # the descriptor on which the end is told
FILE = "answer.py"  # what tracebacks call the program


def become(request: Mapping[str, Any], token: str, walls: Sequence[str]) -> NoReturn:
    """Descriptors 0 to 2 are the program's; 3 takes `token`, how many parts ran to their end, and the reason. No other is open.

    The token tells an end that was reached from one that the program wrote there itself. It runs in the same process: a program
    that searches the interpreter for the token can forge an end.
    """
    limits = request["limits"]
    if "namespaces" in walls:
        system.prctl(system.PR_SET_PDEATHSIG, 9)
        system.unshare(system.CLONE_NEWNS | system.CLONE_NEWIPC)
        size = f"size={limits['disk']},nr_inodes=4096,mode=700"
        system.mount("tmpfs", FOLDER, "tmpfs", system.MS_NOSUID | system.MS_NODEV | system.MS_NOEXEC, size)
    os.chdir(FOLDER)
    _limit(limits)
    system.prctl(system.PR_SET_NO_NEW_PRIVS, 1)
    system.drop_capabilities()
    if "landlock" in walls:
        landlock.restrict(FOLDER, DEVICES)
    if "seccomp" in walls:
        seccomp.apply(forks=limits["processes"] > 0)
    _run(request["parts"], token)


def _limit(limits: Mapping[str, Any]) -> None:
    for name, value in {
        "CORE": 0, "MSGQUEUE": 0, "MEMLOCK": 0, "CPU": math.ceil(limits["cpu_seconds"]), "AS": limits["base"] + limits["memory"],
        "FSIZE": limits["disk"], "NOFILE": limits["files"], "NPROC": OURS + limits["threads"] + limits["processes"],
    }.items():  # fmt: skip
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _run(parts: Sequence[str], token: str) -> NoReturn:
    """The parts one after another in one module. A later part is compiled when those before it are through."""
    leave, write = os._exit, os.write
    main = ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __file__=FILE)
    sys.modules["__main__"] = main
    sys.argv = [FILE]
    from _sitebuiltins import Quitter

    for name in ("exit", "quit"):  # those of `site`, which programs know
        setattr(builtins, name, Quitter(name, "Ctrl-D"))
    os.environ.clear()
    # New ones: the launcher's have read ahead, and know files of another kind.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = os.fdopen(number, "w" if number else "r", 1 if number == 2 else -1, "utf-8", "backslashreplace")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    finished, reason, status = 0, "done", 0
    try:
        for part in parts:
            linecache.cache[FILE] = (len(part), None, part.splitlines(keepends=True), FILE)
            exec(compile(part, FILE, "exec", dont_inherit=True), main.__dict__)
            finished += 1
        sys.stdout.flush()
    except SystemExit as error:
        reason = "exit"
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
    except MemoryError:
        reason, status = "memory", 1
        sys.stderr.write("MemoryError\n")
    except BaseException as error:
        reason, status = "error", 1
        shown = error.__traceback__.tb_next if error.__traceback__ else None
        traceback.print_exception(type(error), error, shown)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        write(TELL, f"{token} {finished} {reason}".encode())
    finally:
        leave(status & 255)
