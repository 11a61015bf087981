"""Child processes that answer questions and may be killed: parsers on hostile text, grammars, foreign templates, functions of
the user, and tokenizing on every core. One protocol for all: a line of JSON asks, a line of JSON answers.

Limits are two: processor time and memory are the kernel's, set in the child before each question; wall time is the parent's,
which kills the child's process group. `main` is the child's side; it imports torch only if its function does.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import inspect
import json
import math
import os
import select
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.errors import WorkerError

START_SECONDS = 120.0
MEMORY = 1 << 30  # bytes of address space beyond what a bounded process starts with
MAX_LINE, MAX_TRACE = 300, 20_000  # characters kept of an exception and of its traceback
_PACKAGE = Path(__file__).parent
_CODE = "import sys; sys.path.insert(0, sys.argv.pop(1)); from tutelage.workers import main; main()"


@dataclass(slots=True, frozen=True)
class Answer:
    """What came back: a value, an exception, or the reason why there was no answer at all."""

    value: Any = None
    error: str = ""  # the exception: "ValueError: no such number"
    at: str = ""  # the last line of the user's own code that was reached: "mine.py:7"
    trace: str = ""  # the traceback, for the log
    lost: str = ""  # "took more than 2 s"

    @property
    def why(self) -> str:
        """What went wrong and where, in one line; empty if nothing did."""
        return self.lost or (f"{self.error} ({self.at})" if self.at else self.error)


class Workers:
    """Up to `most` processes that answer questions. Safe to use from several threads.

    target: "module:function"; called once in each process with `setup`, it returns the function that answers questions. Both,
    and every question and answer, are JSON. seconds: limit of one question, None for no limit; processor time if `bounded`,
    which also limits memory to `MEMORY`, silences stderr, and allows ten times as much wall time and 30 s; otherwise wall time.

    Processes start with the first question, or with `start`, and again after one was killed. They end with this object, with
    `close`, and with the parent however that ends.
    """

    def __init__(
        self, target: str, setup: Any = None, *, seconds: float | None = None, wall_seconds: float | None = None, most: int = 1,
        bounded: bool = False, env: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._seconds, self._most, self._env = seconds, most, dict(env or {})
        self._wall = wall_seconds or (seconds and (10 * seconds + 30 if bounded else seconds))
        self._hello = {"target": target, "setup": setup, "bounded": bounded}
        self._free = threading.BoundedSemaphore(most)
        self._idle: list[_Process] = []
        self._alive: set[_Process] = set()  # busy ones included
        weakref.finalize(self, _end_all, self._alive)

    def start(self) -> None:
        """Makes one process ready. Raises `WorkerError` if it cannot load its function."""
        if not self._idle:
            self._idle.append(self._make())

    def ask(self, question: Any, *, wait: float | None = None) -> Answer:
        """Raises `WorkerError` if no process can be started, `BlockingIOError` if all are busy for `wait` seconds."""
        if not self._free.acquire(timeout=-1 if wait is None else wait):
            raise BlockingIOError
        try:
            process = self._take() or self._make()
            try:
                found = process.ask({"question": question, "seconds": self._seconds}, self._wall)
            except BaseException:
                self._end(process)
                raise
            if found is not None:
                self._idle.append(process)
                return Answer(**found)
            lost = f"took more than {self._seconds:g} s" if process.late else process.ended()
            self._end(process)
            return Answer(lost=lost)
        finally:
            self._free.release()

    def ask_all(self, questions: Iterable[Any]) -> Generator[Answer, None, None]:
        """The answers in the order of the questions, each as soon as it and those before it are there.

        What is still running when the caller stops early is killed. Raises like `ask`.
        """
        if self._most == 1:
            yield from map(self.ask, questions)
            return
        threads = ThreadPoolExecutor(self._most)
        answers = [threads.submit(self.ask, question) for question in questions]
        try:
            for answer in answers:
                yield answer.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            self.close()
            raise
        finally:
            threads.shutdown()

    def close(self) -> None:
        """Ends all processes, busy ones too. A later question starts new ones."""
        self._idle.clear()
        _end_all(self._alive)

    def _take(self) -> _Process | None:
        """An idle process that still lives."""
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread was faster
                process = self._idle.pop()
                if process.alive:
                    return process
                self._end(process)
        return None

    def _make(self) -> _Process:
        process = _Process(bool(self._hello["bounded"]), self._env)
        self._alive.add(process)
        try:
            ready = process.ask(self._hello, START_SECONDS)
        except BaseException:
            self._end(process)
            raise
        if ready is None or ready.get("error"):
            said = Answer(**ready) if ready else Answer(lost="it did not start in time" if process.late else process.ended())
            self._end(process)
            if said.at:  # the user's code was found, and raises
                from tutelage import log  # here: workers start without it

                log.say(said.trace.rstrip())
            raise WorkerError(f"`{self._hello['target']}` cannot be loaded", found=said.why)
        return process

    def _end(self, process: _Process) -> None:
        self._alive.discard(process)
        process.end()


class _Process:
    def __init__(self, quiet: bool, env: Mapping[str, str]) -> None:
        self.late = False
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-c", _CODE, str(_PACKAGE.parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None, env={**os.environ, **env},
            start_new_session=True,  # Ctrl-C stops the parent, which ends this; and a group that can be killed
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def ask(self, question: Any, seconds: float | None) -> dict[str, Any] | None:
        """The next line; None if there is none: the process was killed, or ended."""
        assert self._popen.stdin is not None and self._popen.stdout is not None
        timer = None if seconds is None else threading.Timer(seconds, self._expire)
        if timer:
            timer.daemon = True
            timer.start()
        try:
            self._popen.stdin.write(json.dumps(question).encode() + b"\n")
            self._popen.stdin.flush()
            found: dict[str, Any] = json.loads(self._popen.stdout.readline())
            return found
        except (OSError, ValueError):  # nothing, or half a line
            return None
        finally:
            if timer:
                timer.cancel()

    def ended(self) -> str:
        """How a process ended that was not killed by the timer."""
        status = self._popen.wait()
        if -status in (signal.SIGXCPU, signal.SIGKILL):
            return "took more time or memory than it may"
        return f"ended its process ({f'signal {-status}' if status < 0 else f'status {status}'})"

    def _expire(self) -> None:
        self.late = True
        self._kill()

    def _kill(self) -> None:
        if self._popen.returncode is None:
            with contextlib.suppress(OSError):
                os.killpg(self._popen.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kills and reaps it; a thread that waits for its answer gets none."""
        self._kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


