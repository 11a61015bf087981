"""A teacher's likeliest tokens, kept in files: the right ones at each place, and never made twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.guarantees import tiny
from tutelage.data.tokens import teacher_tokens
from tutelage.data.tokens.teacher_tokens import KeptTokens, TaughtSource, keep, likeliest
from tutelage.models.interface import Batch
from tutelage.objectives import objective
from tutelage.train.step import StepConfig, gradients

K, CONTEXT = 5, 128


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_tokens, "PART", 60)  # several parts of several segments


def kept(folder: Path, kind: str, temperature: float = 1.0) -> tuple[KeptTokens, torch.nn.Module, int]:
    teacher = tiny.model(seed=4, initializer_range=0.3)
    store = KeptTokens(folder, tiny.segments(kind))
    top = likeliest(teacher, K, temperature, torch.device("cpu"), chunk=7)
    made = keep(store, top, K, {"teacher": 4, "temperature": temperature}, row_length=CONTEXT)
    return store, teacher, made


@pytest.mark.parametrize("kind", ["documents", "conversations"])
def test_each_place_has_what_the_teacher_said_there(tmp_path: Path, kind: str) -> None:
    """Guards against streams that are shifted by a token, or by a segment: each whole text alone through the teacher."""
    store, teacher, made = kept(tmp_path, kind, 2.0)
    assert made == len(store.groups) > 2
    for i in range(len(store.segments)):
        text = store.segments.ids(i).astype(np.int64).tolist()
        rows = (teacher.logits(Batch.of([text]))[0].detach() / 2).log_softmax(-1)  # type: ignore[operator]
        targets = np.flatnonzero(store.segments.mask(i)[1:])
        best = rows[targets].topk(K)
        ids, logprobs = store.of_piece(i, 0, len(text), 0)
        np.testing.assert_allclose(logprobs, best.values, atol=2e-5)
        assert (ids == best.indices.numpy()).mean() > 0.99  # near ties
        if len(text) > 8:  # a piece of it
            again, _ = store.of_piece(i, 3, 8, 1)
            inside = (targets + 1 >= 5) & (targets + 1 < 8)
            assert again.tolist() == ids[inside].tolist()


def test_parts_that_are_there_are_not_made_again(tmp_path: Path) -> None:
    """A killed run asks the teacher all over again; or another teacher's words are taken for this one's."""
    store, _, made = kept(tmp_path, "documents")
    before = store.file(1, "logprobs").stat().st_mtime_ns
    store.file(2, "logprobs").unlink()  # killed between the two files of a part
    assert kept(tmp_path, "documents")[2] == 1
    assert store.file(1, "logprobs").stat().st_mtime_ns == before
    assert kept(tmp_path, "documents")[2] == 0
    assert kept(tmp_path, "documents", 2.0)[2] == made


@pytest.mark.parametrize("kind", ["documents", "conversations"])
@pytest.mark.parametrize("micro_rows", [1, 3])
def test_rows_bring_them(tmp_path: Path, kind: str, micro_rows: int) -> None:
    """Guards packing: with all but one token kept, a batch with streams gives the loss of the teacher beside it, where rows hold
    whole texts, however they are cut into micro-batches."""
    teacher = tiny.model(seed=4, initializer_range=0.3).requires_grad_(False)
    source = rows_of_whole_texts(kind, micro_rows)
    store = KeptTokens(tmp_path, tiny.segments(kind))
    plan = {"teacher": 4}
    keep(store, likeliest(teacher, tiny.VOCABULARY - 1, 1.0, torch.device("cpu")), tiny.VOCABULARY - 1, plan, row_length=CONTEXT)
    taught = TaughtSource(source, store, plan)
    found = []
    for batch, parts in ((source.next(3), {"teacher": teacher}), (taught.next(3), {})):
        model = tiny.model()
        result = gradients(StepConfig({"policy": model, **parts}, objective("forward_kl", cross_entropy=0.2)), batch)
        found.append((tiny.gradients_of(model), result.terms))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    assert tiny.furthest(found[0][0], found[1][0]) < 1e-3
    batch = taught.next(3)
    assert batch.apart is not None
    alone = batch.apart(0)
    assert [b.rows for b in alone] == [(names,) for names in batch.rows[: len(alone)]]
    assert sum(b.answers.count for b in alone) == batch.micro[0].answers.count  # type: ignore[union-attr]
    state = taught.state_dict()
    taught.load_state_dict(state)
    assert replace(batch).counts == source.next(3).counts


def rows_of_whole_texts(kind: str, micro_rows: int):
    """Rows that hold every text whole."""
    return tiny.source(kind, row_length=CONTEXT, rows_per_step=3, micro_rows=micro_rows)
