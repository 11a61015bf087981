"""The machine's measurement and the doctor."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tutelage.plan import doctor as doctor_module
from tutelage.plan import machine
from tutelage.plan.doctor import Check, doctor, print_doctor
from tutelage.plan.machine import Machine, measure

M = Machine(
    cpu="test", cores=2, threads=1, memory_bytes=8 << 30, gemm_flops_fp32=1e11, gemm_flops_bf16=2e10, memory_bandwidth=1e10,
    torch_version="0", quiet=True,
)  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_measured_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the cache: a quiet reading is taken once, whatever is asked later; a broken file is measured again."""
    readings = [M, replace(M, gemm_flops_fp32=5.0)]
    monkeypatch.setattr(machine, "_measure", lambda threads: readings.pop(0))
    assert measure(threads=1) == measure(threads=1) == M
    machine.cache_file(1).write_text("{", encoding="utf-8")
    assert measure(threads=1).gemm_flops_fp32 == 5.0


def test_disturbed_reading_is_taken_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a rate that stays low for ever because something else ran during the first measurement."""
    low = replace(M, gemm_flops_fp32=1.0, memory_bandwidth=1e12, quiet=False)
    readings = [low, M]
    monkeypatch.setattr(machine, "_measure", lambda threads: readings.pop(0))
    assert measure(threads=1) == low
    better = measure(threads=1)
    assert better.gemm_flops_fp32 == 1e11 and better.memory_bandwidth == 1e12 and better.quiet
    assert measure(threads=1) == better and not readings


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a run that fails because the home folder is read-only."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(machine, "_measure", lambda threads: M)
    assert measure(threads=1) == M


def test_real_measurement() -> None:
    """Guards the measurement itself: positive rates, this machine's facts, threads put back."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    found = measure(cache=False, threads=1)
    assert torch.get_num_threads() == before and found.threads == 1
    assert found.gemm_flops_fp32 > 1e8 and found.gemm_flops_bf16 > 1e7 and found.memory_bandwidth > 1e8
    assert found.memory_bytes >= machine.memory_available() > 0 and found.cores >= 1
    assert found.peak_flops("cpu", "bfloat16") == found.gemm_flops_bf16


def test_cached_measurement_needs_no_torch(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the start-up time: a plan is printed without importing torch when the rate is known."""
    monkeypatch.setattr(machine, "_measure", lambda threads: M)
    measure(threads=3)
    code = "import sys; from tutelage.plan.machine import measure; print(measure(threads=3).cpu, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["test", "False"]


def find(checks: list[Check], name: str) -> Check:
    return next(c for c in checks if c.name == name)


def test_doctor_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards the advice: no compiler, no extra, slow bfloat16, no torch; only the last makes the exit status 1."""
    monkeypatch.setattr(machine, "find_compiler", lambda: None)
    monkeypatch.setattr(doctor_module.importlib.util, "find_spec", lambda name: None if name == "fastapi" else object())
    checks = doctor(lambda: "no C++ compiler found", tmp_path, M)
    assert find(checks, "C++ compiler").status == "warn" and "apt install" in find(checks, "C++ compiler").fix
    assert find(checks, "CPU kernels").status == "warn"
    assert find(checks, "extra serve").fix == 'pip install "tutelage[serve]"' and "server" in find(checks, "extra serve").detail
    assert "keep dtype=float32" in find(checks, "bfloat16 products").detail
    fast = doctor(lambda: "", tmp_path, replace(M, gemm_flops_bf16=1e12))
    assert "may pay" in find(fast, "bfloat16 products").detail and find(fast, "CPU kernels").status == "ok"
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    assert print_doctor(checks, console) == 0
    assert 'pip install "tutelage[serve]"' in console.export_text()
    monkeypatch.setattr(machine, "torch_version", lambda: "none")
    broken = doctor(lambda: "", tmp_path, M)
    assert print_doctor(broken, console) == 1 and "whl/cpu" in find(broken, "torch").fix


def test_cache_key_changes_with_threads_and_torch(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a rate of one setting shown for another."""
    names = {machine.cache_file(1), machine.cache_file(2)}
    monkeypatch.setattr(machine, "torch_version", lambda: "9.9")
    names.add(machine.cache_file(1))
    assert len(names) == 3
    measure_file = json.dumps(sorted(str(n) for n in names))
    assert str(cache) in measure_file
