"""Ratings as prompt groups for KTO: the same words as were rated, and another prompt's answer beside each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tutelage.data.groups.groups import collate
from tutelage.data.groups.kto import KtoGroups, rotation, verdicts
from tutelage.data.groups.source import GroupSource
from tutelage.data.tokens.shards import Segments, tokenize
from tutelage.errors import DataError
from tutelage.models.config import DecoderConfig
from tutelage.models.init import build
from tutelage.objectives import objective
from tutelage.records import Message, Rating, dump_line
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.tokenizer.train import train
from tutelage.train.step import StepConfig, gradients


def rating(i: int, *, words: int = 3, prompt: str = "") -> Rating:
    asked = [Message(role="user", content=prompt or f"ask {i}")]
    answer = [Message(role="assistant", content=" ".join(f"word{i % 10}" for _ in range(words)))]
    return Rating.make(asked, answer, source=f"r{i}", scores={"desirable": float(i % 3 == 0)})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    train([f"ask {i} word{i % 10}" for i in range(60)], vocab_size=320, out=folder)
    return folder


@pytest.fixture
def segments(tokenizer, tmp_path):
    """The training split of some ratings, as tokens."""

    def made(rows: list[Rating]) -> Segments:
        records = tmp_path / f"records{len(list(tmp_path.iterdir()))}"
        records.mkdir()
        (records / "schema.json").write_text(json.dumps({"type": "Rating", "version": 1}))
        for split, part in (("train", rows), ("validation", rows[:1])):
            (records / f"{split}.jsonl").write_text("".join(f"{dump_line(r)}\n" for r in part), encoding="utf-8")
        tokenize(records, tokenizer, records / "tokens", workers=1)
        return Segments.open(records / "tokens" / "train")

    return made


def prompt_groups(segments, rows: list[Rating], max_length: int = 64, too_long: str = "drop") -> KtoGroups:
    said = verdicts([json.loads(dump_line(r)) for r in rows])
    return KtoGroups(segments(rows), said, max_length, too_long)


def test_each_prompt_has_its_answer_and_anothers(segments, tokenizer):
    """Guards against answers that lose a token at the border of the prompt, and against a verdict of another row."""
    rows = [rating(i, words=1 + i % 4) for i in range(10)]
    made = prompt_groups(segments, rows)
    words = TokenizerFolder.open(tokenizer)
    assert made.shift == 1
    for i, row in enumerate(rows):
        group = made[i]
        assert group.name == row.id
        for completion, theirs in zip(group.completions, (row, rows[i - 1]), strict=True):
            text = words.decode(completion.ids[completion.mask > 0].tolist())
            assert text.startswith(theirs.answer[0].content) and row.prompt[0].content not in text
            assert completion.per_completion["desirable"] == row.scores["desirable"]
        assert row.prompt[0].content in words.decode(group.prompt.tolist())
    assert made.report["answers of other prompts that are to the same one"] == 0


@pytest.mark.parametrize("layout", ["tree", "packed", "rows"])
def test_sizes_are_those_of_the_families(segments, layout):
    """Guards against micro-batches that overflow because a size was a guess."""
    for too_long, length in (("drop", 64), ("left", 14), ("right", 14)):
        made = prompt_groups(segments, [rating(i, words=1 + i % 5) for i in range(10)], length, too_long)
        assert made.sizes(layout).tolist() == [made[i].size(layout) for i in range(len(made))]


def test_several_answers_to_a_prompt_are_not_mismatched_with_it(segments):
    """Guards against a reference point from answers that fit their prompt: judged answers to one prompt often stand in a row."""
    rows = [rating(i, prompt=f"ask {i // 3}", words=1 + i % 3) for i in range(12)]
    made = prompt_groups(segments, rows)
    assert made.shift == 3
    assert all(rows[i].prompt != rows[i - made.shift].prompt for i in range(12))
    assert rotation(np.zeros(5, np.int64)) == (1, 5)  # nothing else to be had: counted
    assert rotation(np.array([0, 0, 1])) == (1, 1)


@pytest.mark.parametrize("too_long", ["drop", "left", "right"])
def test_long_texts(segments, too_long):
    """Guards against silent cuts, answers without a token and texts beyond the model's context."""
    rows = [rating(6, words=60), rating(7, prompt="ask " * 40), *[rating(i) for i in range(6)]]
    said = {row.id: row.scores["desirable"] for row in rows}
    made = prompt_groups(segments, rows, 30, too_long)
    assert len(made) == {"drop": 6, "left": 8, "right": 7}[too_long]
    counts = made.report
    assert counts["left out, too long"] == 8 - len(made)
    assert counts.get(f"cut at the {too_long}") == {"drop": None, "left": 2, "right": 1}[too_long]
    for i in range(len(made)):
        group = made[i]
        assert 0 < len(group.prompt) <= 30 - max(len(e.ids) for e in group.completions)
        assert all(e.supervised > 0 for e in group.completions)
        assert group.completions[0].per_completion["desirable"] == said[group.name]


def test_a_batch_counts_what_the_loss_divides_by(segments):
    """Guards against answers of other prompts that count, and against a digest that forgets verdicts or numbers of answers."""
    rows = [rating(i) for i in range(9)]
    made = prompt_groups(segments, rows)
    before = made.digest
    made.set_values("reference", np.full((9, 2), -12.5))
    assert made.digest != before
    other = KtoGroups(made.segments, 1 - verdicts([json.loads(dump_line(r)) for r in rows]), 64)
    assert other.digest not in (before, made.digest)
    source = GroupSource(made, per_step=9, micro_tokens=60, layout="tree", seed=0, unit="answers")
    batch = source.next(0)
    assert len(batch.micro) > 1
    wanted = {"answers": 9, "desirable": 3, "undesirable": 6, "sequences": 18}
    assert {k: batch.counts[k] for k in wanted} == wanted
    shape = {
        "model_type": "llama", "vocab_size": made.segments.vocabulary, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 16,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    }  # fmt: skip
    policy = build(DecoderConfig.from_hf(shape), 0)
    result = gradients(StepConfig({"policy": policy}, objective("kto")), batch)
    assert 0 < result.loss < 1 and result.grad_norm > 0
    first = collate([made[0]], "tree").answers
    assert first.per_completion["reference"].tolist() == [-12.5, -12.5] and torch.equal(
        first.per_completion["desirable"], torch.ones(2)
    )


def test_balance_is_said_with_a_weight_that_mends_it(segments):
    """Guards against a training on three times as many bad answers that nobody is told of."""
    made = prompt_groups(segments, [rating(i) for i in range(12)])  # 4 good, 8 bad
    assert made.balance() == (
        "4 desirable and 8 undesirable answers, weighted 1 and 1: out of balance; "
        "desirable_weight between 2 and 2.67 would even them out"
    )
    assert "out of balance" not in made.balance(2.2) + made.balance(1.1, 0.5)
    good = prompt_groups(segments, [rating(3 * i) for i in range(4)])
    assert "of one kind only" in good.balance()


def test_rows_that_do_not_say_are_refused(segments):
    """Guards against a rating on a scale of 1 to 5 that is taken for a verdict."""
    row = json.loads(dump_line(rating(0)))
    for scores in ({"helpful": 4.0}, {"desirable": 0.7}, {}):
        with pytest.raises(DataError, match="desirable") as error:
            verdicts([row, {**row, "scores": scores}])
        assert f"({row['source']})" in str(error.value)
    with pytest.raises(DataError, match="two ratings"):
        prompt_groups(segments, [rating(0)])
