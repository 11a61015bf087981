"""Rows: nothing lost, nothing twice, nothing over the edge, and the same rows from the same integers."""

from __future__ import annotations

import numpy as np
import pytest

from tutelage.data.tokens.pack import POLICIES, RowOrder, eval_rows, mixed_bits, plan_rows, shuffled
from tutelage.errors import ConfigError, DataError

LENGTHS = np.concatenate([np.arange(1, 40), [64, 65, 127, 128, 129, 500], np.full(20, 7)]).astype(np.int64)


def targets_of(plan, lengths=LENGTHS):
    """How often each token of each segment is a counted target."""
    seen = [np.zeros(n, int) for n in lengths]
    p = plan.pieces
    for s, a, b, c in zip(p.segment, p.start, p.stop, p.context, strict=True):
        seen[s][a + c + 1 : b] += 1
    return seen


@pytest.mark.parametrize("epoch", [0, 1, 5])
@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_split_predicts_every_token_once(epoch, packing):
    """Guards against cuts that lose the prediction at the border, or make it twice."""
    plan = plan_rows(LENGTHS, 64, seed=3, epoch=epoch, policy="split", packing=packing)
    for n, seen in zip(LENGTHS, targets_of(plan), strict=True):
        assert seen[1:].tolist() == [1] * (n - 1)
    assert plan.report["targets"] == (LENGTHS - 1).sum()


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_hold_at_most_row_length(policy):
    """Guards against a row longer than the model's context, and empty rows."""
    plan = plan_rows(LENGTHS, 64, seed=0, epoch=2, policy=policy)
    assert plan.row_tokens().min() > 0 and plan.row_tokens().max() <= 64
    assert plan.row_offsets[-1] == len(plan.pieces) and plan.report["rows"] == len(plan)


def test_policies_are_counted():
    """Guards against truncation that nobody is told of (promise 2)."""
    long, extra = (LENGTHS > 64).sum(), LENGTHS[LENGTHS > 64]
    reports = {p: plan_rows(LENGTHS, 64, seed=0, epoch=0, policy=p).report for p in POLICIES}
    assert all(r["long"] == long and r["pieces_unsupervised"] == 1 for r in reports.values())  # the segment of one token
    assert (reports["split"]["split"], reports["split"]["tokens_cut"]) == (long, 0)
    assert (reports["drop"]["dropped_long"], reports["drop"]["tokens_cut"]) == (long, extra.sum())
    assert (reports["left"]["cut_left"], reports["left"]["tokens_cut"]) == (long, (extra - 64).sum())
    assert (reports["right"]["cut_right"], reports["right"]["tokens_cut"]) == (long, (extra - 64).sum())
    assert reports["drop"]["segments_used"] == len(LENGTHS) - long - 1


def test_left_and_right_keep_the_named_end():
    """Guards against cutting the answer off when the question was meant."""
    for policy, start in (("left", 436), ("right", 0)):
        p = plan_rows(np.array([500]), 64, seed=0, epoch=0, policy=policy).pieces
        assert (p.start.tolist(), p.stop.tolist()) == ([start], [start + 64])


def test_cuts_move_but_the_number_of_rows_does_not():
    """Guards against the same borders in each epoch, and against epochs of different size (steps could not be counted ahead)."""
    plans = [plan_rows(LENGTHS, 64, seed=1, epoch=e, policy="split") for e in range(8)]
    assert len({len(p) for p in plans}) == 1
    starts = {tuple(sorted(p.pieces.start[p.pieces.segment == 44].tolist())) for p in plans}
    assert len(starts) > 3
    orders = {tuple(p.pieces.segment.tolist()) for p in plans}
    assert len(orders) == 8


