"""`tutelage doctor`: is this machine ready, what is slow here, what is missing and how to get it."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tutelage.errors import SandboxError
from tutelage.plan import machine as here
from tutelage.plan.machine import Machine
from tutelage.sandbox.sandbox import Sandbox

if TYPE_CHECKING:
    from rich.console import Console

Status = Literal["ok", "warn", "fail"]
CPU_TORCH = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
LEAST_MEMORY, LEAST_DISK = 2e9, 1e9

# extra: (the modules that tell it is there, what it is for)
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "hf": (
        ("transformers", "peft", "datasets", "pyarrow"),
        "models outside our families, adapters, Parquet, Hugging Face data sets",
    ),
    "data": (("trafilatura", "lxml_html_clean", "pypdfium2"), "HTML and PDF as sources"),
    "report": (("matplotlib", "tensorboard"), "figures in reports, TensorBoard events"),
    "serve": (("fastapi", "uvicorn"), "the OpenAI-compatible server"),
    "rl": (("math_verify",), "the reward `maths` (by=numbers does without)"),
    "eval": (("sklearn",), "the baseline of word counts beside a classifier"),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's table."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def doctor(
    why_no_kernels: Callable[[], str] | None = None, runs: Path | None = None, machine: Machine | None = None
) -> list[Check]:
    """All checks. `why_no_kernels` is `models.kernels.why_not` (empty text: they work); `runs` the folder that will fill up."""
    checks = [_python(), _torch(), _cores(), _memory(), _disk(runs or Path("runs")), _compiler()]
    if checks[1].status != "fail":
        if why_no_kernels is not None:
            checks.append(_kernels(why_no_kernels()))
        checks += _rates(machine or here.measure())
    return [*checks, _sandbox(), *_extras(), _network()]


def print_doctor(checks: list[Check], console: Console | None = None) -> int:
    """Prints the table; returns the exit status: 1 when something fails, else 0."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "check", "found", "to do")
    for check in checks:
        table.add_row(f"[{STYLES[check.status]}]{check.status}[/]", check.name, _plain(check.detail), _plain(check.fix))
    (console or Console()).print(table)
    return 1 if any(c.status == "fail" for c in checks) else 0


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _python() -> Check:
    return Check("Python", "ok", f"{platform.python_version()}, {sys.executable}")


def _torch() -> Check:
    version = here.torch_version()
    if version == "none":
        return Check("torch", "fail", "not installed", CPU_TORCH)
    if importlib.util.find_spec("torch") is None:
        return Check("torch", "fail", f"{version} is listed but cannot be imported", CPU_TORCH)
    if version.endswith("+cpu") or sys.platform == "darwin":
        return Check("torch", "ok", f"{version}, CPU build" if version.endswith("+cpu") else version)
    import torch

    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return Check("torch", "ok", f"{version}, CPU build")
    if torch.cuda.is_available():
        return Check("torch", "ok", f"{version}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPU")
    return Check("torch", "warn", f"{version}, CUDA build but no GPU: 2 GB of disk for nothing", f"optional: {CPU_TORCH}")


def _cores() -> Check:
    cores, listed = here.core_count(), os.cpu_count() or 1
    detail = f"{cores} of {listed}, {here.cpu_name()}"
    if cores < 2:
        return Check("cores", "warn", detail, "training on one core takes twice the time of the README's figures")
    return Check("cores", "ok", detail)


def _memory() -> Check:
    total, free = here.memory_bytes(), here.memory_available()
    detail = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f}"
    if free < LEAST_MEMORY:
        return Check("memory", "warn", detail, "close other programs, or lower micro_rows")
    return Check("memory", "ok", detail)


def _disk(runs: Path) -> Check:
    free = here.disk_free(runs)
    detail = f"{free / 1e9:.1f} GB free for {runs}"
    return (
        Check("disk", "warn", detail, "free some space, or choose another folder with --runs")
        if free < LEAST_DISK
        else Check("disk", "ok", detail)
    )


def _compiler() -> Check:
    found = here.find_compiler()
    if found is None:
        return Check(
            "C++ compiler", "warn", "none: plain torch is used, which is slower", "install one, for example apt install g++"
        )
    return Check("C++ compiler", "ok", found)


def _kernels(reason: str) -> Check:
    if reason:
        return Check("CPU kernels", "warn", reason.splitlines()[0], "training works without them, more slowly")
    return Check("CPU kernels", "ok", "compiled and loaded")


def _rates(m: Machine) -> list[Check]:
    fp32, bf16 = m.gemm_flops_fp32 / 1e9, m.gemm_flops_bf16 / 1e9
    note = "" if m.quiet else " (something else kept the cores busy: may be higher)"
    out = [
        Check(
            "float32 products",
            "ok",
            f"{fp32:,.0f} GFLOP/s on {m.threads} threads{note}; memory {m.memory_bandwidth / 1e9:.0f} GB/s",
        )
    ]
    if m.bf16_pays:
        out.append(
            Check("bfloat16 products", "ok", f"{bf16:,.0f} GFLOP/s, {bf16 / fp32:.1f} x float32: dtype=bfloat16 may pay here")
        )
    else:
        out.append(Check("bfloat16 products", "ok", f"{bf16:,.0f} GFLOP/s, {bf16 / fp32:.1f} x float32: keep dtype=float32 here"))
    for card in m.accelerators:
        fast, faster = card.gemm_flops_fp32 / 1e12, card.gemm_flops_bf16 / 1e12
        text = f"{card.memory_bytes / 1e9:.0f} GB, {fast:.0f} TFLOP/s float32, {faster:.0f} bfloat16"
        out.append(Check(card.name, "ok", text))
    return out


def _sandbox() -> Check:
    """Model-written code: which walls there are, tried here and now."""
    try:
        with Sandbox(parallel=1) as sandbox:
            walls = sandbox.walls
    except SandboxError as error:
        why = error.message if error.found is None else f"{error.message} ({error.found})"
        return Check("sandbox", "warn", f"{why}; all else works", error.fix or "")
    return Check("sandbox", "ok", f"{', '.join(walls)}, limits; every forbidden act was tried, none was possible")


def _extras() -> list[Check]:
    out = []
    for extra, (modules, purpose) in EXTRAS.items():
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        if missing:
            out.append(
                Check(f"extra {extra}", "warn", f"without {', '.join(missing)}: no {purpose}", f'pip install "tutelage[{extra}]"')
            )
        else:
            out.append(Check(f"extra {extra}", "ok", purpose))
    return out


def _network() -> Check:
    """Nothing is sent or fetched, so there is nothing to probe; what would let other libraries do so is named."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return Check("network", "ok", "not used; Hugging Face libraries are held offline (HF_HUB_OFFLINE=1)")
    return Check("network", "ok", "not used, except for a source that you name yourself (hf:org/name)")
