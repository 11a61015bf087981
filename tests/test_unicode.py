"""Half characters and terminal codes: no artifact holds the one, no error writes the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tutelage.config.base import build, load_yaml
from tutelage.config.stages import Data
from tutelage.data.clean.collect import collect
from tutelage.errors import ConfigError, DataError
from tutelage.files import named_folder
from tutelage.unicode import half_character, printable

HALF = "\ud83d"
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": "\\ud83d"}'}}
ASKED = {"role": "user", "content": "Who?"}
ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("documents", {"text": f"A note that was cut in a face: {HALF} and went on."}, "text"),
    ("documents", {"text": "A whole note, with many words.", "licence": HALF}, "licence"),
    ("conversations", {"messages": [ASKED, {"role": "assistant", "content": HALF}]}, "messages[1].content"),
    ("conversations", {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}]}, "messages[1].tool"),
    ("conversations", {"question": "Who?", "answer": "I.", "meta": {"a": [HALF]}}, "meta.a[0]"),
    ("prompts", {"prompt": HALF, "answer": "1"}, "prompt"),
    ("prompts", {"prompt": "Who?", "answer": "1", "more": {HALF: 1}}, "more (a key)"),
    ("preferences", {"question": "Who?", "chosen": "I.", "rejected": HALF}, "rejected"),
    ("ratings", {"prompt": "Who?", "completion": HALF, "label": True}, "completion"),
    ("examples", {"text": "A text.", "label": HALF}, "label"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "field"), ROWS)
def test_half_a_character_is_refused_by_line_and_field(tmp_path: Path, kind: str, row: dict[str, Any], field: str) -> None:
    """An artifact that is not UTF-8: a traceback in the tokenizer, and an advice to --force, which gave the same again."""
    good = json.loads(json.dumps(row).replace("\\\\ud83d", "x").replace("\\ud83d", "x"))
    lines = [json.dumps(json.loads(json.dumps(good).replace("Who?", f"Who {i}?"))) for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, json.dumps(row), ""]))
    out = tmp_path / "out"
    out.mkdir()
    settings: dict[str, Any] = {"kind": kind, "validation_share": 0, "dedup": "none", "min_chars": 1}
    with pytest.raises(DataError, match="half a character") as caught:
        collect([str(tmp_path / "a.jsonl")], out, **settings)
    assert caught.value.line == 4 and str(caught.value.field).startswith(field) and "on_error" in str(caught.value.fix)
    card = collect([str(tmp_path / "a.jsonl")], out, **settings, on_error="skip", max_reject_share=0.5)
    assert card["records"] == 3 and card["rejected"] == {"unreadable: half a character (a lone surrogate)": 1}
    (out / "train.jsonl").read_text(encoding="utf-8")


def test_a_field_that_no_record_holds_may_be_anything(tmp_path: Path) -> None:
    """A row that is lost for a column that is not read."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "A whole note.", "url": HALF}))
    assert collect([str(tmp_path / "a.jsonl")], tmp_path, validation_share=0, min_chars=1)["records"] == 1


def test_settings_are_valid_unicode() -> None:
    """A recipe's escapes, or a file's name on the command line, ended in a traceback where the run wrote its settings."""
    with pytest.raises(ConfigError, match="half a character") as caught:
        build(Data, {"sources": ["texts"], "text_field": HALF})
    assert caught.value.field == "text_field"
    with pytest.raises(ConfigError, match="half a character"):
        build(Data, {"sources": ["caf\udce9.txt"]})
    with pytest.raises(ConfigError, match="not UTF-8"):
        named_folder("caf\udce9")


def test_recipes_are_valid_unicode(tmp_path: Path) -> None:
    """A name with half a character was a traceback where its folder was made."""
    (tmp_path / "a.yaml").write_text('name: a\nstages:\n  corpus:\n    sources: ["a", "b\\ud83d"]\n')
    with pytest.raises(ConfigError, match=r"a\.yaml:4: half a character") as caught:
        load_yaml(tmp_path / "a.yaml")
    assert caught.value.field == "stages.corpus.sources[1]"


def test_an_empty_folder_of_runs_is_not_the_working_folder() -> None:
    """`--runs "$UNSET"` wrote into the folder that the user stood in."""
    with pytest.raises(ConfigError, match="an empty name"):
        named_folder("")
    assert named_folder(".") == Path(".")


def test_errors_write_nothing_that_a_terminal_obeys() -> None:
    """A file's name that clears the screen, or a value that forges a second error."""
    error = DataError("wrong\x1b[2J", file="a\x1b[31m\nerror: b", found="x\r\x9b\u202e", field="f\ud800", fix="one\ntwo")
    assert (
        str(error)
        == "a\\x1b[31m\\nerror: b: wrong\\x1b[2J\n  field:    f\\ud800\n  found:    x\\r\\x9b\\u202e\n  fix:      one\ntwo"
    )
    assert printable("Zürich 東京 👋🏽") == "Zürich 東京 👋🏽" and half_character(["a", {"b": ("👋", 1)}]) is None
