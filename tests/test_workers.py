"""Worker processes: limits, order, and that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tutelage.errors import WorkerError
from tutelage.workers import Answer, Workers

HERE = f"{__name__}:"


def answering(setup: Any) -> Callable[[Any], Any]:
    """What the workers of these tests run: an action by name."""
    actions: dict[str, Callable[[Any], Any]] = {
        "setup": lambda _: setup, "pid": lambda _: os.getpid(), "sleep": lambda x: time.sleep(x) or x, "loop": _loop,
        "fill": lambda x: len(bytearray(x)), "divide": lambda x: 1 // x, "print": print, "read": lambda _: input(),
        "exit": os._exit, "hold": _hold,
    }  # fmt: skip
    return lambda question: actions[question[0]](question[1])


def _loop(_: Any) -> None:
    while True:
        pass


def _hold(ready: str) -> None:
    """Holds the interpreter's lock in C code for about half a minute."""
    Path(ready).write_text(str(os.getpid()))
    pow(3, 1 << 28)


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends within some seconds; a zombie has not."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.02)
    return False


def test_answers_come_in_order_from_several_processes() -> None:
    """Guards against answers that are given to other questions, and work that one process does alone."""
    workers = Workers(HERE + "answering", [1], most=2)
    assert [a.value for a in workers.ask_all([("sleep", x) for x in (0.3, 0.1, 0.2, 0.0)])] == [0.3, 0.1, 0.2, 0.0]
    assert workers.ask(("setup", None)) == Answer([1])
    assert len({a.value for a in workers.ask_all([("pid", None)] * 2)}) <= 2
    workers.close()


def test_each_limit_ends_one_question_only() -> None:
    """Guards against a question past its limits that takes others along, or a process that is not replaced."""
    workers = Workers(HERE + "answering", seconds=1.0, bounded=True)
    assert workers.ask(("loop", None)).lost == "took more time or memory than it may"
    assert workers.ask(("fill", 2 << 30)).lost == "took more memory than it may"
    assert "ZeroDivisionError" in workers.ask(("divide", 0)).error and workers.ask(("divide", 1)).value == 1
    assert workers.ask(("exit", 3)).lost == "ended its process (status 3)"
    workers.close()
    clocked = Workers(HERE + "answering", seconds=0.3)
    assert clocked.ask(("sleep", 60)).lost == "took more than 0.3 s"
    assert clocked.ask(("print", "no answer")).value is None and "EOFError" in clocked.ask(("read", None)).error
    clocked.close()
    with pytest.raises(WorkerError, match="cannot be loaded"):
        Workers(HERE + "nothing").start()


def test_no_process_is_left_after_close_or_an_early_stop() -> None:
    """Guards against zombies and against busy workers that go on when the caller stopped."""
    workers = Workers(HERE + "answering", most=2)
    pid = workers.ask(("pid", None)).value
    answers = workers.ask_all([("pid", None), ("sleep", 60), ("sleep", 60)])
    next(answers)
    pids = [process._popen.pid for process in workers._alive]
    answers.close()
    assert pid in pids and all(map(gone, pids))
    workers.ask(("pid", None))  # it is started again
    late = threading.Timer(0.5, workers.close)
    late.start()
    assert workers.ask(("sleep", 60)).lost


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    """Guards against orphans: also one that is behind C code with the interpreter's lock, where no thread of its own could see
    that the parent was killed."""
    ready = tmp_path / "pid"
    code = f"from tutelage.workers import Workers; Workers({HERE + 'answering'!r}).ask(('hold', {str(ready)!r}))"
    parent = subprocess.Popen([sys.executable, "-c", code])
    while not (ready.exists() and ready.read_text()):
        assert parent.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    pid, until = int(ready.read_text()), time.monotonic() + 5
    while time.monotonic() < until and _running(pid):
        time.sleep(0.02)
    assert not _running(pid)


def _running(pid: int) -> bool:
    """A killed orphan may wait for its new parent to reap it, which is not ours to do."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
