"""What `--force` replaces is set aside in the run directory, until the new result is whole."""

from __future__ import annotations

import shutil
from pathlib import Path

OLD = ".before"  # the finished result that a forced attempt is to replace
MOVING = ".before.moving"  # the same while it is moved there: a killed process leaves it, and it is moved back
STAY = (".lock", "logs", OLD, MOVING)


def clear(run: Path) -> None:
    """Removes everything but the logs and what was set aside; `DONE` first, so that no moment has a finished run without its
    result."""
    (run / "DONE").unlink(missing_ok=True)
    for item in run.iterdir():
        if item.name not in STAY:
            shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()


def set_aside(run: Path) -> None:
    """Moves a finished result aside, `DONE` first."""
    shutil.rmtree(run / OLD, ignore_errors=True)  # of an attempt that was killed after it had finished
    (run / MOVING).mkdir()
    for name in ["DONE", *sorted(p.name for p in run.iterdir() if p.name not in ("DONE", *STAY))]:
        (run / name).replace(run / MOVING / name)
    (run / MOVING).replace(run / OLD)


def put_back(run: Path, folder: str = OLD) -> bool:
    """Moves what was set aside back, `DONE` last, in place of what bears its names now. False where nothing is set aside."""
    aside = run / folder
    if not aside.is_dir():
        return False
    for name in [*sorted(p.name for p in aside.iterdir() if p.name != "DONE"), "DONE"]:
        place = run / name
        if (aside / name).exists():
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            (aside / name).replace(place)
    shutil.rmtree(aside)
    return True


def drop(run: Path) -> None:
    """Removes what was set aside: the new result is whole."""
    shutil.rmtree(run / OLD, ignore_errors=True)