def test_unsupervised_pieces_stay_out():
    """Guards against rows whose loss is 0/0: here only the last quarter of each segment is supervised."""
    mask = [np.arange(n) >= n * 3 // 4 for n in LENGTHS]

    def count(segment, start, stop):
        return np.array([mask[s][a + 1 : b].sum() for s, a, b in zip(segment, start, stop, strict=True)])

    plan = plan_rows(LENGTHS, 64, seed=0, epoch=0, policy="split", supervised=count)
    p = plan.pieces
    assert (count(p.segment, p.start, p.stop) > 0).all() and plan.report["pieces_unsupervised"] > 5
    assert plan.report["targets"] == sum(m[1:].sum() for m in mask)
    again = plan_rows(LENGTHS, 64, seed=0, epoch=9, policy="split", supervised=count)
    assert len(again) == len(plan)


def test_nothing_left_is_an_error_that_says_why():
    """Guards against a run over zero rows."""
    with pytest.raises(DataError, match="dropped_long 2"):
        plan_rows(np.array([100, 200]), 64, seed=0, epoch=0, policy="drop")
    with pytest.raises(ConfigError, match="policy"):
        plan_rows(LENGTHS, 64, seed=0, epoch=0, policy="cut")


def test_packing_is_tight():
    """Guards against a packer that wastes places: 10,000 random segments fill more than 99.5% of the slots."""
    lengths = (mixed_bits(np.arange(10_000), 5) % 300).astype(np.int64) + 2
    plan = plan_rows(lengths, 512, seed=0, epoch=0, policy="split")
    assert plan.report["fill"] > 0.995
    assert len(plan_rows(lengths, 512, seed=0, epoch=0, policy="split", packing="none")) == 10_000


def test_best_fit_is_that_of_the_textbook():
    """The grouped packer opens as many rows as best-fit decreasing done piece by piece."""
    lengths = (mixed_bits(np.arange(400), 9) % 50).astype(np.int64) + 2
    spaces: list[int] = []
    for n in sorted(lengths.tolist(), reverse=True):
        fits = [i for i, s in enumerate(spaces) if s >= n]
        if fits:
            spaces[min(fits, key=lambda i: spaces[i])] -= n
        else:
            spaces.append(64 - n)
    assert len(plan_rows(lengths, 64, seed=0, epoch=0, policy="drop")) == len(spaces)


def test_stream_goes_round_without_a_seam():
    """Guards against rows lost or repeated where a global batch crosses the end of an epoch."""
    order = RowOrder(LENGTHS, 64, seed=2, policy="split")
    n = order.rows_per_epoch
    assert n % 7, "the test needs a batch that does not divide the epoch"
    rows = [row for step in range(n) for row in order.rows_of_step(step, 7)]  # 7 epochs
    for epoch in range(7):
        part = rows[epoch * n : (epoch + 1) * n]
        assert sum(int((r.tokens - 1).sum()) for r in part) == (LENGTHS - 1).sum()
    fresh = RowOrder(LENGTHS, 64, seed=2, policy="split").rows_of_step(n - 1, 7)
    assert [r.segment.tolist() for r in fresh] == [r.segment.tolist() for r in rows[-7:]]


@pytest.mark.parametrize("stride", [1, 16, 63])
def test_evaluation_predicts_every_token_once_with_context(stride):
    """Guards against bits per byte over tokens counted twice, left out, or measured without context."""
    plan = eval_rows(LENGTHS, 64, stride)
    for n, seen in zip(LENGTHS, targets_of(plan), strict=True):
        assert seen[1:].tolist() == [1] * (n - 1)
    p = plan.pieces
    assert (p.context[p.start > 0] + 1 >= 64 - stride).all() and plan.row_tokens().max() <= 64
    assert plan.report["targets"] == (LENGTHS - 1).sum()


def test_the_order_is_pinned():
    """Guards against an order that changes with numpy or with an edit: it would silently break resuming older runs."""
    assert shuffled(8, 0, 1).tolist() == [6, 7, 0, 5, 4, 2, 1, 3]
    assert len(set(mixed_bits(np.arange(100_000), 7).tolist())) == 100_000
