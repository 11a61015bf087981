"""What a program in the sandbox may use, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, frozen=True, kw_only=True)
class Limits:
    """Bounds of one run."""

    seconds: float = 10.0  # by the clock; past them everything that the program started is killed
    cpu_seconds: float = 10.0  # of processor time, all threads together; counted in whole seconds
    memory: int = 512 << 20  # bytes of address space beyond what Python itself takes; of each process
    disk: int = 16 << 20  # bytes of files in its folder, which is made of memory
    output: int = 64 << 10  # bytes kept of stdout and of stderr, half at the start, half at the end; it is said how much is not
    files: int = 64  # open at a time
    threads: int = 16  # beside its first one
    processes: int = 0  # that it may start; other programs can't be run in any case


@dataclass(slots=True, frozen=True, kw_only=True)
class Outcome:
    """How a run went.

    Example:
        Outcome(exit=1, stdout="", stderr="Traceback …\\nZeroDivisionError: division by zero\\n", reason="error", finished=0)
    """

    exit: int  # status; -N where signal N ended it
    stdout: str
    stderr: str
    reason: str  # done | exit (it left before its end) | error (an exception) | time | cpu | memory | signal
    finished: int = 0  # parts of the program that ran to their end
    seconds: float = field(default=0.0, compare=False)  # by the clock

    @property
    def done(self) -> bool:
        """Whether the program ran to its end: it did not raise, and did not leave by `exit()` or `os._exit(0)`."""
        return self.reason == "done"
