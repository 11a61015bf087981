"""What this machine can do: cores, memory, disk, and the measured rates of matrix products and memory copies.

Rates are the best of some tries: other processes can only lower them. A reading taken while something else kept the cores
busy is marked, and the next call measures again and keeps the better of the two.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.files import write_json

if TYPE_CHECKING:
    import torch

VERSION = 1  # of what the cache file means
QUIET = 0.10  # share of the cores that others may use in a reading that counts as undisturbed
COMPILERS = ("c++", "g++", "clang++")


@dataclass(slots=True, frozen=True, kw_only=True)
class Accelerator:
    """A GPU that torch can use."""

    name: str
    memory_bytes: int
    gemm_flops_fp32: float  # FLOP/s, TF32 off
    gemm_flops_bf16: float
    capability: str  # "9.0"


@dataclass(slots=True, frozen=True, kw_only=True)
class Machine:
    """This machine. Rates are per second, sizes in bytes."""

    cpu: str
    cores: int  # that this process may use
    threads: int  # of the measurement
    memory_bytes: int  # of the machine, or of the container where that is less
    gemm_flops_fp32: float  # best rate over square and training shapes
    gemm_flops_bf16: float
    memory_bandwidth: float  # bytes read and written per second in a large copy
    torch_version: str
    quiet: bool  # False: something else kept the cores busy during the measurement
    accelerators: tuple[Accelerator, ...] = ()

    @property
    def bf16_pays(self) -> bool:
        """Whether bfloat16 products are clearly faster on the CPU."""
        return self.gemm_flops_bf16 > 1.3 * self.gemm_flops_fp32

    def peak_flops(self, device: str = "cpu", dtype: str = "float32") -> float:
        """The measured product rate that a run on `device` is compared with."""
        source: Any = self.accelerators[0] if device.startswith("cuda") and self.accelerators else self
        return float(source.gemm_flops_bf16 if dtype == "bfloat16" else source.gemm_flops_fp32)


# What needs no measurement


@functools.cache
def cpu_name() -> str:
    """The processor's name with family, model and stepping, which tell virtual machines with one name apart."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.machine()
    numbers = "-".join(found.get(k, "?") for k in ("cpu family", "model", "stepping"))
    return f"{name} ({numbers})" if "cpu family" in found else name


def core_count() -> int:
    """Cores that this process may use: its affinity, and the container's quota where there is one."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def memory_bytes() -> int:
    """Memory of the machine, or the container's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        return total if limit == "max" else min(total, int(limit))
    except (OSError, ValueError):
        return total


