"""Texts stay as they are, what is dropped is said, and rows are compared by what differs between them."""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tutelage.data.clean import card
from tutelage.data.clean.collect import collect
from tutelage.data.clean.dedup import found_elsewhere, jaccard, shingles, word_count
from tutelage.data.clean.filters import repetition

Gather = Callable[..., tuple[list[dict[str, Any]], dict[str, Any]]]
RULES = " ".join(f"Rule {i}: members keep item {i} for {i + 2} days and pay {i} euros when it is late." for i in range(1, 11))
ASKED = [
    ("Can I keep the drill longer?", "No."), ("I broke the ladder.", "Please tell the office."),
    ("Are you open on Monday?", "No, from Tuesday on."), ("How do I wire a lamp?", "Please call a professional."),
    ("Where is the yard key?", "Beside the office door."), ("May my son fetch it?", "Yes, with your card."),
]  # fmt: skip
SCRIPTS = {
    "zh": [chr(c) for c in range(0x4E00, 0x4E00 + 600)], "ja": [chr(c) for c in range(0x3042, 0x3093)] + list("図書館道具借"),
    "th": [chr(c) for c in range(0x0E01, 0x0E2F)], "mixed": [*(chr(c) for c in range(0x4E00, 0x4F00)), " tool "],
}  # fmt: skip


@pytest.fixture
def gather(tmp_path: Path) -> Gather:
    def run(rows: list[dict[str, Any]], **settings: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        file = out.with_suffix(".jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        facts = collect([str(file)], out, **{"validation_share": 0.0, **settings})
        lines = [line for part in ("train", "validation") for line in (out / f"{part}.jsonl").read_bytes().split(b"\n") if line]
        return [json.loads(line) for line in lines], facts

    return run


def written(script: str, count: int, length: int = 180) -> list[str]:
    rng = random.Random(script)
    return ["".join(rng.choices(SCRIPTS[script], k=length)) for _ in range(count)]


def chat(*turns: str) -> dict[str, Any]:
    roles = ("system", "user", "assistant") if len(turns) == 3 else ("user", "assistant")
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]}


def test_code_tables_patches_and_prompts_stay_byte_for_byte(gather: Gather) -> None:
    """`else:`, heads of tables and instructions that many documents share were taken out: no module parsed any more."""
    names = [f"n{i}" for i in range(12)]
    code = [f"class {n}:\n    def __init__(self, name: str) -> None:\n        self.{n} = name\n\n\n\n\n{n}('')" for n in names]
    tables = [f"| Parameter | Type | Default |\n| --- | --- | --- |\n| {n} | int | 3 |  \nlast cell\t" for n in names]
    patches = [f"@@ -1,3 +1,3 @@ def {n}():\n \n-e\u0301 one\u0096\n+two\r\n \u200b end" for n in names]
    texts = [*code, *tables, *patches]
    rows, facts = gather([{"text": t} for t in texts], dedup="none", min_chars=1)
    assert {r["text"] for r in rows} == set(texts) and facts["changed"] == {} and facts["boilerplate_lines_removed"] == 0
    assert all(ast.parse(r["text"]) for r in rows if r["text"].startswith("class"))
    assert facts["texts_with_c1_controls"] == 12


@pytest.mark.parametrize("normalise", ["none", "NFC"])
def test_turns_and_labelled_texts_stay_byte_for_byte(gather: Gather, normalise: str) -> None:
    """Hard breaks of Markdown, context lines of patches and empty cells of tables went from answers."""
    answers = [
        "Mill Lane 4  \n8020 Graz",
        "@@ x\n one\n \n-two\n",
        "Ann\tGraz\t\t",
        "e\u0301\ufb01 \u0096\u200b\r\n\n\n\n\n\nend ",
    ]
    rows, _ = gather([chat(f"q{i}  ", a) for i, a in enumerate(answers)], kind="conversations", normalise=normalise)
    assert [r["messages"][1]["content"] for r in rows] == answers and rows[0]["messages"][0]["content"] == "q0  "
    rows, _ = gather([{"text": a, "label": "x"} for a in answers], kind="examples", normalise=normalise)
    assert [r["text"] for r in rows] == answers


def test_cleaning_that_is_asked_for_is_counted_and_shown(gather: Gather, capsys: Any, tmp_path: Path) -> None:
    """A change that only a reader of card.json learns of."""
    text = "A line with a break  \nand a mark \u0085 in it, e\u0301 too, long enough."
    rows, facts = gather([{"text": text}, {"text": "Nothing is to be mended in this line."}], clean=True, normalise="NFC")
    assert rows[0]["text"] == "A line with a break\nand a mark  in it, é too, long enough."
    assert {what: found["texts"] for what, found in facts["changed"].items()} == {"cleaned": 1, "to NFC": 1}
    card.show(facts)
    assert "cleaned: 1 texts changed" in capsys.readouterr().err
    [file] = tmp_path.glob("out*/changed.jsonl")
    assert len(file.read_text().splitlines()) == 2


