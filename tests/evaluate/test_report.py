"""The report page: self-contained, honest about what is missing, and safe with whatever a run holds."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tutelage.errors import ArtifactError
from tutelage.evaluate.report import duration, scientific, size, write_report
from tutelage.evaluate.report_charts import smoothed
from tutelage.evaluate.report_data import read_story
from tutelage.files import read_json, write_json

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def estimate(value: float, low: float, high: float, n: int = 40) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": n, "unit": "share"}


def make_run(root: Path, name: str, stage: str, parents: list[tuple[str, str, str]] = (), **facts: Any) -> Path:  # type: ignore[assignment]
    path = root / name
    rows = [{"name": n, "kind": k, "path": f"../{p}", "digest": "ab12" * 16} for n, k, p in parents]
    row = {"stage": stage, "name": name.rsplit("-", 1)[0], "status": "done", "seconds": 75, "parents": rows}
    about = {"started": "2026-11-20T10:00:00+0000", "machine": {"cores": 2}, "versions": {"torch": "2.13"}}
    write_json(path / "run.json", {**row, **about, **facts})
    (path / "config.yaml").write_text(f"note: '{EVIL}'\n", encoding="utf-8")
    return path


def curves(path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "step": s,
            "tokens": s * 1000,
            "loss": 3 + 5 / (s + 1),
            "lr": 0.006 * (1 - s / 200),
            "lr_factor": 1 - s / 200,
            "tokens_per_second": 7000 + s,
            "mfu": 0.5,
            "grad_norm": 1.0,
        }
        for s in range(1, 120)
    ]
    rows.append({"step": 119, "validation_loss": 3.2, "bits_per_byte": 1.5})
    rows.append({"step": 120, "tokens": 120_000, "loss": math.nan})
    text = "".join(json.dumps(r) + "\n" for r in rows) + '{"step": 121, "tok'
    (path / "metrics.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """data -> tokenizer -> base -> assistant, and an evaluation beside them; every text in them is hostile."""
    root = tmp_path / "runs" / "demo"
    docs = make_run(root, "docs-aaaa", "data", artifact={"kind": "records", "digest": "cd34" * 16})
    (docs / "records").mkdir()
    part = {"records": 3, "bytes": 2048, "length_quantiles": {"p50": 90}}
    card = {"parts": {"train": part}, "rejected": {f"too_short {EVIL}": 7},
            "sources": [{"source": EVIL, "records": 3}], "sources_total": 1, "licences": {"CC0-1.0": 3}}  # fmt: skip
    write_json(docs / "records" / "card.json", card)
    (docs / "records" / "train.jsonl").write_text(
        "".join(json.dumps({"text": "x" * n}) + "\n" for n in (10, 90, 800)), encoding="utf-8"
    )
    words = make_run(
        root,
        "words-bbbb",
        "tokenizer",
        [("data", "records", "docs-aaaa")],
        artifact={"kind": "tokenizer", "digest": "1"},
        vocab_size=4096,
    )
    write_json(words / "compression.json", {"bytes_per_token": 3.21})
    watts = {"kwh": 0.002, "watts": 96.0, "origin": "estimated", "because": "TDP of the CPU", "pue": 1.0}
    facts = {"parameters": 4_200_000, "tokens": 120_000, "flops": 3.0e12, "plan": {"seconds": 60}, "energy": watts}
    parents = [("data", "records", "docs-aaaa"), ("tokenizer", "tokenizer", "words-bbbb")]
    base = make_run(root, "base-cccc", "pretrain", parents, artifact={"kind": "model", "digest": "2"}, **facts)
    curves(base)
    for step in (10, 119):
        write_json(base / "samples" / f"step_{step:06d}.json", [{"prompt": "Return", "text": f"{EVIL} {step}"}])
    change = {"documents": 9, "before": estimate(2.5, 2, 3), "after": estimate(2.0, 1, 3), "share": estimate(-0.2, -0.25, -0.15),
              "bytes_per_token": [2.5, 3.125]}  # fmt: skip
    run = make_run(
        root, "assistant-dddd", "sft", [("model", "model", "base-cccc")], artifact={"kind": "model", "digest": "3"},
        change={EVIL: change},
    )  # fmt: skip
    scored = make_run(root, "scores-eeee", "evaluate", [("model", "model", "assistant-dddd")])
    rows = [
        {"name": "xz", "label": "xz -9e", "bits_per_byte": estimate(1.6, 1.5, 1.7)},
        {"name": "model", "label": EVIL, "bits_per_byte": estimate(1.4, 1.3, 1.5)},
    ]
    task = {"task": EVIL, "judged_by": "correct", "correct": estimate(0.9, 0.8, 0.95), "recognisable": estimate(0.9, 0.8, 0.95),
            "overlap": estimate(0.9, 0.8, 0.95), "guess": 0.25, "guess_from": "stated chance", "above_guess": True}  # fmt: skip
    verdict = {"text": "12.5% fewer bits than the better yardstick.", "saving": estimate(0.125, 0.1, 0.15)}
    write_json(
        scored / "scores" / "scores.json",
        {"documents": {"count": 40, "bytes": 9000, "rows": rows, "verdict": verdict}, "questions": {"tasks": [task]}},
    )
    answer = {"task": "t", "prompt": EVIL, "expected": "4", "answer": EVIL, "correct": False, "score": 0.1}
    shown = {"kind": "prompt", "prompt": EVIL, "continuation": EVIL, "truth": None, "sampling": {"temperature": 0.8}}
    write_json(scored / "scores" / "gallery.json", {"answers": [answer], "continuations": [shown]})
    return run


class Page(HTMLParser):
    """Collects tags with their attributes, ids, and open tags left over."""

    VOID = frozenset({"meta", "br", "img", "hr", "input", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_everything_is_there_and_nothing_runs(finished: Path, tmp_path: Path) -> None:
    """A model's output or a file name with markup in it must never become markup; a page with a script or a link to a font is not
    self-contained."""
    write_report(finished, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "foreignobject"}
    for _, attributes in page.tags:
        assert not [k for k in attributes if k.startswith("on")]
        assert all((attributes.get(k) or "#").startswith("#") for k in ("href", "src", "xlink:href"))
    assert not re.search(r"url\((?!#)|@import", text)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for section in ("yardsticks", "questions", "says", "curves", "data", "lineage", "cost", "use", "details", "change-1"):
        assert section in ids
    for shown in (
        "12.5% fewer bits",
        "1.400",
        "4.2M",
        "90.0%",
        "3.21",
        "2.0 kB",
        "tutelage chat runs/demo/assistant-dddd/model",
        "96 W",
        "-25.0% to -15.0%",
        "2.5 to 3.12",
    ):
        assert shown in text, shown
    assert text.count("<svg") >= 5
    assert "too short" in text and ">7<" in text


def test_questions_alone_have_a_verdict(finished: Path, tmp_path: Path) -> None:
    """ "Not measured yet" at the head of a page that shows measures."""
    both = read_story(finished).scores
    assert both is not None
    task = both["questions"]["tasks"][0]
    for above, words in ((True, "Clearly better than guessing"), (False, "Not clearly better than guessing")):
        write_json(tmp_path / "scores.json", {"questions": {"tasks": [{**task, "above_guess": above}]}})
        write_report(finished, tmp_path / "r.html", [tmp_path])
        text = (tmp_path / "r.html").read_text(encoding="utf-8")
        assert words in text and "Not measured yet" not in text


def test_one_document_has_no_interval(finished: Path, tmp_path: Path) -> None:
    """ "1.400 to 1.400": an interval of no width where nothing is known of how far others would lie."""
    both = read_story(finished).scores
    assert both is not None
    for row in both["documents"]["rows"]:
        value = row["bits_per_byte"]["value"]
        row["bits_per_byte"] |= {"low": value, "high": value, "method": "one unit: no interval"}
    write_json(tmp_path / "scores.json", both)
    write_report(finished, tmp_path / "r.html", [tmp_path])
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "one unit: no interval" in text and "1.400 to 1.400" not in text


def test_the_gain_by_rewards_is_on_the_page(finished: Path, tmp_path: Path) -> None:
    """A gain that only the terminal showed."""
    row = read_json(finished / "run.json")
    ends = {
        "held_out_before": (0.155, 0.104, 0.206),
        "held_out_after": (0.255, 0.194, 0.316),
        "held_out_gain": (0.1, 0.032, 0.168),
    }
    told = {key: {"value": v, "low": low, "high": high, "n": 200, "method": "t"} for key, (v, low, high) in ends.items()}
    write_json(finished / "run.json", row | told)
    write_report(finished, tmp_path / "r.html")
    write_json(finished / "run.json", row)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert all(shown in text for shown in ("What was gained by rewards", "0.155", "0.255", "+0.100", "+0.032 to +0.168"))


def test_lineage_is_parents_first_and_each_once(finished: Path) -> None:
    """The data run is a parent twice; a chain drawn per path would show it twice, or after its child."""
    assert [n.name for n in read_story(finished).chain] == ["docs", "words", "base", "assistant"]


def test_scores_of_another_model_are_not_shown(finished: Path) -> None:
    """The newest evaluation in the folder may belong to another run."""
    other = make_run(finished.parent, "later-ffff", "evaluate", [("model", "model", "somewhere-else")])
    write_json(other / "scores" / "scores.json", {"documents": {"verdict": {"text": "someone else"}}})
    story = read_story(finished)
    assert story.scores is not None and story.scores["documents"]["verdict"]["text"].startswith("12.5%")


def test_what_is_missing_is_left_out_with_a_reason(tmp_path: Path) -> None:
    """A run killed early has almost nothing; the page must still come, and say why sections are not there."""
    run = make_run(tmp_path / "runs" / "demo", "base-1", "pretrain", [("data", "records", "gone-1")], status="interrupted")
    (run / "metrics.jsonl").write_text("not json\n[1]\n", encoding="utf-8")
    write_report(run, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    Page(text)
    for reason in (
        "no finished evaluation of this run",
        "metrics.jsonl with losses",
        "wrote a data card",
        "gone-1, which is not a run directory",
    ):
        assert reason in text, reason
    assert "interrupted" in text and 'id="curves"' not in text


def test_not_a_run(tmp_path: Path) -> None:
    """An empty page about nothing would hide a wrong path."""
    with pytest.raises(ArtifactError, match=r"run\.json"):
        write_report(tmp_path, tmp_path / "r.html")


def test_without_matplotlib_only_the_curves_are_missing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optional library must not take the whole report with it."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    write_report(finished, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "tutelage[report]" in text and "<svg" not in text and "12.5% fewer bits" in text


def test_smoothing_does_not_lag() -> None:
    """A one-sided average stands above a falling curve everywhere."""
    line = [100.0 - i for i in range(400)]
    assert smoothed(line)[200] == pytest.approx(line[200], abs=0.01)


def test_units() -> None:
    """Numbers for people."""
    assert (duration(3.21), duration(75), duration(7322)) == ("3.2 s", "1 min 15 s", "2 h 02 min")
    assert (size(2_300_000), scientific(1.2e15), scientific(3e-4)) == ("2.3 MB", "1.2 × 10¹⁵", "3.0 × 10⁻⁴")


def test_what_an_evaluation_gained_is_on_the_page(finished: Path, tmp_path: Path) -> None:
    """Gains of preferences that no page showed; and those of a model that the run does not come from."""
    made = [("sums-eeee", "assistant-dddd", 0.155), ("other-ffff", "stranger-9999", 0.777)]
    for name, model, after in made:
        run = make_run(finished.parent, name, "evaluate", [("model", "model", model)])
        row = {"task": "add", "judged_by": "correct", "before": estimate(0.14, 0.1, 0.2), "after": estimate(after, 0.1, 0.2)}
        gains = {"model": f"chat-{EVIL}", "questions": [row | {"gain": estimate(after - 0.14, -0.021, 0.052, 200)}]}
        write_json(run / "scores" / "scores.json", {"gains": gains})
    write_report(finished, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    shown = ("What was gained on held-out questions", "14.0%", "15.5%", "+1.5<", "-2.1 to +5.2")
    assert all(part in text for part in shown) and "77.7%" not in text and EVIL not in text


def test_a_wrong_answer_is_not_marked_right(finished: Path, tmp_path: Path) -> None:
    """`s u u` for `s u l`, two letters of three, under a green mark where only exact answers count."""
    scored = next(p.parent for p in finished.parent.glob("*/scores/scores.json"))
    row = {"task": "t", "prompt": "?", "expected": "s u l", "answer": "s u u", "correct": False, "score": 0.67}
    write_json(scored / "gallery.json", {"answers": [row], "continuations": []})
    task = read_json(scored / "scores.json")["questions"]["tasks"][0]
    for judged_by, mark in (("correct", "✗ wrong"), ("recognisable", "≈ recognisable")):
        write_json(scored / "scores.json", {"questions": {"tasks": [task | {"task": "t", "judged_by": judged_by}]}})
        write_report(finished, tmp_path / "r.html", [scored])
        assert mark in (tmp_path / "r.html").read_text(encoding="utf-8")
