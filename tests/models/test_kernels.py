"""Building the kernels: cached by content, and every way to fail ends on the torch path with a reason."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
import torch

from tutelage.models import kernels, ops
from tutelage.models.kernels import build


@pytest.fixture
def restored():
    """Leaves the process with its ordinary kernels."""
    yield
    kernels.reload()


def needs_compiler() -> str:
    try:
        return build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


def failing_compiler(folder: Path) -> str:
    """A PATH whose only g++ answers --version and compiles nothing."""
    folder.mkdir()
    script = folder / "g++"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && echo fake 1 && exit 0\necho "cannot compile this" >&2\nexit 1\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(folder)


def test_no_compiler_falls_back_with_a_reason(tmp_path: Path, restored: None) -> None:
    """Without a compiler training must run on torch, and say why it is slower."""
    kernels.reload(tmp_path / "cache", search=str(tmp_path))
    assert not kernels.available()
    assert "no C++ compiler found" in kernels.why_not()
    x = torch.randn(3, 8)
    torch.testing.assert_close(ops.silu_mul(x), torch.nn.functional.silu(x[:, :4]) * x[:, 4:])


def test_compile_error_falls_back_with_its_text(tmp_path: Path, restored: None) -> None:
    """A compiler too old for the source is a reason, not a crash."""
    kernels.reload(tmp_path / "cache", search=failing_compiler(tmp_path / "bin"))
    assert not kernels.available()
    assert "cannot compile this" in kernels.why_not()
    assert list((tmp_path / "cache").iterdir()) == []


def test_built_once_then_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process must not compile again; a damaged file must not stop it."""
    needs_compiler()
    cache = tmp_path / "cache"
    build.load(cache)
    (built,) = cache.iterdir()
    assert built.suffix == ".so"

    def refuse(compiler: str, scratch: Path) -> Path:
        raise AssertionError("compiled again")

    with monkeypatch.context() as patch:
        patch.setattr(build, "_compile", refuse)
        build.load(cache)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / built.name).write_bytes(b"not a library")

    def copy(compiler: str, scratch: Path) -> Path:
        return Path(shutil.copy(built, scratch / "kernels.so"))

    monkeypatch.setattr(build, "_compile", copy)
    build.load(damaged)
    assert (damaged / built.name).stat().st_size == built.stat().st_size


def test_libraries_that_nobody_uses_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that grows with every release: what no process loaded for a month goes when something is built, and nothing else;
    a library in use stays however long ago it was built."""
    if not kernels.available():
        pytest.skip(kernels.why_not())
    month, ready = build.KEPT_SECONDS, max(build.default_folder().glob("*.so"), key=lambda p: p.stat().st_mtime)
    monkeypatch.setattr(build, "_compile", lambda compiler, scratch: Path(shutil.copy(ready, scratch / "kernels.so")))
    monkeypatch.setattr(build, "_key", lambda compiler: "old")
    build.load(tmp_path)
    now = (tmp_path / "old.so").stat().st_mtime
    for name, age in (("old", month + 60), ("unused", month + 60), ("lately", month - 3600)):
        (tmp_path / f"{name}.so").touch()
        os.utime(tmp_path / f"{name}.so", (now - age, now - age))
    build.load(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(build, "_key", lambda compiler: "new")
    build.load(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lately.so", "new.so", "old.so"]


def test_unwritable_cache_builds_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only home must cost a compilation per process, not the kernels. (A file in the folder's place stops root too.)"""
    needs_compiler()
    built = build.default_folder()
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    assert kernels.available()
    ready = next(iter(built.glob("*.so")), None)
    if ready is not None:  # saves compiling once more

        def copy(compiler: str, scratch: Path) -> Path:
            return Path(shutil.copy(ready, scratch / "kernels.so"))

        monkeypatch.setattr(build, "_compile", copy)
    library = build.load(blocked / "cache")
    assert library.attention_forward
    assert os.listdir(tmp_path) == ["blocked"]


def test_turned_off() -> None:
    """`disabled` must reach every operation, nest, and end with its block."""
    with kernels.disabled():
        assert not kernels.available()
        assert "turned off" in kernels.why_not()
        with kernels.disabled():
            pass
        assert not kernels.fits(torch.ones(1))
    kernels.use(False)
    try:
        assert not kernels.available()
    finally:
        kernels.use(True)


def test_only_what_the_kernels_know() -> None:
    """Other types, autocast and tracing must go to torch."""
    if not kernels.available():
        pytest.skip(kernels.why_not())
    assert kernels.fits(torch.ones(1), None)
    assert not kernels.fits(torch.ones(1, dtype=torch.float64))
    assert not kernels.fits(torch.ones(1), torch.ones(1, dtype=torch.bfloat16))
    assert not kernels.fits(torch.ones(1, device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.fits(torch.ones(1))