def test_boilerplate_that_goes_is_shown(gather: Gather, capsys: pytest.CaptureFixture[str]) -> None:
    banner = "Copyright Example Corporation, all rights reserved."
    texts = [f"{banner}\nPage {i}: {t}" for i, t in enumerate(written("zh", 12))]
    _, facts = gather([{"text": t} for t in texts], boilerplate="drop")
    card.show(facts)
    shown = " ".join(capsys.readouterr().err.split())
    assert facts["boilerplate_lines"] == [{"line": banner, "documents": 12}] and "12 shared lines taken out" in shown
    assert banner in shown


def test_rows_that_share_a_passage_are_different_rows(gather: Gather) -> None:
    """Eight dialogues under one system prompt were one: all turns joined were compared."""
    qa = ASKED
    kinds: dict[str, list[list[dict[str, Any]]]] = {
        "conversations": [[chat(RULES, q, a) for q, a in qa], [chat(f"{RULES}\n\n{q}", "No.") for q, _ in qa],
                          [chat(f"{q}\n\n{RULES}", "No.") for q, _ in qa[:2]]],
        "prompts": [[{"prompt": f"{RULES} {q}"} for q, _ in qa], [{"prompt": f"{RULES} {q}", "answer": "no"} for q, _ in qa]],
        "examples": [[{"text": f"{RULES} {q}", "label": "ab"[i % 2]} for i, (q, _) in enumerate(qa)]],
        "preferences": [[{"prompt": f"{RULES} {q}", "chosen": a, "rejected": "Who knows."} for q, a in qa]],
        "ratings": [[{"prompt": f"{RULES} {q}", "completion": a, "label": True} for q, a in qa]],
    }  # fmt: skip
    for kind, sets in kinds.items():
        for rows in sets:
            kept, facts = gather(rows, kind=kind)
            assert len(kept) == len(rows), (kind, facts["rejected"])
    one = "What do the rules say of this, in one sentence, please?"
    kept, _ = gather([chat(f"{RULES} {topic * 30}\n{one}", "A lot.") for topic in ("green ", "blue ")], kind="conversations")
    assert len(kept) == 2, "the same question about two passages"


@pytest.mark.parametrize("script", SCRIPTS)
def test_near_duplicates_are_found_without_spaces(gather: Gather, script: str) -> None:
    """A text without spaces was one shingle: twins stood on both sides of the split."""
    texts = written(script, 20)
    edited = [*texts, *(t[:-5] + "".join(written(script, 1, 5)) for t in texts)]
    kept, facts = gather([{"text": t} for t in edited], validation_share=0.3)
    assert facts["rejected"]["near_duplicate"] == 20 and len(kept) <= 20
    kept, facts = gather([chat(t[:90], t[90:]) for t in edited], kind="conversations")
    assert facts["rejected"] == {"near_duplicate": 20}
    assert found_elsewhere([texts[0][40:140], texts[1]], ["\n".join(texts[:1])]) == [1.0, 0.0]
    assert repetition(texts[0][:25] * 40) == "repeated_words" and repetition("".join(texts)) is None


def test_copies_of_dialogues_are_still_found(gather: Gather) -> None:
    """Rows that share nearly all they say, long answer included, are copies, however many there are."""
    answer = " ".join(f"step {i} is to turn the handle {i} times" for i in range(12))
    kept, facts = gather([chat(f"{RULES} Explain it, version {i}", answer) for i in range(6)], kind="conversations")
    assert len(kept) == 1 and facts["rejected"] == {"near_duplicate": 5}


def test_words_of_a_mixed_text_are_those_of_its_scripts() -> None:
    assert word_count("three plain words") == 3 and word_count("図書館" * 10) == pytest.approx(18)
    assert jaccard(*shingles(["工具使用Python 进行处理的方法", "工具使用python进行\n处理的方法"])) > 0.3


def test_a_notable_loss_is_a_warning_with_samples(gather: Gather, capsys: pytest.CaptureFixture[str]) -> None:
    """What went was a row of a table, without an example of it."""
    texts = [f"{i}: {t}" for i, t in enumerate(written("zh", 10))]
    _, facts = gather([{"text": t} for t in [*texts, "too short a", "too short b"]])
    card.show(facts)
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: 2 of 12 records (17%) left out: too_short" in said and "'too short a'" in said and "min_chars" in said
    assert facts["left_out"]["too_short"]["samples"][1]["text"] == "too short b"
    assert card._rounded_down(0.99996) == 0.9999