def _end_all(processes: set[_Process]) -> None:
    while processes:
        processes.pop().end()


def main() -> None:
    """The child's side: loads one function and answers questions with it until the parent closes the pipe."""
    sys.path.append(sys.path.pop(0))
    source, sink = os.fdopen(os.dup(0), "rb"), os.dup(1)
    os.dup2(2, 1)  # what functions print is no answer
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # and what they read is no question
    hello = json.loads(source.readline())
    module, _, name = hello["target"].rpartition(":")
    try:
        answer = getattr(importlib.import_module(module), name)(hello["setup"])
        if hello["bounded"]:
            _limit("RLIMIT_AS", _address_space() + MEMORY)
    except BaseException as error:
        _say(sink, raised(error))
        return
    _say(sink, {})
    for line in source:
        asked = json.loads(line)
        if hello["bounded"] and asked["seconds"] is not None:
            _limit("RLIMIT_CPU", math.ceil(time.process_time() + asked["seconds"]))
        with _ending_with_parent(source.fileno()):
            said = _answer(answer, asked["question"])
        _say(sink, said)


@contextlib.contextmanager
def _ending_with_parent(pipe: int) -> Iterator[None]:
    """While a question is worked on, the kernel ends this process when the parent's end of the pipe closes: a thread could not,
    behind C code that holds the interpreter's lock. Between questions the end of the pipe is read."""
    flags = fcntl.fcntl(pipe, fcntl.F_GETFL)
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(pipe, fcntl.F_SETFL, flags | os.O_ASYNC)  # SIGIO, which ends a process
    if select.select([pipe], [], [], 0)[0]:  # the parent was gone already
        os._exit(0)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETFL, flags)


def raised(error: BaseException, own: Any = None) -> dict[str, str]:
    """The fields of `Answer` for an exception. If no line of the user's was reached (a wrong signature), `at` is the line that
    defines `own`."""
    said = list(traceback.TracebackException.from_exception(error).format_exception_only())
    line = " ".join((said[-1] if isinstance(error, SyntaxError) else "".join(said)).split())
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        places.append((error.filename, error.lineno))
    at = next((f"{_near(file)}:{row}" for file, row in reversed(places) if _is_own(file)), "") or _defined(own)
    trace = "".join(traceback.format_exception(error, limit=-8))
    return {"error": line[:MAX_LINE], "at": at, "trace": trace[-MAX_TRACE:]}


def _is_own(file: str) -> bool:
    """Whether a file is the user's: not ours, not Python's, not an installed library's."""
    theirs = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return not file.startswith("<") and not any(Path(file).is_relative_to(one) for one in (*theirs, _PACKAGE))


def _defined(own: Any) -> str:
    try:
        return f"{_near(str(inspect.getsourcefile(own)))}:{inspect.getsourcelines(own)[1]}"
    except (TypeError, OSError):  # not from a file
        return ""


def _near(file: str) -> str:
    """The path from the working folder, if it lies below."""
    path = Path(file)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _answer(function: Callable[[Any], Any], question: Any) -> dict[str, Any]:
    try:
        return {"value": function(question)}
    except MemoryError:
        return {"lost": "took more memory than it may"}
    except BaseException as error:
        return raised(error, inspect.unwrap(function))


def _say(sink: int, what: dict[str, Any]) -> None:
    try:
        data = json.dumps(what).encode() + b"\n"
    except (TypeError, ValueError) as error:
        data = json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n"
    with contextlib.suppress(BrokenPipeError):
        while data:
            data = data[os.write(sink, data) :]


def _limit(kind: str, value: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        limit = getattr(resource, kind)
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))


def _address_space() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as f:
            return int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: a guess
        return MEMORY
