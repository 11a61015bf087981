"""Digests of a folder's files that are remembered: gigabytes are read once, and again only when a file has changed."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.errors import ArtifactError, StorageError
from tutelage.files import files_below, read_object, readable_digest, write_json

TICK_NS = 20_000_000  # two changes of a file may bear one time where they are as close as this: the kernel's clock ticks
COARSE_TICK_NS = 2_000_000_000  # the same on file systems that keep whole seconds


@dataclass(slots=True)
class Digests:
    """The digests of a folder's files, kept in a file: content is read again only where size, times or inode have changed.

    Example of the file:
        {"made": {"model.safetensors": "9f86…"}, "seen": {"model.safetensors": [4096, 17…, 17…, 81, "9f86…"]}}
    """

    memory: Path
    made: dict[str, str]  # by name: the digests when the folder was made, or first found to be whole
    seen: dict[str, list[Any]]  # by name: size, time of the last change of content and of anything, inode, digest

    @classmethod
    def open(cls, memory: Path) -> Digests:
        """What was kept; nothing of a file that is damaged, as all of it can be found again."""
        try:
            kept = read_object(memory)
            return cls(memory, {str(k): str(v) for k, v in kept["made"].items()}, dict(kept["seen"]))
        except (FileNotFoundError, ArtifactError, KeyError, AttributeError, TypeError, ValueError):
            return cls(memory, {}, {})

    def of(self, folder: Path) -> dict[str, str]:
        """The digests of all files below `folder` as they are now."""
        found: dict[str, str] = {}
        stamps: dict[str, list[Any]] = {}
        for name, file in files_below(folder).items():
            stamp = _stamp(file)
            known = self.seen.get(name)
            if isinstance(known, list) and known[:-1] == stamp:
                found[name] = str(known[-1])
            else:
                stamp = _settled(file, stamp)
                found[name] = readable_digest(file)
            if stamp == _stamp(file):  # else it changes while it is read
                stamps[name] = [*stamp, found[name]]
        if stamps != self.seen:
            self.seen = stamps
            self._save()
        return found

    def keep_made(self, digests: dict[str, str]) -> None:
        """Keeps these as the digests of the folder when it was made."""
        if digests != self.made:
            self.made = dict(digests)
            self._save()

    def _save(self) -> None:
        # Where nobody may write, in a run of another user or on a full disk, files are read again each time.
        with contextlib.suppress(StorageError, OSError):
            write_json(self.memory, {"made": self.made, "seen": self.seen})


def _stamp(file: Path) -> list[Any]:
    at = file.stat()
    return [at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino]


def _settled(file: Path, stamp: list[Any]) -> list[Any]:
    """The stamp of a file once a change to it would get another time: for one just written, some milliseconds later."""
    changed = int(stamp[2])
    tick = TICK_NS if changed % 1_000_000_000 else COARSE_TICK_NS
    age = time.time_ns() - changed
    if 0 <= age < tick:
        time.sleep((tick - age) / 1e9)
    return _stamp(file)
