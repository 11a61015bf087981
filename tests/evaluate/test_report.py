"""The report page: self-contained, honest about what is missing, and safe with whatever a run holds."""

from __future__ import annotations

import json
import math
import re
import shutil
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


def scores(digest: str = "3", **sections: Any) -> dict[str, Any]:
    """scores.json of a model with this digest."""
    about = {"name": "assistant-dddd", "digest": digest}
    return {"version": 2, "model": about, "definitions": {"bits_per_byte": "bits / bytes"}, **sections}


def page_of(run: Path, folder: Path, *given: Path) -> str:
    write_report(run, folder / "r.html", given)
    text = (folder / "r.html").read_text(encoding="utf-8")
    Page(text)
    return text


def shown_scores(run: Path) -> dict[str, Any]:
    """The scores of the run's model, as the fixture wrote them."""
    found: dict[str, Any] = read_json(run.parent / "scores-eeee" / "scores" / "scores.json")
    return found


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
        adaptation_effect={EVIL: change},
    )  # fmt: skip
    scored = make_run(root, "scores-eeee", "evaluate", [("model", "model", "assistant-dddd")])
    rows = [
        {"name": "xz", "label": "xz -9e", "bits_per_byte": estimate(1.6, 1.5, 1.7)},
        {"name": "model", "label": EVIL, "bits_per_byte": estimate(1.4, 1.3, 1.5)},
    ]
    task = {"task": EVIL, "scorer": "answer", "correct": estimate(0.9, 0.8, 0.95), "guess": 0.25, "guess_from": "stated chance",
            "above_guess": True, "guess_interval": None}  # fmt: skip
    verdict = {"text": f"{EVIL} needs 12.5% fewer bits than the best baseline.", "saving": estimate(0.125, 0.1, 0.15)}
    documents = {
        "data": "docs-aaaa",
        "count": 40,
        "bytes": 9000,
        "rows": rows,
        "verdict": verdict,
        "perplexity": estimate(23.4, 21, 25.8),
    }
    write_json(scored / "scores" / "scores.json", scores(documents=documents, questions={"data": "asked-1", "tasks": [task]}))
    answer = {"task": "t", "prompt": EVIL, "expected": "4", "answer": EVIL, "correct": False, "scorer": "answer"}
    shown = {"kind": "prompt", "prompt": EVIL, "continuation": EVIL, "truth": None, "sampling": {"temperature": 0.8}}
    write_json(scored / "scores" / "samples.json", {"answers": [answer], "continuations": [shown]})
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
    for section in (
        "baselines",
        "figures",
        "questions",
        "says",
        "curves",
        "data",
        "lineage",
        "cost",
        "use",
        "details",
        "effect-1",
    ):
        assert section in ids
    for shown in (
        "12.5% fewer bits",
        "1.400",
        "23.4 (21.0 to 25.8)",
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
    task = shown_scores(finished)["questions"]["tasks"][0]
    shutil.rmtree(finished.parent / "scores-eeee")
    for above, words in ((True, "is clearly better than guessing"), (False, "is not clearly better than guessing")):
        write_json(tmp_path / "scores.json", scores(questions={"tasks": [{**task, "above_guess": above}]}))
        text = page_of(finished, tmp_path, tmp_path)
        assert f"assistant {words}" in text and "has not been measured" not in text


def test_one_document_has_no_interval(finished: Path, tmp_path: Path) -> None:
    """ "1.400 to 1.400": an interval of no width where nothing is known of how far others would lie."""
    both = shown_scores(finished)
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
    assert all(shown in text for shown in ("The effect of training on rewards", "0.155", "0.255", "+0.100", "+0.032 to +0.168"))


def test_lineage_is_parents_first_and_each_once(finished: Path) -> None:
    """The data run is a parent twice; a chain drawn per path would show it twice, or after its child."""
    assert [n.name for n in read_story(finished).chain] == ["docs", "words", "base", "assistant"]


def test_scores_of_another_model_are_not_shown(finished: Path) -> None:
    """The newest evaluation in the folder may belong to another run."""
    other = make_run(finished.parent, "later-ffff", "evaluate", [("model", "model", "somewhere-else")])
    strange = {"documents": {"data": "docs-aaaa", "verdict": {"text": "someone else"}}}
    write_json(other / "scores" / "scores.json", scores("9", **strange))
    story = read_story(finished)
    assert story.model is not None and not story.others
    assert "12.5%" in story.model.documents["docs-aaaa"]["verdict"]["text"]


def test_what_is_missing_is_left_out_with_a_reason(tmp_path: Path) -> None:
    """A run killed early has almost nothing; the page must still come, and say why sections are not there."""
    run = make_run(tmp_path / "runs" / "demo", "base-1", "pretrain", [("data", "records", "gone-1")], status="interrupted")
    (run / "metrics.jsonl").write_text("not json\n[1]\n", encoding="utf-8")
    write_report(run, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    Page(text)
    for reason in (
        "no finished evaluation of base was found",
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


def test_comparisons_are_on_the_page(finished: Path, tmp_path: Path) -> None:
    """Comparisons that no page showed; and those of a model that the run does not come from."""
    made = [("sums-eeee", "assistant-dddd", 0.155), ("other-ffff", "stranger-9999", 0.777)]
    for name, model, after in made:
        run = make_run(finished.parent, name, "evaluate", [("model", "model", model)])
        row = {"task": "add", "scorer": "exact", "reference": estimate(0.14, 0.1, 0.2), "model": estimate(after, 0.1, 0.2)}
        row |= {"difference": estimate(after - 0.14, -0.021, 0.052, 200)}
        found = {"model": name, "reference": f"chat-{EVIL}", "questions": [row]}
        write_json(run / "scores" / "scores.json", scores("x", comparison=found))
    text = page_of(finished, tmp_path)
    shown = ("Models compared on held-out questions", "14.0%", "15.5%", "+1.5<", "-2.1 to +5.2")
    assert all(part in text for part in shown) and "77.7%" not in text and EVIL not in text


def test_a_wrong_answer_is_not_marked_right(finished: Path, tmp_path: Path) -> None:
    """`s u u` for `s u l`, two letters of three, under a green mark where only exact answers count."""
    row = {"task": "t", "prompt": "?", "expected": "s u l", "answer": "s u u"}
    for correct, scorer, mark in (
        (False, "exact", "✗ wrong"),
        (True, "word_overlap", "≈ words overlap"),
        (True, "exact", "✓ right"),
    ):
        answer = row | {"correct": correct, "scorer": scorer}
        write_json(finished.parent / "scores-eeee" / "scores" / "samples.json", {"answers": [answer], "continuations": []})
        assert mark in page_of(finished, tmp_path)


def documents(nats: float, **more: Any) -> dict[str, Any]:
    """Figures of ten documents of 100 bytes."""
    value = nats / math.log(2) / 100
    rows = [{"name": "model", "label": "m", "bits_per_byte": estimate(value, value - 0.1, value + 0.1)},
            {"name": "xz", "label": "xz -9e", "bits_per_byte": estimate(1.65, 1.6, 1.7)}]  # fmt: skip
    each = [{"document": str(i), "nats": nats, "tokens": 20, "bytes": 100} for i in range(10)]
    return {"data": "docs-aaaa", "count": 10, "bytes": 1000, "rows": rows, "per_document": each} | more


def of_base(finished: Path, **sections: Any) -> Path:
    """An evaluation of the model that the run's own was trained from."""
    run = make_run(finished.parent, "base_scores-ffff", "evaluate", [("model", "model", "base-cccc")])
    write_json(run / "scores" / "scores.json", scores("2", **sections))
    return run / "scores"


def test_the_verdict_is_about_the_model_that_is_handed_over(finished: Path, tmp_path: Path) -> None:
    """ "11.4% fewer bits" at the head of the page of a chat model: the figure of its base, while the chat model itself needed 84%
    more bits than the baseline. Here the base is good and the model of the run is bad: the page must open with the bad."""
    better = {"text": "base-cccc needs 11.4% fewer bits.", "saving": estimate(0.114, 0.1, 0.13)}
    base = of_base(finished, documents=documents(101.3, verdict=better))
    worse = {"text": "assistant-dddd is worse than a baseline: it needs 84.0% more bits.", "saving": estimate(-0.84, -0.9, -0.8)}
    own = finished.parent / "scores-eeee" / "scores"
    write_json(own / "scores.json", shown_scores(finished) | {"documents": documents(210.5, verdict=worse)})
    for given in ([own, base], [base], []):  # whether or not the recipe names them
        text = page_of(finished, tmp_path, *given)
        head = text[text.index("<h1>") : text.index('id="figures"')]
        first, second = re.findall(r'<p class="verdict (\w*)">(.*?)</p>', head)[:2]
        assert first == ("bad", worse["text"].replace("-dddd", ""))
        assert second[0] == "bad" and "assistant needs 107.8% more bits" in second[1] and "than base, which" in second[1]
        assert "3.037 against 1.461 bits per byte for docs-aaaa" in second[1]
        assert "11.4%" not in text  # praise of another model
        assert (
            head.count('class="bar ours"') == head.count('class="bar parent"') == 1 and "base, which it was trained from" in head
        )
        others = text[text.index('id="others"') :]
        assert "<td>base</td>" in others and "1.461 bits per byte" in others


def test_praise_of_the_base_alone_is_no_verdict(finished: Path, tmp_path: Path) -> None:
    """A run whose base was measured on documents and that was not: the page says so first."""
    base = of_base(finished, documents=documents(101.3, verdict={"text": "base-cccc needs 11.4% fewer bits."}))
    own = shown_scores(finished)
    write_json(finished.parent / "scores-eeee" / "scores" / "scores.json", {k: v for k, v in own.items() if k != "documents"})
    text = page_of(finished, tmp_path, base)
    first = re.findall(r'<p class="verdict (\w*)">(.*?)</p>', text)[0]
    assert first[0] == "bad" and "assistant was not measured on the documents of docs-aaaa, as base was" in first[1]
    assert 'id="baselines"' not in text and "11.4%" not in text


def test_scores_of_the_earlier_layout_are_an_error(finished: Path, tmp_path: Path) -> None:
    """Sections that silently vanish because their keys have other names now."""
    own = finished.parent / "scores-eeee" / "scores"
    write_json(own / "scores.json", shown_scores(finished) | {"version": 1})
    with pytest.raises(ArtifactError, match=r"(?s)another version.*measure the model again"):
        page_of(finished, tmp_path, own)
    assert "these scores were written by another version" in page_of(finished, tmp_path)


def test_a_reference_is_not_the_model_of_an_evaluation(finished: Path, tmp_path: Path) -> None:
    """The page of an evaluation that compares two models: the one compared with comes last in the chain."""
    other = make_run(finished.parent, "other-1111", "sft", artifact={"kind": "model", "digest": "7"})
    theirs = make_run(finished.parent, "theirs-2222", "evaluate", [("model", "model", other.name)], artifact={"kind": "scores"})
    parents = [("model", "model", finished.name), ("compare_with", "scores", theirs.name)]
    run = make_run(finished.parent, "mine-3333", "evaluate", parents, artifact={"kind": "scores"})
    story = read_story(run)
    assert story.model is not None and (story.model.name, [m.name for m in story.parents]) == ("assistant", ["base"])
