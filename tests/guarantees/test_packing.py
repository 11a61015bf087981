"""Promises 2, 4 and 5: samples packed into one row are as good as alone, padding is known by length, cuts are counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.guarantees import tiny
from tutelage.errors import DataError
from tutelage.models import kernels
from tutelage.models.decoder import Decoder
from tutelage.models.interface import Batch
from tutelage.objectives.next_token import next_token
from tutelage.records import Conversation, Message
from tutelage.setup import text_rows


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every promise here holds on our kernels and on plain torch."""
    before = kernels.available()
    kernels.use(request.param == "kernels")
    yield request.param
    kernels.use(before)


def packed() -> Batch:
    """Rows with several samples and padding."""
    (batch,) = tiny.source("conversations", rows_per_step=4, micro_rows=4).next(0).micro
    assert int(batch.segments.max()) > 1 and int((batch.segments == 0).sum()) > 0
    return batch


def samples(batch: Batch) -> list[Batch]:
    """Each piece of each row as a batch of its own."""
    out = []
    for r in range(len(batch.ids)):
        for n in range(1, int(batch.segments[r].max()) + 1):
            own = batch.segments[r] == n
            parts = {k: getattr(batch, k)[r, own][None] for k in ("ids", "positions", "targets", "weights")}
            assert parts["positions"].tolist() == [list(range(int(own.sum())))]  # rotary attention would not show a shift
            out.append(Batch(segments=torch.ones_like(parts["ids"], dtype=torch.int32), **parts))
    return out