def memory_available() -> int:
    """Memory that can be used without swapping, now."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, memory_bytes())
    except OSError:
        pass
    return memory_bytes()


def disk_free(path: Path | None = None) -> int:
    """Free bytes where `path` (default: the current folder) lives or would be made."""
    path = (path or Path.cwd()).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def find_compiler() -> str | None:
    """Path of the C++ compiler, or None."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def torch_version() -> str:
    """The installed torch, without importing it; "+cpu" marks the CPU build."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "none"


# Measurement


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tutelage"


def cache_file(threads: int) -> Path:
    key = json.dumps([VERSION, cpu_name(), core_count(), threads, torch_version(), os.environ.get("CUDA_VISIBLE_DEVICES")])
    return cache_folder() / f"machine-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def default_threads() -> int:
    """What torch takes unless told otherwise."""
    try:
        return max(1, int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0]))
    except ValueError:
        return core_count()


def measure(cache: bool = True, threads: int | None = None) -> Machine:
    """This machine with its measured rates, from the cache or in about two seconds (torch's import not counted).

    A cached reading that was disturbed is taken again. An unwritable cache is not an error: it is measured each time.
    """
    threads = threads or default_threads()
    file = cache_file(threads)
    old = _read(file) if cache else None
    if old is not None and old.quiet:
        return old
    found = _measure(threads)
    if old is not None:
        found = _better(old, found)
    if cache:
        try:
            write_json(file, asdict(found))
        except Exception:  # no home, no rights, full disk: only costs the next measurement
            return found
    return found


def _read(file: Path) -> Machine | None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        rows = tuple(Accelerator(**row) for row in values.pop("accelerators"))
        return Machine(**values, accelerators=rows)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _better(a: Machine, b: Machine) -> Machine:
    values = asdict(b)
    for name in ("gemm_flops_fp32", "gemm_flops_bf16", "memory_bandwidth"):
        values[name] = max(getattr(a, name), getattr(b, name))
    return Machine(**{**values, "quiet": a.quiet or b.quiet, "accelerators": b.accelerators})


def _measure(threads: int) -> Machine:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    used, started = _others(), time.perf_counter()
    try:
        with torch.inference_mode():
            fp32 = gemm_rate(torch.float32, seconds=0.5)
            bf16 = gemm_rate(torch.bfloat16, seconds=0.3)
            source = torch.ones(32 * 2**20)
            target = torch.empty_like(source)
            copy = 2 * source.numel() * 4 / _best(lambda: target.copy_(source), 0.2)
            busy = (_others() - used) / (time.perf_counter() - started) / core_count()
            cards = tuple(_accelerator(i) for i in range(torch.cuda.device_count())) if torch.cuda.is_available() else ()
    finally:
        torch.set_num_threads(before)
    return Machine(
        cpu=cpu_name(),
        cores=core_count(),
        threads=threads,
        memory_bytes=memory_bytes(),
        gemm_flops_fp32=fp32,
        gemm_flops_bf16=bf16,
        memory_bandwidth=copy,
        torch_version=torch_version(),
        quiet=busy < QUIET,
        accelerators=cards,
    )


SHAPES = ((2048, 2048, 2048), (8192, 256, 768))  # square, and a small model's feed-forward block


def gemm_rate(
    dtype: torch.dtype, seconds: float, device: str = "cpu", shapes: tuple[tuple[int, int, int], ...] = SHAPES
) -> float:
    """The best FLOP/s of x @ w.T over `shapes` (rows, width in, width out)."""
    import torch

    best = 0.0
    for m, k, n in shapes:
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
        if device == "cpu":
            took = _best(lambda a=a, b=b: torch.nn.functional.linear(a, b), seconds / len(shapes))  # type: ignore[misc]
        else:
            took = _best_cuda(lambda a=a, b=b: torch.nn.functional.linear(a, b), seconds / len(shapes))  # type: ignore[misc]
        best = max(best, 2 * m * k * n / took)
    return best


def _best(fn: Callable[[], Any], seconds: float) -> float:
    fn()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        fn()
        best = min(best, time.perf_counter() - started)
    return best


def _best_cuda(fn: Callable[[], Any], seconds: float) -> float:
    import torch

    def ten() -> None:
        for _ in range(10):
            fn()
        torch.cuda.synchronize()

    return _best(ten, seconds) / 10


def _accelerator(index: int) -> Accelerator:
    import torch

    facts = torch.cuda.get_device_properties(index)
    device, square = f"cuda:{index}", ((4096, 4096, 4096), (8192, 8192, 8192))
    return Accelerator(
        name=facts.name,
        memory_bytes=facts.total_memory,
        gemm_flops_fp32=gemm_rate(torch.float32, 0.2, device, square),
        gemm_flops_bf16=gemm_rate(torch.bfloat16, 0.2, device, square),
        capability=f"{facts.major}.{facts.minor}",
    )


def _others() -> float:
    """CPU seconds that everything but this process has used since the machine started; 0 where that can't be read."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    except OSError:
        return 0.0
    ticks = [int(x) / os.sysconf("SC_CLK_TCK") for x in first.split()[1:]]
    return ticks[0] + ticks[1] + ticks[2] + ticks[7] - sum(os.times()[:4])
