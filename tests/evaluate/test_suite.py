"""The whole evaluation: files, numbers with their n and interval, and an honest verdict."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tutelage.errors import DataError
from tutelage.evaluate import suite
from tutelage.evaluate.baselines import Baseline
from tutelage.evaluate.bits import DocumentSums
from tutelage.models.heads import LmHead
from tutelage.models.interface import Batch, Output
from tutelage.records import Conversation, Document, Message, dump_line


class Uniform(nn.Module):
    """Gives every one of 257 outcomes the same probability."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = LmHead(nn.Parameter(torch.zeros(257, 4)))

    def forward(self, batch: Batch) -> Output:
        return Output(torch.zeros(*batch.shape, 4))


@pytest.fixture
def records(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    words = ["spam", "eggs", "ham", "parrot"]
    texts = [" ".join(words[i] for i in rng.integers(0, 4, size=60)) for _ in range(40)]
    docs, chats = tmp_path / "docs", tmp_path / "chats"
    for folder in (docs, chats):
        folder.mkdir()
    made = [Document.make(t, source="s") for t in texts]
    (docs / "train.jsonl").write_text("".join(dump_line(d) + "\n" for d in made[:30]), encoding="utf-8")
    (docs / "validation.jsonl").write_text("".join(dump_line(d) + "\n" for d in made[30:]), encoding="utf-8")
    turns = [(Message(role="user", content=f"{i}?"), Message(role="assistant", content=str(i))) for i in range(30)]
    asked = [Conversation.make(t, source="s", meta={"task": "echo"}) for t in turns]
    (chats / "validation.jsonl").write_text("".join(dump_line(c) + "\n" for c in asked), encoding="utf-8")
    return docs, chats


def subject() -> suite.Subject:
    def generate(prompts: list[list[int]], sampling: dict[str, Any]) -> list[str]:
        return [bytes(p[:-1]).decode() if p and p[-1] == ord("?") else "?" for p in prompts]

    return suite.Subject(
        name="uniform", model=Uniform(), encode=lambda t: list(t.encode()), begin=(256,), end=(256,), vocabulary=257, context=64,
        generate=generate, prompt=lambda c: list(c.messages[-2].content.encode()), decode=lambda ids: bytes(ids).decode(),
    )  # fmt: skip


def test_a_uniform_model_costs_its_entropy_and_loses(records: tuple[Path, Path], tmp_path: Path) -> None:
    """log2(257) bits a byte and one more symbol a document: any other number means lost or double-counted tokens. And the verdict
    must say that it lost."""
    result = suite.evaluate(subject(), tmp_path / "out", documents=records[0], conversations=records[1])
    model = next(r for r in result["documents"]["rows"] if r["name"] == "model")["bits_per_byte"]
    size = result["documents"]["bytes"]
    assert model["value"] == pytest.approx(math.log2(257) * (size + 10) / size, rel=1e-6)
    assert model["n"] == 10 and model["low"] <= model["value"] <= model["high"]
    assert result["documents"]["perplexity"]["value"] == pytest.approx(257, rel=1e-6)
    assert result["documents"]["verdict"]["text"].startswith("uniform is worse than a baseline: it needs ")
    assert {r["name"] for r in result["documents"]["rows"]} == {"model", "xz", "kn-bytes", "kn-tokens"}
    task = result["questions"]["tasks"][0]
    assert task["correct"]["value"] == 1.0 and task["above_guess"]
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == json.loads(json.dumps(result))
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 30
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["continuations"]


def test_figures_name_their_model_and_data(
    records: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table without its model's perplexity, and a verdict that could be quoted for any model."""
    result = suite.evaluate(subject(), tmp_path / "out", documents=records[0], conversations=records[1], baselines=False)
    assert (result["documents"]["data"], result["questions"]["data"]) == ("docs", "chats")
    shown = " ".join(capsys.readouterr().err.split())
    assert "10 held-out documents of docs" in shown and "held-out questions of chats, answered by uniform" in shown
    assert "perplexity" in shown and "257.0 to 257.0" in shown
    assert "uniform needs" in shown


def test_limits_spread_and_nothing_to_measure(records: tuple[Path, Path], tmp_path: Path) -> None:
    """A limit that takes the first documents measures one corner of the data."""
    result = suite.evaluate(subject(), tmp_path / "out", documents=records[0], baselines=False, max_documents=5)
    assert result["documents"]["count"] == 5
    assert suite.spread(list(range(10)), 5) == [0, 2, 4, 6, 8]
    with pytest.raises(DataError, match="nothing to measure"):
        suite.evaluate(subject(), tmp_path / "out")


@pytest.mark.parametrize(
    ("factor", "starts"),
    [
        (0.9, "m needs 10.0% fewer"),
        (1.1, "m is worse than a baseline: it needs 10.0% more"),
        (1.0, "m shows no clear difference"),
    ],
)
def test_verdict_compares_on_the_units_of_the_baseline(factor: float, starts: str) -> None:
    """xz is only known per group of documents; the model's documents must be added up the same way. A tie is called a tie."""
    rng = np.random.default_rng(0)
    members = np.repeat(np.arange(8), 5)
    ours = rng.lognormal(7, 0.3, size=40)
    noise = 1 + (0.02 * (-1.0) ** np.arange(8) if factor == 1.0 else 0)
    xz = Baseline("xz", "xz", np.bincount(members, weights=ours) / factor * noise, np.full(8, 500.0), "group", members)
    weak = Baseline("kn", "kn", ours * 3, np.full(40, 100.0), "document", np.arange(40))
    sums = DocumentSums((ours * math.log(2)).tolist(), [100] * 40, [100] * 40, [""] * 40)
    verdict = suite.verdict(sums, [weak, xz], model="m", data="corpus-1")
    assert verdict["best_baseline"] == "xz" and "40 held-out documents of corpus-1" in verdict["text"]
    assert verdict["text"].startswith(starts)
