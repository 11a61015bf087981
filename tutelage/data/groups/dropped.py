"""Texts that can't be read at the length that was asked for: an error that says how many there were, why, and what would help."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage import log
from tutelage.errors import DataError

TOO_LONG, UNTRAINED = "left out, too long", "left out, without a supervised token"
ALIKE, UNSCORED = "left out, the same tokens on both sides", "left out, without a score"
FIXES = {
    ALIKE: "give answers that differ within max_length, and in more than white space",
    UNTRAINED: "give answers that are trained",
    UNSCORED: "give ratings of what is learned",
}


NOTABLE = 0.05  # share from which on what is not learnt is said in colour


def say_left_out(report: Mapping[str, float], *, fix: str, part: str = "") -> None:
    """A line for each reason in `report` that something was left out or cut for; in colour, with what to do about it, from a
    notable share on. The report begins with what there was in all, as of `PreferencePairs.report`."""
    (unit, total), *reasons = report.items()
    begin = f"{part}: " if part else ""
    for what, count in reasons:
        if not count:
            continue
        share = count / max(total, 1)
        line = f"{begin}{what}: {count:,.0f} of {total:,.0f} {unit} ({percent(share)})"
        loses = "left out" in what or "cut" in what
        if loses and share >= NOTABLE:
            helps = next((f for reason, f in FIXES.items() if reason == what), fix)
            log.say(f"warning: {line}; {helps}", style="yellow")
        else:
            log.say(f"  {line}")


def percent(share: float) -> str:
    """Without decimals, and never 100% or 0% of what is not all or nothing."""
    if 0 < share < 0.005:
        return "under 1%"
    if 0.995 <= share < 1:
        return "over 99%"
    return f"{share:.0%}"


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
