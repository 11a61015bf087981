"""Compiles the kernels with the machine's own C++ compiler, once per source, compiler and processor."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("attention.cpp", "decode.cpp", "elementwise.cpp", "forward.cpp", "loss.cpp", "sample.cpp")
HEADERS = ("simd.h", "heads.h", "attend.h")
COMPILERS = ("g++", "clang++", "c++")
# Not -ffast-math: it would hide NaN, and a library linked with it makes the whole process flush denormals.
COMMON = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
# First choice first. With OpenMP the kernels share torch's thread pool; without it they start their own threads.
CHOICES = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native", "-pthread"), ("-pthread",))
TIMEOUT_SECONDS = 300
KEPT_SECONDS = 30 * 24 * 3600.0  # a library that no process loaded for so long is removed


class BuildError(Exception):
    """Why there is no compiled library; the text is for people."""


def default_folder() -> Path:
    """Where compiled kernels are kept: `$XDG_CACHE_HOME/tutelage/kernels`, or the same below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tutelage" / "kernels"


def find_compiler(search: str | None = None) -> str:
    """The first C++ compiler on `search` (default: PATH). Raises BuildError when there is none."""
    for name in COMPILERS:
        found = shutil.which(name, path=search)
        if found:
            return found
    raise BuildError(f"no C++ compiler found ({', '.join(COMPILERS)}): install one, for example `apt install g++`")


def load(folder: Path | None = None, search: str | None = None) -> ctypes.CDLL:
    """The compiled library, from `folder` (default: `default_folder()`) or built now. Raises BuildError.

    When `folder` cannot be written, the library is built in a temporary folder for this process only.
    """
    compiler = find_compiler(search)
    folder = folder or default_folder()
    key = _key(compiler)
    target = folder / f"{key}.so"
    if target.exists():
        try:
            library = ctypes.CDLL(str(target))
        except OSError:
            pass  # cut short by a full disk, or of another machine: built again below
        else:
            with contextlib.suppress(OSError):  # of somebody else, or on a read-only disk
                os.utime(target)  # its time is that of its last use, see `_remove_unused`
            return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
            built = _compile(compiler, Path(scratch))
            built.replace(target)
        _remove_unused(folder)
        return _open(target)
    except OSError:
        with tempfile.TemporaryDirectory(prefix="tutelage-kernels-") as scratch:
            return _open(_compile(compiler, Path(scratch)))


def _remove_unused(folder: Path) -> None:
    """Every version of source, compiler and processor leaves a library: those that nothing has loaded for a month go."""
    for library in folder.glob("*.so"):
        with contextlib.suppress(OSError):  # another process may be removing it
            if time.time() - library.stat().st_mtime > KEPT_SECONDS:
                library.unlink()


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the compiled kernels do not load: {error}") from error


def _compile(compiler: str, scratch: Path) -> Path:
    """Builds into `scratch`, trying the flags from best to plainest."""
    target = scratch / "kernels.so"
    complaint = ""
    for choice in CHOICES:
        command = [compiler, *COMMON, *choice, *(str(FOLDER / x) for x in SOURCES), "-o", str(target)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise BuildError(f"{compiler} took longer than {TIMEOUT_SECONDS} seconds") from None
        if done.returncode == 0:
            return target
        complaint = complaint or done.stderr.strip()
    raise BuildError(f"{compiler} failed: {complaint[-2000:]}")


def _key(compiler: str) -> str:
    """64 hex digits that change with the source, the flags, the compiler and the processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    total = hashlib.sha256(repr((COMMON, CHOICES, compiler, version, _processor())).encode())
    for name in (*SOURCES, *HEADERS):
        total.update((FOLDER / name).read_bytes())
    return total.hexdigest()


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    wanted = [x for x in lines if x.startswith(("flags", "Features", "model name", "CPU part"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(wanted))])
