"""What training leaves out is said in colour where it is much."""

from __future__ import annotations

import pytest

from tutelage.data.groups.dropped import TOO_LONG, UNTRAINED, percent, say_left_out


def test_much_is_a_warning_with_share_and_fix(capsys: pytest.CaptureFixture[str]) -> None:
    """238 of 251 rows were dropped with a grey line in a tree."""
    say_left_out({"segments": 251, TOO_LONG: 238, UNTRAINED: 1}, fix="raise max_length (256)", part="train")
    said = capsys.readouterr().err
    assert "warning: train: left out, too long: 238 of 251 segments (95%); raise max_length (256)" in said
    assert "without a supervised token: 1 of 251 segments (under 1%)" in said and said.count("warning") == 1
    assert percent(0.999) == "over 99%" and percent(1.0) == "100%"
