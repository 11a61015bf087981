"""Our own CPU kernels: whether they may be used, and the compiled library.

Every operation that has a kernel has a plain torch path with the same results to rounding. The kernels are used for float32
tensors on the CPU, when a C++ compiler was found and nobody turned them off. With the same number of threads a result is the
same bit for bit in every run.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tutelage.models.kernels import build

_lock = threading.Lock()
_on = True
_library: ctypes.CDLL | None = None
_reason: str | None = None  # None until the first attempt to load


def use(on: bool) -> None:
    """Turns the kernels on or off for this process (the config's `kernels` setting)."""
    global _on
    _on = on


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Inside the block every operation takes its plain torch path."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before


def available() -> bool:
    """True when the kernels are compiled, loaded and on. The first call may compile (about ten seconds)."""
    return not why_not()


def why_not() -> str:
    """Empty when `available()`, else the reason in words."""
    if not _on:
        return "the kernels are turned off"
    if _reason is None:
        reload()
    return _reason or ""


def reload(folder: Path | None = None, search: str | None = None) -> None:
    """Loads the library again, from `folder`, with a compiler on the path `search`; see `build.load`."""
    global _library, _reason
    with _lock:
        try:
            _library, _reason = build.load(folder, search), ""
        except build.BuildError as error:
            _library, _reason = None, str(error)


def library() -> ctypes.CDLL:
    """The loaded library. Call only when `available()`."""
    if _reason is None:
        reload()
    assert _library is not None, why_not()
    return _library


def fits(*tensors: Tensor | None) -> bool:
    """True when the kernels may work on these tensors: float32, on the CPU, outside `torch.compile` tracing."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    return all(x is None or (x.dtype == torch.float32 and x.device.type == "cpu") for x in tensors) and available()
