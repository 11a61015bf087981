"""Files appear whole or not at all: write to a temporary name beside the target, sync, rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from tutelage.errors import ArtifactError, ConfigError, StorageError, UserError
from tutelage.unicode import is_whole

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux: paths start at the working folder; swap the two


@contextlib.contextmanager
def storage_errors(path: Path, option: str = "--runs") -> Iterator[None]:
    """Turns the operating system's refusals about `path`, which `option` chose, into a `StorageError` that says what to do."""
    try:
        yield
    except Exception as error:
        fixes = {
            errno.ENOSPC: ("the disk is full", f"free some space, or choose another folder with {option}"),
            errno.EDQUOT: ("the disk quota is used up", f"free some space, or choose another folder with {option}"),
            errno.EROFS: ("the file system is read-only", f"choose a folder you may write to with {option}"),
            errno.EACCES: ("permission denied", f"choose a folder you may write to with {option}, or ask for the rights"),
        }
        number = _errno_of(error)
        if number not in fixes:
            raise
        message, fix = fixes[number]
        named = getattr(error, "filename", None)
        if number == errno.EACCES and named and not Path(os.fsdecode(named)).absolute().is_relative_to(path.absolute().parent):
            raise unreadable(Path(os.fsdecode(named)), PermissionError(number, os.strerror(number))) from error  # an input
        raise StorageError(f"cannot write: {message}", file=named or path, fix=fix) from error


def _errno_of(error: Exception) -> int | None:
    """The operating system's error number; safetensors and numpy have it in the text of their own errors."""
    if isinstance(error, UserError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if re.search(r"requested and \d+ written", text):  # numpy says no more
        return errno.ENOSPC
    named = re.search(r"\(os error (\d+)\)", text)
    return int(named[1]) if named else None


def named_folder(name: str | Path) -> Path:
    """The folder of a setting. Raises `ConfigError` for an empty name, which would be the working folder, and for one that is not
    UTF-8, which runs could not write into their records."""
    if not is_whole(str(name)):
        raise ConfigError("a folder whose name is not UTF-8", field="runs", found=str(name), fix="name another folder")
    if not str(name).strip():
        raise ConfigError("an empty name of a folder", field="runs", found=repr(str(name)), expected="a folder (`.` is this one)")
    return Path(name)


def partial_name(path: Path, process: int) -> Path:
    """The name that a file or folder has while a process writes it."""
    return path.with_name(f".{path.name}.partial-{process}")


def sync_folder(path: Path) -> None:
    """Makes a rename inside `path` survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "w", option: str = "--runs") -> Iterator[IO[Any]]:
    """Opens a temporary file that becomes `path` when the block ends well, and vanishes when it does not."""
    partial = partial_name(path, os.getpid())
    with storage_errors(path, option):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open(mode, encoding=None if "b" in mode else "utf-8") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives an empty temporary folder that becomes `path` (replacing what is there) when the block ends well."""
    partial = partial_name(path, os.getpid())
    with storage_errors(path):
        recover(path)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in sorted(partial.rglob("*")):
                if file.is_file():
                    if not file.is_symlink():  # safetensors makes files that their owner alone may read
                        file.chmod(partial.stat().st_mode & 0o666)  # a folder's mode has the user's umask in it
                    with file.open("rb") as f:
                        os.fsync(f.fileno())
            if not path.exists():
                partial.replace(path)
            elif not _exchange(partial, path):
                path.replace(path.with_name(f".{path.name}.old-{os.getpid()}"))
                partial.replace(path)
            sync_folder(path.parent)
        finally:
            recover(path)
            shutil.rmtree(partial, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps the names of two folders in one step; False where the system or the file system cannot, and then nothing moved."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return int(swap(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), ctypes.c_uint(RENAME_EXCHANGE))) == 0


def recover(path: Path) -> None:
    """Mends what a kill inside `whole_folder(path)` left where names cannot be swapped: the old folder, set aside, gets its
    name back if the new one has not taken it, and is removed if it has."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.old-*"):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.replace(path)


def write_json(path: Path, value: object) -> None:
    with whole_file(path) as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.write("\n")


def read_json(path: Path, fix: str | None = None) -> Any:
    """The value in a JSON file. Raises `ArtifactError` with `fix` for one that can't be read or is no JSON, `FileNotFoundError`
    where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise ArtifactError(f"not valid JSON: not UTF-8 text at byte {error.start}", file=path, fix=fix or COPY_AGAIN) from None
    except ValueError as error:
        raise ArtifactError(f"not valid JSON ({error})", file=path, fix=fix or COPY_AGAIN) from None
    except RecursionError:
        raise ArtifactError("this JSON is nested too deeply to be read", file=path, fix=fix or COPY_AGAIN) from None


def read_object(path: Path, fix: str | None = None, expected: str = "an object: {…}") -> dict[str, Any]:
    """The object in a JSON file. Raises as `read_json`, and `ArtifactError` for another value."""
    value = read_json(path, fix)
    if not isinstance(value, dict):
        raise ArtifactError("not a JSON object", file=path, found=value, expected=expected, fix=fix or COPY_AGAIN)
    return value


COPY_AGAIN = "copy the file again, or make it again with the command that wrote it and --force"


def unreadable(path: Path, error: OSError) -> ArtifactError:
    """What the operating system says about a file that is there."""
    fix = f"chmod +r {path}" if isinstance(error, PermissionError) else "check the disk, or copy the file again"
    return ArtifactError(f"cannot read this file: {(error.strerror or str(error)).lower()}", file=path, fix=fix)


def check_readable(path: Path) -> None:
    """Raises `ArtifactError` where the file can't be opened, for libraries that do not say why."""
    try:
        path.open("rb").close()
    except FileNotFoundError:
        raise ArtifactError("this file is missing", file=path, fix="copy the whole folder again") from None
    except OSError as error:
        raise unreadable(path, error) from None


def file_digest(path: Path) -> str:
    """64 hex digits: SHA-256 of the content."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def files_below(folder: Path) -> dict[str, Path]:
    """Every file below `folder` that is not hidden, by its relative name, in the order of their paths."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {file.relative_to(folder).as_posix(): file for file in found}


def folder_digest(path: Path) -> str:
    """SHA-256 over the relative names and contents of every file below `path`, in name order."""
    return joint_digest({name: readable_digest(file) for name, file in files_below(path).items()})


def readable_digest(file: Path) -> str:
    """`file_digest` of a file that belongs to an artifact. Raises `ArtifactError` where it can't be read."""
    try:
        return file_digest(file)
    except OSError as error:
        raise unreadable(file, error) from None


def joint_digest(digests: Mapping[str, str]) -> str:
    """The digest of a folder from those of its files."""
    total = hashlib.sha256()
    for name, digest in digests.items():
        total.update(f"{name}\0{digest}\n".encode())
    return total.hexdigest()
