"""Files appear whole or not at all, and the operating system's refusals say what to do."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tutelage.errors import DataError, StorageError
from tutelage.files import folder_digest, read_json, storage_errors, whole_file, whole_folder, write_json


def test_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    """A digest that follows times or the folder's place, or that misses a renamed or a longer file."""
    for name in ("a", "b"):
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / "x" / "1").write_text("one")
        (tmp_path / name / ".lock").write_text(name)
    os.utime(tmp_path / "b" / "x" / "1", (1, 1))
    first = folder_digest(tmp_path / "a")
    assert first == folder_digest(tmp_path / "b")
    (tmp_path / "b" / "x" / "1").rename(tmp_path / "b" / "x" / "2")
    assert folder_digest(tmp_path / "b") != first
    (tmp_path / "a" / "x" / "1").write_text("onf")
    assert folder_digest(tmp_path / "a") != first


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
        (OSError(errno.EACCES, "Permission denied"), "permission denied"),
        (OSError("1000 requested and 12 written"), "the disk is full"),  # numpy's
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
    ],
)
def test_refusals_say_what_to_do(tmp_path: Path, raised: Exception, says: str) -> None:
    """A traceback for a full disk, whichever library met it."""
    with pytest.raises(StorageError, match=says) as caught, storage_errors(tmp_path / "x"):
        raise raised
    assert caught.value.fix and caught.value.file == tmp_path / "x"


@pytest.mark.parametrize("raised", [OSError(errno.ENOENT, "gone"), ValueError("28"), DataError("(os error 28)")])
def test_other_errors_stay_what_they_are(tmp_path: Path, raised: Exception) -> None:
    """A bug of ours that is told as a full disk."""
    with pytest.raises(type(raised)) as caught, storage_errors(tmp_path):
        raise raised
    assert caught.value is raised


def _npy(folder: Path) -> None:
    with whole_file(folder / "a.npy", "wb") as f:
        np.save(f, np.zeros(1 << 20))


def _tensors(folder: Path) -> None:
    from safetensors.numpy import save_file

    with whole_folder(folder / "model") as out:
        save_file({"a": np.zeros(1 << 20)}, out / "a.safetensors")


def _lines(folder: Path) -> None:
    with whole_file(folder / "a.jsonl") as f:
        for _ in range(1 << 12):
            f.write("x" * 1024)


@pytest.mark.parametrize("write", [_npy, _tensors, _lines])
def test_full_disk(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """On a disk that is really full: numpy and safetensors raise errors of their own, and a half file stays."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if made.returncode:
        pytest.skip("only root can make a small disk to fill")
    try:
        write_json(disk / "old.json", {"kept": True})
        with pytest.raises(StorageError, match="the disk is full"):
            write(disk)
        assert [p.name for p in disk.iterdir()] == ["old.json"] and read_json(disk / "old.json") == {"kept": True}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_whole_folder_replaces(tmp_path: Path) -> None:
    """Files of the old folder that live on in the new one."""
    for name in ("one", "two"):
        with whole_folder(tmp_path / "f") as out:
            (out / name).write_text(name)
    assert [p.name for p in tmp_path.rglob("*")] == ["f", "two"]


def test_text_is_utf8_whatever_the_locale(tmp_path: Path, monkeypatch: Any) -> None:
    """Umlauts escaped or written in the locale's encoding."""
    monkeypatch.setenv("LC_ALL", "C")
    write_json(tmp_path / "a.json", {"é": "日本"})
    assert "日本".encode() in (tmp_path / "a.json").read_bytes() and read_json(tmp_path / "a.json") == {"é": "日本"}
