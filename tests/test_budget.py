"""The size of each room of the package against its row in budget.yaml: growth is a decision that somebody takes, not drift."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import yaml

PACKAGE = Path(__file__).parent.parent / "tutelage"
BUDGET = yaml.safe_load(Path(__file__).with_name("budget.yaml").read_text())
SOURCES = {".py", ".cpp", ".h"}


def lines_by_room(package: Path) -> Counter[str]:
    """Lines of Python and C++ in each folder of the package; files directly in the package count as `tutelage`."""
    counts: Counter[str] = Counter()
    for file in package.rglob("*"):
        if file.suffix in SOURCES:
            folders = file.relative_to(package).parts[:-1]
            counts[folders[0] if folders else "tutelage"] += len(file.read_bytes().splitlines())
    return counts


def over_budget(counts: Counter[str], rooms: dict[str, int]) -> list[str]:
    """A sentence for each room that exceeds its row or has none."""
    return [f"{room}: {n:,} lines, budget {rooms.get(room, 0):,}" for room, n in sorted(counts.items()) if n > rooms.get(room, 0)]


def test_no_room_exceeds_its_budget() -> None:
    """A package that grows by a few hundred lines a week until nobody can read it."""
    counts = lines_by_room(PACKAGE)
    print(*(f"{n:7,} of {BUDGET['rooms'].get(room, 0):7,}  {room}" for room, n in sorted(counts.items())), sep="\n")
    print(f"{counts.total():7,} of {BUDGET['total']:7,}  in all")
    wrong = over_budget(counts, BUDGET["rooms"])
    assert not wrong, "; ".join(wrong) + ". Make it shorter, or raise the row in tests/budget.yaml and say why in the commit"


def test_the_rows_stay_under_the_total() -> None:
    """Rows that are raised one by one past what the whole may be."""
    assert sum(BUDGET["rooms"].values()) <= BUDGET["total"] <= 66_000


def test_a_room_that_grows_or_is_new_is_named(tmp_path: Path) -> None:
    """A check that counts only Python, or passes over folders without a row."""
    for name in ("old/a.py", "old/kernel.cpp", "new/deep/b.py", "c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x\ny\n")
    counts = lines_by_room(tmp_path)
    assert counts == {"old": 4, "new": 2, "tutelage": 2}
    assert over_budget(counts, {"old": 3, "tutelage": 2}) == ["new: 2 lines, budget 0", "old: 4 lines, budget 3"]
