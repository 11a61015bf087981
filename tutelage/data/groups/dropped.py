"""Reports of dropped and cut texts, and the error for data of which nothing is left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage import log
from tutelage.errors import DataError, Setting

TOO_LONG, UNTRAINED = "left out, too long", "left out, without a supervised token"
ALIKE, UNSCORED = "left out, the same tokens on both sides", "left out, without a score"
FIXES = {
    ALIKE: "give answers that differ within max_length, and in more than white space",
    UNTRAINED: "mark answers to train on",
    UNSCORED: "rate the aspects that are trained",
}


NOTABLE = 0.05  # from this share on, dropped or cut texts are a coloured warning


def say_left_out(report: Mapping[str, float], *, fix: str, part: str = "") -> None:
    """Logs one line for each reason in `report`: a coloured warning with a fix if the share is notable. The first entry of the
    report is the total, as in `PreferencePairs.report`."""
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
    """A percentage without decimals that is 0% or 100% only for none or all."""
    if 0 < share < 0.005:
        return "under 1%"
    if 0.995 <= share < 1:
        return "over 99%"
    return f"{share:.0%}"


def cut(too_long: str, count: Any) -> dict[str, int]:
    """The report's entry for cut texts; empty if texts are dropped instead."""
    return {} if too_long == "drop" else {f"cut at the {too_long}": int(count)}


class NothingLeft(DataError):
    """No text of a split is left. Training data must have some; the validation split may be empty."""


def nothing_left(
    message: str, report: Mapping[str, int], file: Path, max_length: int, too_long: str, lengths: Any
) -> NothingLeft:  # fmt: skip
    """`report`: the total, then how many were dropped or cut, by reason. `lengths` [n]: tokens that each text needs."""
    (total, count), *reasons = report.items()
    counted = {why: n for why, n in reasons if n}
    fixes = [fix for why, fix in FIXES.items() if why in counted]
    if TOO_LONG in counted:
        left = "" if too_long != "drop" else f", set {Setting('too_long', 'left')}"
        fixes = [f"raise max_length ({max_length}){left}, or give shorter texts", *fixes]
    return NothingLeft(
        message, file=file, found=", ".join([f"{count:,} {total}", *(f"{n:,} {why}" for why, n in counted.items())]),
        expected=f"at most {max_length} tokens; the shortest has {min(lengths)}" if TOO_LONG in counted else None,
        fix="; ".join(fixes) or "give more of them",
    )  # fmt: skip