def loss_and_gradient(model: Decoder, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = next_token({"policy": model}, batch)["loss"].sum
        loss.backward()
        total += loss.item()
    return total, tiny.gradients_of(model)


def test_a_packed_loss_is_the_sum_of_unpacked_losses():
    """Guards against packing that leaks: positions that run on, attention or targets across a border, padding that is trained."""
    model, batch = tiny.model(), packed()
    together, gradient = loss_and_gradient(model, [batch])
    apart, expected = loss_and_gradient(model, samples(batch))
    assert together == pytest.approx(apart, rel=1e-6)
    assert tiny.furthest(expected, gradient) < 2e-6
    leaking = replace(batch, segments=(batch.segments > 0).int())
    assert abs(loss_and_gradient(model, [leaking])[0] - apart) > 1e-3 * apart  # the data would show a leak


def test_no_sample_sees_another(path):
    """Guards against attention across samples: with all the others in its row changed, a sample's states stay the same bits."""
    model, batch = tiny.model().eval(), packed()
    second = batch.segments == 2
    other = replace(batch, ids=torch.where(second | (batch.segments == 0), batch.ids, (batch.ids + 7) % tiny.VOCABULARY))
    with torch.no_grad():
        before, after = model(batch).hidden, model(other).hidden
    assert torch.equal(before[second], after[second])
    assert not torch.equal(before[batch.segments == 1], after[batch.segments == 1])


@pytest.mark.parametrize("value", ["eos", "content", "last"])
def test_padding_is_known_by_length_not_by_value(value):
    """Guards against masks made by comparing ids with the pad token: whatever stands in the padding changes no bit of loss or
    gradient, and tokens of that value inside a sample stay supervised."""
    model, batch = tiny.model(), packed()
    words = tiny.renderer().tokenizer
    content = int(batch.targets[batch.weights > 0][0])
    ids = {"eos": words.eos_id, "content": content, "last": tiny.VOCABULARY - 1}[value]
    filled = replace(batch, ids=torch.where(batch.segments == 0, ids, batch.ids))
    assert not torch.equal(filled.ids, batch.ids) or ids == 0
    loss, gradient = loss_and_gradient(model, [batch])
    again, same = loss_and_gradient(model, [filled])
    assert again == loss
    assert all(torch.equal(gradient[n], same[n]) for n in gradient)


def test_padding_width_changes_nothing():
    """Guards against padded length that enters positions, counts or the loss: trimmed rows and full rows have one loss."""
    model = tiny.model()
    wide = tiny.source("conversations", row_length=128, packing="none").next(0)
    narrow = tiny.source("conversations", row_length=128, packing="none", trim=True).next(0)
    assert wide.micro[0].ids.shape != narrow.micro[0].ids.shape and wide.counts == narrow.counts
    loss, gradient = loss_and_gradient(model, wide.micro)
    again, same = loss_and_gradient(model, narrow.micro)
    assert again == pytest.approx(loss, rel=1e-6)
    assert tiny.furthest(gradient, same) < 2e-6


def test_the_end_token_is_supervised_where_padding_has_its_id():
    """Guards against models that never stop: with pad token = end token (Qwen's style) the ends are still targets."""
    words = tiny.renderer("qwen").tokenizer
    assert words.pad_id == words.eos_id
    for kind, end in (("documents", words.eos_id), ("conversations", words.end_of_turn_ids[0])):
        data = tiny.segments(kind, template="qwen")
        for i in range(len(data)):
            assert end in data.ids(i)[data.mask(i).astype(bool)].tolist()
        settings = {"row_length": 128, "rows_per_step": 4, "micro_rows": 4, "seed": 0}
        (batch,) = text_rows.StaticSource(data, **settings).next(0).micro
        pieces = sum(int(row.max()) for row in batch.segments)
        assert int((batch.targets[batch.weights > 0] == end).sum()) == pieces
        filled = replace(batch, ids=torch.where(batch.segments == 0, words.pad_id, batch.ids))
        model = tiny.model()
        scores = torch.log_softmax(model.logits(filled), -1).gather(-1, batch.targets[..., None])[..., 0]
        expected = -(scores * batch.weights).sum().item()  # with the ends
        assert next_token({"policy": model}, filled)["loss"].sum.item() == pytest.approx(expected, rel=1e-5)


def long_and_short() -> list[Conversation]:
    """Five short dialogues; three whose answers begin after the 48th token; one without a trained answer."""

    def talk(question: str, answer: str, train: bool | None = None) -> Conversation:
        turns = [Message(role="user", content=question), Message(role="assistant", content=answer, train=train)]
        return Conversation.make(turns, source="tiny")

    short = [talk(f"{i}?", tiny.sentence(i, 3)) for i in range(5)]
    return [*short, *(talk(tiny.sentence(i, 60), "red") for i in range(3)), talk("untrained?", "mat", train=False)]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("drop", {"long": 3, "dropped_long": 3}),
        ("left", {"long": 3, "cut_left": 3}),
        ("right", {"long": 3, "cut_right": 3, "pieces_unsupervised": 4}),
        ("split", {"long": 3, "split": 3}),
    ],
)
def test_what_is_cut_or_dropped_is_counted_and_said(policy, expected, tmp_path, capsys):
    """Guards against silent truncation: the policy decides, the report counts, the console says, no row is without a target."""
    segments = tiny.chat_segments(long_and_short(), tmp_path)
    assert segments.totals["unsupervised"] == (1 if len(segments) == 9 else 0)
    source = text_rows.StaticSource(segments, row_length=48, rows_per_step=4, micro_rows=2, seed=0, policy=policy)
    report = source.report
    for key, value in expected.items():
        assert report[key] == value, (key, report)
    text_rows.say_packing(report, 16)
    said = capsys.readouterr().err
    assert all(text_rows.LOSSES.get(key, f"{key}: ") in said for key in expected)
    for step in range(2 * source.rows_per_epoch // 4 + 1):
        for micro in source.next(step).micro:
            assert (micro.weights.sum(1) > 0).all()


def test_data_without_any_target_is_refused(tmp_path):
    """Guards against a run with loss 0.0 that "succeeds": when every answer is cut off there is no row, and that is an error."""
    segments = tiny.chat_segments(long_and_short()[5:8], tmp_path)
    with pytest.raises(DataError, match="no row to train on"):
        text_rows.StaticSource(segments, row_length=48, rows_per_step=4, micro_rows=2, seed=0, policy="right")
