"""Training some rows of a table alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.guarantees import tiny
from tutelage.errors import TrainingStopped
from tutelage.models.extend import extend, tables
from tutelage.train.loop import Job, train
from tutelage.train.rows import OnlyRows

FIRST, STOP = tiny.VOCABULARY - 30, tiny.VOCABULARY - 10  # as of new tokens that took spare rows, some behind them left


def job(folder: Path, steps: int = 4, tied: bool = True) -> Job:
    """A job that trains the rows FIRST to STOP. The data use none of them, so what moves them is the head's softmax alone."""
    model = extend(tiny.model(tie_word_embeddings=tied), FIRST, [(5, 6)] * (STOP - FIRST))
    only = OnlyRows(model, tables(model)[-1:], FIRST, STOP)
    return tiny.job(folder, steps=steps, parts={"policy": model}, checkpoint_every=1, keep_checkpoints=9, hooks={"rows": only})


def weights(job: Job) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in job.recipe.parts["policy"].named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_move_and_nothing_else(tmp_path: Path, tied: bool) -> None:
    """A mask that is off by one, weight decay or an optimizer that moves what has no gradient: what the checkpoint knows would
    change while its new tokens are still noise."""
    work = job(tmp_path, tied=tied)
    before = weights(work)
    train(work)
    after = weights(work)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {"model.embed_tokens.weight" if tied else "lm_head.weight"}
    (name,) = moved
    rows = (before[name] != after[name]).any(1).nonzero().flatten().tolist()
    assert rows == list(range(FIRST, STOP))


def test_an_old_row_that_moves_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 13 for rows: the loop's watch knows whole tensors, and this one is trained."""
    monkeypatch.setattr(OnlyRows, "_masked", lambda self, gradient: gradient)
    with pytest.raises(TrainingStopped, match=r"rows of old tokens changed(.|\n)*at step 1"):
        train(job(tmp_path))


def test_resumed_is_never_killed(tmp_path: Path) -> None:
    """Promise 7 for rows: and rows that changed between two attempts are compared with those of the first one."""
    straight = job(tmp_path / "straight")
    train(straight)
    killed = job(tmp_path / "killed")
    train(killed)
    for step in (3, 4):
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / f"step_{step:06d}")
    resumed = job(tmp_path / "killed")
    assert train(resumed).progress.step == 4
    one, two = weights(straight), weights(resumed)
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert resumed.hooks["rows"].state_dict() == straight.hooks["rows"].state_dict() != {"before": []}
