"""`tutelage runs --remove`: removes runs, except those that others were made from."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import typer

from tutelage import log
from tutelage.cli.show import size
from tutelage.errors import ArtifactError, ConfigError, StorageError
from tutelage.files import storage_errors
from tutelage.rundir import all_runs, held

Row = tuple[Path, dict[str, Any]]


def remove(root: Path, chosen: Sequence[Row], *, needed_too: bool, yes: bool) -> None:
    """Removes run directories, after a question on a terminal. Raises `ArtifactError` where another run was made from one of them
    (unless `needed_too`), `StorageError` where one is being made, and `ConfigError` where there is no terminal to ask on."""
    if not chosen:
        log.say("no run matches: nothing to remove")
        return
    for path, _ in chosen:
        if held(path):
            raise StorageError("this run is being made", file=path, fix="wait for it, or stop it")
    if not needed_too:
        _refuse_needed(root, [path for path, _ in chosen])
    bytes_of = {path: _bytes(path) for path, _ in chosen}
    for path, row in chosen:
        log.say(f"{path}  {row['stage']}, {row['status']}, {size(bytes_of[path])}")
    if not yes and not _agreed(f"Remove {len(chosen)} runs, {size(sum(bytes_of.values()))}?"):
        log.say("nothing is removed")
        return
    for path, _ in chosen:
        _remove(path)
    log.say(f"removed {len(chosen)} runs, {size(sum(bytes_of.values()))}")


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("nobody is here to be asked", field="remove", fix="--yes removes without a question")
    return typer.confirm(question, err=True)


def _refuse_needed(root: Path, chosen: Collection[Path]) -> None:
    """Failed runs need nothing any more; all others may be inspected or resumed."""
    going = {path.resolve(): path for path in chosen}
    for path, row in all_runs(root):
        if path.resolve() in going or row["status"] == "failed":
            continue
        for parent in row["parents"]:
            needed = going.get((path / parent["path"]).resolve())
            if needed is not None:
                raise ArtifactError(
                    f"{path} was made from this run", file=needed,
                    fix="choose it, too, or give --force to remove what others were made from",
                )  # fmt: skip


def _bytes(path: Path) -> int:
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def _remove(path: Path) -> None:
    """`DONE` first: a removal that is cut short leaves no run that counts as finished."""
    with storage_errors(path):
        (path / "DONE").unlink(missing_ok=True)
        shutil.rmtree(path)
        with contextlib.suppress(OSError):  # other runs are in it
            path.parent.rmdir()
