"""Work that may hang or fill the memory, in processes that can be killed: parsers on hostile text, functions of the user.

`Workers` is the side that asks, in lines of JSON; `inside.py` is the side that may be killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tutelage import log
from tutelage.errors import RewardError

START_SECONDS = 120.0
PATIENCE = 10, 30.0  # times the processor time, and seconds, that it may take on a machine that does other things too
Role = Literal["function", "reward", "environment"]
_MODULE = "tutelage.rewards.inside"
_CODE = f"import sys; sys.path.insert(0, sys.argv.pop(1)); from {_MODULE} import main; main()"


@dataclass(slots=True, frozen=True)
class Answer:
    """What came back: a value, or what was raised, or why there was no answer at all."""

    value: Any = None
    error: str = ""  # what was raised: "ValueError: no such number"
    at: str = ""  # the user's own last line that was reached: "mine.py:7"
    trace: str = ""  # the traceback, for the log
    lost: str = ""  # "took more than 2 s"

    @property
    def why(self) -> str:
        """In a line, what went wrong and where; empty where nothing did."""
        return self.lost or (f"{self.error} ({self.at})" if self.at else self.error)


class Workers:
    """Up to `most` processes that answer questions by the function at `target` ("module:function"). Safe from several threads.

    A question may take `seconds`: of processor time where `bounded`, and then also 1 GiB of memory; else by the clock. With
    the role "reward" it is the JSON of a `Rollout`, which the function gets as a record and turns into a number; with
    "environment" a step of an episode (`inside.hosted`). The processes are started by the first question, or by `start`, and
    again after one that was killed.
    """

    def __init__(self, target: str, *, seconds: float, most: int = 1, bounded: bool = True, role: Role = "function") -> None:
        self._seconds, self._most, self._bounded = seconds, most, bounded
        self._told = {"target": target, "bounded": bounded, "role": role}
        self._free = threading.BoundedSemaphore(most)
        self._idle: list[_Process] = []
        weakref.finalize(self, _end_all, self._idle)

    def start(self) -> None:
        """Makes one process ready. Raises `RewardError` where it can't load its function."""
        if not self._idle:
            self._idle.append(self._make())

    def ask_all(self, questions: Sequence[Any]) -> list[Answer]:
        """The answers in the order of the questions. Raises `RewardError` where no process can be started."""
        if self._most == 1 or len(questions) == 1:
            return [self.ask(question) for question in questions]
        with ThreadPoolExecutor(self._most) as threads:
            return list(threads.map(self.ask, questions))

    def ask(self, question: Any) -> Answer:
        with self._free:
            process = next((p for p in iter(self._take, None) if p.alive), None) or self._make()
            seconds = PATIENCE[0] * self._seconds + PATIENCE[1] if self._bounded else self._seconds
            found = process.ask({"question": question, "seconds": self._seconds}, seconds)
            if found is not None:
                self._idle.append(process)
                return Answer(**found)
            lost = f"took more than {self._seconds:g} s" if process.late else process.ended()
            process.end()
            return Answer(lost=lost)

    def close(self) -> None:
        _end_all(self._idle)

    def _take(self) -> _Process | None:
        return self._idle.pop() if self._idle else None

    def _make(self) -> _Process:
        return _Process(self._told)


class _Process:
    def __init__(self, told: Mapping[str, Any]) -> None:
        self.late = False
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-c", _CODE, str(Path(__file__).parents[2])], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if told["bounded"] else None,
            start_new_session=True,  # Ctrl-C stops a run, not this
        )  # fmt: skip
        ready = self.ask(told, START_SECONDS)
        if ready is None or ready.get("error"):
            self.end()
            said = Answer(**ready) if ready else Answer(lost="it did not start in time" if self.late else self.ended())
            if said.at:  # it is there, and raises
                log.say(said.trace.rstrip())
            raise RewardError(f"`{told['target']}` cannot be loaded", found=said.why)

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def ask(self, question: Any, seconds: float) -> dict[str, Any] | None:
        """The next line; None when there is none."""
        assert self._popen.stdin is not None and self._popen.stdout is not None
        timer = threading.Timer(seconds, self._expire)
        timer.start()
        try:
            self._popen.stdin.write(json.dumps(question).encode() + b"\n")
            self._popen.stdin.flush()
            found: dict[str, Any] = json.loads(self._popen.stdout.readline())
            return found
        except (OSError, ValueError):  # nothing, or half a line
            return None
        finally:
            timer.cancel()

    def ended(self) -> str:
        """How a process ended that was not killed from here."""
        status = self._popen.wait()
        if -status in (signal.SIGXCPU, signal.SIGKILL):
            return "took more time or memory than it may"
        return f"ended its process ({f'signal {-status}' if status < 0 else f'status {status}'})"

    def _expire(self) -> None:
        self.late = True
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self._popen.pid, signal.SIGKILL)

    def end(self) -> None:
        self._kill()
        with contextlib.suppress(OSError):
            self._popen.communicate()


def _end_all(processes: list[_Process]) -> None:
    while processes:
        processes.pop().end()
