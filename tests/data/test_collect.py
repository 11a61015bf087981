"""collect: from sources to a records artifact, with nothing lost silently and nothing on both sides of the split."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tutelage.data.clean import card
from tutelage.data.clean.collect import collect
from tutelage.data.clean.split import position, side
from tutelage.errors import ConfigError, DataError
from tutelage.files import folder_digest
from tutelage.records import Conversation, Document, read_records

Collected = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture
def gather(tmp_path: Path) -> Collected:
    def run(*sources: Path | str, **settings: Any) -> tuple[Path, dict[str, Any]]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        return out, collect([str(s) for s in sources], out, **settings)

    return run


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def prose(seed: int, count: int, words: int = 60) -> list[str]:
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(3000)]
    return [" ".join(rng.choices(vocabulary, k=words)) + "." for _ in range(count)]


def both(out: Path) -> tuple[list[Document], list[Document]]:
    return tuple(list(read_records(out / f"{name}.jsonl", Document)) for name in ("train", "validation"))  # type: ignore[return-value]


def test_the_artifact_is_complete_and_counts_add_up(gather: Collected, tmp_path: Path) -> None:
    """Every row offered must be written or rejected with a reason: a sum that does not hold is silent loss."""
    texts = prose(0, 300)
    source = write(tmp_path / "a.jsonl", [*texts, texts[0], "short", "", "%^&*()" * 20, "a b c d e " * 100])
    out, facts = gather(source)
    assert sorted(p.name for p in out.iterdir()) == [
        "card.json",
        "rejected.jsonl",
        "schema.json",
        "train.jsonl",
        "validation.jsonl",
    ]
    train, validation = both(out)
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert len(train) + len(validation) + len(rejected) == facts["offered"] == 305
    assert facts["rejected"] == {"duplicate": 1, "too_short": 1, "empty": 1, "symbols": 1, "repeated_words": 1}
    assert {(r["reason"], r["line"]) for r in rejected} >= {("duplicate", 301), ("too_short", 302), ("empty", 303)}
    assert json.loads((out / "schema.json").read_text()) == {"type": "Document", "version": 1}
    assert json.loads((out / "card.json").read_text()) == facts
    assert facts["parts"]["train"]["bytes"] == sum(len(d.text.encode()) for d in train)
    assert {d.text for d in train} | {d.text for d in validation} == set(texts)
    assert all(d == Document.make(d.text, source=d.source) for d in train), "ids must come from the cleaned text"


def test_the_same_input_gives_the_same_bytes_in_another_process(gather: Collected, tmp_path: Path) -> None:
    """An order or a hash that depends on the process makes runs irreproducible and caches useless."""
    source = write(tmp_path / "a.jsonl", prose(1, 200))
    out, _ = gather(source)
    other = tmp_path / "other"
    other.mkdir()
    program = (
        "from pathlib import Path; from tutelage.data.clean.collect import collect; "
        f"collect([{str(source)!r}], Path({str(other)!r}))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert folder_digest(out) == folder_digest(other)


def test_collecting_imports_no_torch() -> None:
    """Importing torch costs two seconds before the first file is read."""
    program = (
        "import sys, tutelage.data.clean.collect, tutelage.data.demo.questions, tutelage.data.demo.skills; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_split_stays_when_data_are_added(gather: Collected, tmp_path: Path) -> None:
    """A split by position moves held-out documents into training as soon as a file is added."""
    few, many = write(tmp_path / "few.jsonl", prose(2, 200)), write(tmp_path / "many.jsonl", [*prose(3, 200), *prose(2, 200)])
    (before, held), (_, held_later) = both(gather(few)[0]), both(gather(many)[0])
    assert {d.id for d in held} <= {d.id for d in held_later} and not {d.id for d in before} & {d.id for d in held_later}
    assert 0.03 < sum(position(str(i)) < 0.05 for i in range(5000)) / 5000 < 0.07
    assert {d.id for d in both(gather(few, seed=1)[0])[1]} != {d.id for d in held}


def test_families_stay_on_one_side() -> None:
    """Two questions about one thing on both sides of the split measure memory."""
    sides = {side(f"{i:016x}", {"family": "os.path.join"}, 0.5) for i in range(50)}
    assert len(sides) == 1 and side("0", {"split": "validation"}, 0.05) == "validation"


def test_held_out_text_does_not_stand_in_training_text(gather: Collected, tmp_path: Path) -> None:
    """Documentation repeats itself: a held-out page that is part of a training page makes bits per byte a lie."""
    texts = prose(4, 300, words=120)
    held = [t for t in texts if side(Document.make(t, source="").id, {}, 0.05) == "validation"]
    wrapped = [
        t
        for i in range(20)
        if side(Document.make(t := f"{prose(5, 1, 300)[0]} {i} {held[0]}", source="").id, {}, 0.05) == "train"
    ]
    near = held[1].replace(held[1].split()[60], "changed", 1)
    source = write(tmp_path / "a.jsonl", [*texts, *wrapped[:1], near])
    out, facts = gather(source)
    train, validation = both(out)
    assert held[0] not in {d.text for d in validation} and wrapped[0] in {d.text for d in train}
    assert facts["rejected"] == {"near_duplicate": 1, "found_in_train": 1}
    assert len(both(gather(source, dedup="exact")[0])[1]) >= len(validation) + 1


def test_boilerplate_lines_go_and_are_counted(gather: Collected, tmp_path: Path) -> None:
    """A banner on each page is the first thing a model learns; pages that are nothing else must go too."""
    banner = "Copyright Example Corporation, all rights reserved."
    source = write(
        tmp_path / "a.jsonl", [*(f"{banner}\n{t}" for t in prose(6, 100)), f"{banner}\nonly", f"{banner}\nthat is all"]
    )
    out, facts = gather(source, boilerplate="drop")
    train, validation = both(out)
    assert facts["boilerplate_lines_removed"] == 102 and facts["rejected"] == {"too_short": 2}
    assert not any(banner in d.text for d in [*train, *validation])
    assert all(d == Document.make(d.text, source=d.source) for d in train), "the id must follow the changed text"
    assert not list(out.glob(".spool*"))


def test_small_collections_still_hold_something_out(gather: Collected, tmp_path: Path) -> None:
    """Twelve documents at 5% hash to no held-out one more often than not: evaluation would divide by zero."""
    for seed in range(6):
        _, validation = both(gather(write(tmp_path / "a.jsonl", prose(7, 12)), seed=seed)[0])
        assert validation
    (tmp_path / "one.txt").write_text(prose(8, 1, 3000)[0])
    with pytest.raises(DataError, match=r"nothing is left for the validation part(?s:.*)chunk_chars"):
        gather(tmp_path / "one.txt")
    assert len(both(gather(tmp_path / "one.txt", validation_share=0)[0])[0]) == 1
    train, validation = both(gather(tmp_path / "one.txt", chunk_chars=1000)[0])
    assert len(train) > 10 and validation and all(d.source.startswith(str(tmp_path / "one.txt")) for d in train)


def test_empty_input_is_an_error_with_counts(gather: Collected, tmp_path: Path) -> None:
    """An empty corpus found only when the model is trained costs an hour."""
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"gave nothing to learn from(?s:.*)empty file"):
        gather(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"nothing is left after filtering(?s:.*)2 too_short"):
        gather(write(tmp_path / "b.jsonl", ["a", "b"]))
    with pytest.raises(ConfigError, match="sources"):
        gather()
    with pytest.raises(ConfigError, match="validation_share"):
        gather(write(tmp_path / "c.jsonl", prose(9, 5)), validation_share=1.5)


def test_explicit_validation_sources(gather: Collected, shared_data: Path) -> None:
    """A benchmark's own test file must be the held-out part, all of it but what was trained on, and nothing else."""
    gsm8k = shared_data / "gsm8k"
    out, facts = gather(gsm8k / "train.jsonl", validation_sources=[gsm8k / "test.jsonl"], text_field="question", dedup="exact")
    train, validation = both(out)
    assert len(train) > 7400 and len(validation) > 1300
    assert all("test.jsonl" in d.source for d in validation) and not any("test.jsonl" in d.source for d in train)
    assert facts["offered"] == 7473 + 1319


