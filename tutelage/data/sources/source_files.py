"""The files of a path, folder or glob, and what is in the way there that is no file to read: each with the reason."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tutelage.errors import ConfigError, DataError

LOCKED_FOLDER = "a folder that cannot be listed"


@dataclass(slots=True, frozen=True)
class Found:
    """Something in a source.

    Example:
        Found(path=Path("texts/old.txt"), problem="a link that leads nowhere")
    """

    path: Path
    problem: str | None = None  # why it is no file to read
    unreadable: bool = False  # what it holds is lost to the user: an error, unless on_error=skip


def files_of(source: str) -> list[Path]:
    """Files of a path, folder or glob in name order, hidden ones left out. Raises `DataError` if there is none."""
    return [found.path for found in found_in(source) if found.problem is None]


def found_in(source: str) -> list[Found]:
    """What a path, folder or glob holds, in name order, hidden ones left out. Raises `DataError` if that is nothing."""
    if not source.strip():
        raise ConfigError(
            "an empty name of a source", field="sources", found=repr(source), expected="a file, a folder, a glob, …"
        )
    path = Path(source).expanduser()
    kind = _kind(path)
    if kind == "file":
        return [Found(path)]
    if kind == "folder":
        found = sorted(_walk(path), key=lambda f: f.path)
        if not found:
            raise DataError("this folder holds no files", file=path, fix="put text into it, or name another folder")
        return found
    if is_glob(source):
        found = _matching(str(path))
        if not found:
            raise DataError("no file matches this pattern", found=source, fix="use ** for folders below, as in texts/**/*.md")
        return found
    if kind != "missing":
        raise DataError(f"not a file but {kind}", file=path, expected="a file, a folder or a glob", fix="save it as a file first")
    raise DataError("no such file or folder", file=source, found=_neighbours(path), fix="check the path")


def is_glob(source: str) -> bool:
    return bool(set("*?[") & set(source)) and not os.path.exists(source)


def _neighbours(path: Path) -> str:
    near = path.parent if path.parent.is_dir() else Path.cwd()
    try:
        names = ", ".join(sorted(p.name for p in near.iterdir() if not p.name.startswith("."))[:8])
    except OSError:
        names = "?"
    return f"in {near}: {names or 'nothing'}"


def _kind(path: Path) -> str:
    """file | folder | missing, or what else it is. Raises `DataError` where the system does not say."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return "a link that leads nowhere" if path.is_symlink() else "missing"
    except OSError as error:
        raise _denied(path, error) from error
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"


def _denied(path: Path, error: OSError) -> DataError:
    fix = "chmod +rx it or its folder, or leave it out" if isinstance(error, PermissionError) else "check the path"
    return DataError(f"cannot be opened ({error.strerror})", file=path, fix=fix)


def _walk(root: Path) -> Iterator[Found]:
    """Everything below a folder but what is hidden. Folders behind links are not entered: they may lead back."""
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                inside = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            if folder == root:
                raise _denied(folder, error) from error
            yield Found(folder, f"{LOCKED_FOLDER} ({error.strerror})", unreadable=True)
            continue
        for entry in inside:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
            else:
                yield _judged(Path(entry.path))


def _judged(path: Path) -> Found:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink() and not isinstance(error, PermissionError):
            return Found(path, "a link that leads nowhere")
        return Found(path, f"cannot be opened ({error.strerror})", unreadable=True)
    if stat.S_ISDIR(mode):
        return Found(path, "a link to a folder: name that folder too if it is wanted")
    return Found(path) if stat.S_ISREG(mode) else Found(path, "a pipe, a socket or a device")


def _matching(pattern: str) -> list[Found]:
    """What a glob matches, folders aside; folders that `**` could not enter are there too."""
    start = Path(pattern[: min(map(len, (pattern.split(c)[0] for c in "*?[")))] + "x").parent
    matches = (Path(p) for p in glob.glob(pattern, recursive=True))
    found = [f for f in map(_judged, matches) if not f.path.is_dir() and not _leads_back(f.path)]
    if "**" in pattern and start.is_dir():
        found += [f for f in _walk(start) if f.problem and f.problem.startswith(LOCKED_FOLDER)]
    return sorted(found, key=lambda f: f.path)


def _leads_back(path: Path) -> bool:
    """Whether a link on the way leads to a folder that the way has come through already."""
    for link in (p for p in path.parents if p.is_symlink()):
        there, here = os.path.realpath(link), os.path.realpath(link.parent)
        if os.path.commonpath((there, here)) == there:
            return True
    return False
