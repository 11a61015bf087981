"""Stage `data`: settings that change nothing for a kind of record are refused, and a source's own split is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tutelage import api
from tutelage.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "settings", "field"),
    [
        ("conversations", {"min_chars": 1}, "min_chars"),
        ("preferences", {"chunk_chars": 100}, "chunk_chars"),
        ("prompts", {"split": "lines"}, "split"),
        ("examples", {"format": "alpaca"}, "format"),
        ("documents", {"fields": {"text": "body"}}, "fields"),
    ],
)
def test_a_setting_of_another_kind_is_refused(kind: str, settings: dict[str, Any], field: str, tmp_path: Path) -> None:
    """`min_chars=200` for dialogues was taken, written into the data card, and did nothing."""
    (tmp_path / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"changes nothing here, with kind={kind}(.|\n)*field: +{field}"):
        api.data(kind=kind, sources=[tmp_path / "rows.jsonl"], runs=tmp_path, **settings)


def test_a_split_of_its_own_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A validation_share that a generated source does not heed, without a word."""
    api.data(kind="prompts", sources=["skill:reverse?count=40&held_out=8"], dedup="exact", validation_share=0.5, runs=tmp_path)
    assert "records come with a split of their own" in " ".join(capsys.readouterr().err.split())
    rows = [{"prompt": f"Name the number after {i}.", "completion": str(i + 1)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    api.data(kind="conversations", sources=[tmp_path / "rows.jsonl"], dedup="exact", validation_share=0.5, runs=tmp_path)
    assert "split of their own" not in capsys.readouterr().err