def test_conversations_of_several_formats(gather: Collected, tmp_path: Path, shared_data: Path) -> None:
    """Each format's rows must arrive as conversations with their place; mapped fields must reach the format reader."""
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out, facts = gather(tmp_path / "a.jsonl", shared_data / "instructions" / "alpaca_en_demo.json", kind="conversations")
    found = list(read_records(out / "train.jsonl", Conversation))
    assert facts["records"] > 1000 and {m.role for c in found for m in c.messages} >= {"user", "assistant"}
    assert all("#" in c.source for c in found)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"q": f"What is {i}?", "a": str(i)}) + "\n" for i in range(60)))
    out, _ = gather(tmp_path / "b.jsonl", kind="conversations", fields={"prompt": "q", "completion": "a"})
    assert {c.messages[-1].content for c in read_records(out / "train.jsonl", Conversation)} <= {str(i) for i in range(60)}


def test_a_prompt_is_on_one_side_only(gather: Collected, tmp_path: Path) -> None:
    """The same question with two answers, one held out, is trained on and then asked."""
    rows = [
        {"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": a}]}
        for i in range(200)
        for a in "ab"
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    prompts = []
    for name in ("train", "validation"):
        out, facts = gather(tmp_path / "a.jsonl", kind="conversations")
        prompts.append({c.messages[0].content for c in read_records(out / f"{name}.jsonl", Conversation)})
    assert not prompts[0] & prompts[1] and prompts[1] and facts["rejected"] == {}
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:40:2]).replace('a"', 'c"'))
    more = [{"messages": [{"role": "user", "content": "New?"}, {"role": "assistant", "content": "c"}]}]
    (tmp_path / "c.jsonl").write_text(json.dumps(more[0]))
    sources = [tmp_path / "b.jsonl", tmp_path / "c.jsonl"]
    out, facts = gather(tmp_path / "a.jsonl", kind="conversations", validation_sources=sources)
    assert facts["rejected"] == {"prompt_in_train": 20} and facts["parts"]["validation"]["records"] == 1


