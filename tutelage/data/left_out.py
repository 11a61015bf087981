"""Texts that can't be read at the length that was asked for: an error that says how many there were, why, and what would help."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.errors import DataError

TOO_LONG, UNTRAINED = "left out, too long", "left out, without a supervised token"
ALIKE, UNSCORED = "left out, the same tokens on both sides", "left out, without a score"
FIXES = {
    ALIKE: "give answers that differ within max_length, and in more than white space",
    UNTRAINED: "give answers that are trained",
    UNSCORED: "give ratings of what is learned",
}


def cut(too_long: str, count: Any) -> dict[str, int]:
    """The report's line about texts that were cut, where texts are."""
    return {} if too_long == "drop" else {f"cut at the {too_long}": int(count)}


class NothingLeft(DataError):
    """No text of a part can be read. A training part needs some; a run does without the validation part."""


def nothing_left(
    message: str, report: Mapping[str, int], file: Path, max_length: int, too_long: str, lengths: Any
) -> NothingLeft:  # fmt: skip
    """`report`: how many there were, then how many of them were left out or cut, by reason. `lengths` [n]: tokens that each would
    need to be read."""
    (total, count), *reasons = report.items()
    counted = {why: n for why, n in reasons if n}
    fixes = [fix for why, fix in FIXES.items() if why in counted]
    if TOO_LONG in counted:
        left = "" if too_long != "drop" else ", set too_long=left"
        fixes = [f"raise max_length ({max_length}){left}, or give shorter texts", *fixes]
    return NothingLeft(
        message, file=file, found=", ".join([f"{count:,} {total}", *(f"{n:,} {why}" for why, n in counted.items())]),
        expected=f"at most {max_length} tokens; the shortest has {min(lengths)}" if TOO_LONG in counted else None,
        fix="; ".join(fixes) or "give more of them",
    )  # fmt: skip