def test_wrong_roles_stop_or_are_skipped_with_their_place(gather: Collected, tmp_path: Path) -> None:
    """`jinja2.exceptions.TemplateError` an hour later does not say which line of the file is wrong."""
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]} for i in range(60)]
    rows[30]["messages"][0]["role"] = "narrator"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match=r"a\.jsonl:31: "):
        gather(tmp_path / "a.jsonl", kind="conversations")
    out, facts = gather(tmp_path / "a.jsonl", kind="conversations", on_error="skip")
    assert facts["records"] == 59 and json.loads((out / "rejected.jsonl").read_text())["line"] == 31


def test_skills_keep_their_own_split(gather: Collected) -> None:
    """Held-out problems that land in the training part make the skill's score meaningless."""
    out, facts = gather("skill:add,reverse?count=200&held_out=30", kind="conversations")
    held = list(read_records(out / "validation.jsonl", Conversation))
    assert len(held) == 60 and all(c.meta["split"] == "validation" for c in held)
    assert facts["tasks"]["add (train)"] == 200 and facts["tasks"]["reverse (validation)"] == 30


def test_python_docs_end_to_end(gather: Collected) -> None:
    """The embedded recipe's corpus: most of it must survive the filters, and both sides must hold real text."""
    out, facts = gather("python-docs:")
    train, validation = both(out)
    assert facts["bytes"] > 1_500_000 and len(train) > 300 and len(validation) >= 10
    assert facts["licences"] == {"PSF-2.0": len(train) + len(validation)} and facts["ascii_share"] > 0.99
    assert sum(facts["rejected"].values()) < 0.1 * facts["offered"]


def test_the_card_is_shown_with_reasons(gather: Collected, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was left out must be seen by the person who runs it, not only be in a file."""
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "a.jsonl", [*prose(10, 50), "short"])
    (tmp_path / "folder" / "b.xyz").write_text("?")
    _, facts = gather(tmp_path / "folder")
    card.show(facts)
    shown = capsys.readouterr().err
    assert "too_short" in shown and "unknown file type" in shown and ".xyz" in shown and "train" in shown


@pytest.mark.parametrize(
    ("sound", "message"), [(1, "nothing is left for the validation part"), (0, "nothing is left after filtering")]
)
def test_preferences_that_differ_in_white_space_are_told(gather: Collected, tmp_path: Path, sound: int, message: str) -> None:
    """Guards against a generic complaint about a part that is empty, where the reason is in the row."""
    rows = [{"question": f"Why {i}?", "chosen": "Yes.", "rejected": "Yes. \n" if i >= sound else "No."} for i in range(sound + 2)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=message) as caught:
        gather(tmp_path / "pairs.jsonl", kind="preferences")
    place = f"({tmp_path / 'pairs.jsonl'}:{sound + 1})"
    assert f"2 whose answers differ in white space only {place}" in str(caught.value.found)
    assert "let answers differ in more than white space" in str(caught.value.fix) and "chunk_chars" not in str(caught.value.fix)
