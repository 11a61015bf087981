"""Batches: what stands in them is what stands on disk, and they depend on (seed, step) alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tutelage.data.tokens.encode import SEGMENT
from tutelage.data.tokens.loader import MIX_BLOCK, MixSource, StaticSource, eval_batches
from tutelage.data.tokens.shards import Segments
from tutelage.errors import ArtifactError, ConfigError
from tutelage.models.interface import Batch

LENGTHS = [2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 7, 7, 7, 30, 31, 32, 33]


def token_folder(folder: Path, lengths=LENGTHS, kind="text", first=1000) -> Segments:
    """A split whose every token is another number, so a test sees where each came from. Chat: the last third is supervised."""
    folder.mkdir(parents=True)
    lengths = np.array(lengths)
    table = np.zeros(len(lengths), SEGMENT)
    table["record"], table["length"] = np.arange(len(lengths)) + first, lengths
    table["offset"] = np.cumsum(lengths) - lengths
    ids = np.arange(first, first + lengths.sum(), dtype=np.uint16)
    mask = np.concatenate([np.arange(n) >= n - n // 3 for n in lengths]).astype(np.uint8)
    targets = lengths - 1 if kind == "text" else np.array([n // 3 for n in lengths])
    table["supervised"] = targets
    np.save(folder / "shard_00000.ids.npy", ids)
    np.save(folder / "shard_00000.segments.npy", table)
    if kind == "chat":
        np.save(folder / "shard_00000.mask.npy", mask)
    counts = {"segments": len(lengths), "tokens": len(ids), "supervised": int(targets.sum()), "bytes": 0}
    shard = {**counts, "unsupervised": int((targets == 0).sum()), "largest_id": int(ids.max()), "digest": str(first)}
    about = {"version": 1, "kind": kind, "vocabulary": 65536, "tokenizer": "t", "split": "train"}
    (folder / "tokens.json").write_text(json.dumps({**about, **shard, "shards": [shard]}))
    return Segments.open(folder)


def source(segments: Segments, **change) -> StaticSource:
    settings = {"row_length": 32, "rows_per_step": 4, "micro_rows": 2, "seed": 1, **change}
    return StaticSource(segments, **settings)


def same(a: Batch, b: Batch) -> bool:
    names = ("ids", "segments", "positions", "targets", "weights")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names) and a.rows == b.rows


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_packed_batch_is_its_sources(tmp_path, kind):
    """Guards against shifted targets, supervision across a border, positions that run on, and padding that is trained on."""
    segments = token_folder(tmp_path / "t", kind=kind)
    data = source(segments, policy="split")
    seen: Counter[int] = Counter()
    begin = {int(segments.ids(i)[0]): i for i in range(len(segments))}
    for step in range(4):
        for batch in data.next(step).micro:
            assert batch.ids.shape == (2, 32) and batch.ids.dtype == torch.int64 and batch.weights.dtype == torch.float32
            padding = batch.segments == 0
            assert not batch.weights[padding].any() and not batch.targets[padding].any() and not batch.positions[padding].any()
            for r in range(2):
                numbers = batch.segments[r]
                assert numbers.unique().tolist()[-1] == len(batch.rows[r])
                for n, name in enumerate(batch.rows[r], 1):
                    at = (numbers == n).nonzero().flatten()
                    ids = batch.ids[r, at]
                    i = int(name, 16) - 1000
                    where = int(ids[0]) - int(segments.ids(i)[0])
                    assert ids.tolist() == segments.ids(i)[where : where + len(ids)].tolist()
                    assert batch.positions[r, at].tolist() == list(range(len(at)))
                    assert batch.targets[r, at].tolist() == [*ids[1:].tolist(), 0]
                    assert batch.weights[r, at].tolist() == [*segments.mask(i)[where + 1 : where + len(ids)].tolist(), 0]
                    seen.update(batch.targets[r, at][batch.weights[r, at] > 0].tolist())
    assert not set(begin) & set(seen), "the first token of a segment was predicted from another segment"


def test_an_epoch_trains_on_every_target_once(tmp_path):
    """Guards against rows dropped at the end of an epoch, or counted wrongly: counts are what the weights add up to."""
    segments = token_folder(tmp_path / "t")
    data = source(segments, rows_per_step=3, micro_rows=3)
    n = data.rows_per_epoch
    assert n % 3
    seen: Counter[int] = Counter()
    for step in range(n):
        batch = data.next(step)
        assert batch.counts["tokens"] == sum(float(m.weights.sum()) for m in batch.micro)
        assert batch.counts["sequences"] == sum(float(m.segments.amax(1).sum()) for m in batch.micro)
        assert batch.counts["processed"] == sum(float((m.segments > 0).sum()) for m in batch.micro)
        for m in batch.micro:
            seen.update(m.targets[m.weights > 0].tolist())
    assert set(seen.values()) == {3} and len(seen) == sum(LENGTHS) - len(LENGTHS)


def test_next_is_pure(tmp_path):
    """Guards against hidden state: the batch of a step is the same after any other, and in a fresh process."""
    segments = token_folder(tmp_path / "t")
    used = source(segments)
    used.next(3)
    late = used.next(70)
    used.next(0)
    fresh = source(segments).next(70)
    assert all(same(a, b) for x in (late, used.next(70)) for a, b in zip(x.micro, fresh.micro, strict=True))
    assert not same(source(segments, seed=2).next(70).micro[0], fresh.micro[0])


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_ranks_share_one_global_batch(tmp_path, kind):
    """Guards against a number of ranks or micro-batches that changes what is trained on, or what the loss is divided by."""
    segments = token_folder(tmp_path / "t", kind=kind)
    for step in range(5):
        one = source(segments, micro_rows=4).next(step)
        two = [source(segments, rank=r, world=2, micro_rows=1).next(step) for r in (0, 1)]
        assert two[0].counts == two[1].counts == one.counts
        assert [two[j % 2].rows[j // 2] for j in range(4)] == one.rows
        ids = [two[j % 2].micro[j // 2].ids[0] for j in range(4)]
        assert torch.equal(torch.stack(ids), one.micro[0].ids)
    with pytest.raises(ConfigError, match="4 rows, 3 ranks"):
        source(segments, world=3)


def test_records_of_a_row_are_reachable(tmp_path):
    """Guards against a batch that can't say where it comes from (promise 15 names rows)."""
    segments = token_folder(tmp_path / "t")
    batch = source(segments).next(0)
    known = {segments.record_id(i) for i in range(len(segments))}
    assert [name for m in batch.micro for name in m.rows] == batch.rows
    assert all(row and set(row) <= known for row in batch.rows)


def test_policy_is_stated(tmp_path):
    """Guards against silent truncation: conversations are dropped, text is cut, unless said otherwise, and both are reported."""
    text, chat = token_folder(tmp_path / "t"), token_folder(tmp_path / "c", kind="chat")
    long = sum(n > 32 for n in LENGTHS)
    assert source(text).report["split"] == long and source(text).report["dropped_long"] == 0
    assert source(chat).report["dropped_long"] == long and source(chat).report["pieces_unsupervised"] == 1
    assert source(chat, policy="left").report["cut_left"] == long


def test_resuming_with_other_data_is_refused(tmp_path):
    """Guards against going on with a run on data or an order that is not the one it was begun with."""
    a, b = token_folder(tmp_path / "a"), token_folder(tmp_path / "b", first=2000)
    state = json.loads(json.dumps(source(a).state_dict()))
    source(a, rank=1, world=2, micro_rows=1).load_state_dict(state)
    for other, field in ((source(b), "data"), (source(a, seed=9), "seed"), (source(a, rows_per_step=2), "rows_per_step")):
        with pytest.raises(ArtifactError, match=f"field: +{field}\n"):
            other.load_state_dict(state)


def test_largest_is_the_fullest(tmp_path):
    """Guards against a dry run that is smaller than a later step (promise 11)."""
    segments = token_folder(tmp_path / "t")
    for change in ({}, {"packing": "none", "trim": True, "policy": "drop", "row_length": 100}):
        data = source(segments, **change)
        most = data.largest()
        assert len(most.rows) == 4
        for step in range(10):
            batch = data.next(step)
            assert batch.counts["processed"] <= most.counts["processed"]
            assert max(m.ids.shape[1] for m in batch.micro) <= max(m.ids.shape[1] for m in most.micro)


def test_trim_cuts_padding_only(tmp_path):
    """Guards against a trimmed batch that loses tokens, and against widths of every size."""
    segments = token_folder(tmp_path / "t")
    settings = {"packing": "none", "policy": "drop", "row_length": 256}
    for step in range(4):
        wide, narrow = source(segments, **settings).next(step), source(segments, trim=True, **settings).next(step)
        for a, b in zip(wide.micro, narrow.micro, strict=True):
            width = b.ids.shape[1]
            assert width % 64 == 0 and torch.equal(a.ids[:, :width], b.ids) and not a.segments[:, width:].any()
            assert width - 64 < int((b.segments > 0).sum(1).max())


def test_a_mixture_keeps_its_weights_and_every_row(tmp_path):
    """Guards against shares that drift, rows of a source that are skipped, and hidden state."""
    a, b = token_folder(tmp_path / "a"), token_folder(tmp_path / "b", [5] * 400, kind="chat", first=20_000)
    parts = {"text": (source(a), 3.0), "chat": (source(b), 1.0)}
    mix = MixSource(parts, seed=5)
    batches = [mix.next(step) for step in range(MIX_BLOCK // 4)]
    rows = [row for batch in batches for row in batch.rows]
    chat = [row for row in rows if int(row[0], 16) >= 20_000]
    assert len(chat) == MIX_BLOCK // 4
    for steps in (0, 7, len(batches), 2 * len(batches) + 3):
        given = [row for step in range(steps) for row in mix.next(step).rows]
        assert mix.drawn(steps) == {"text": len(given) - len(c := [r for r in given if int(r[0], 16) >= 20_000]), "chat": len(c)}
    assert chat == [row for step in range(MIX_BLOCK // 16 + 1) for row in parts["chat"][0].next(step).rows][: len(chat)]
    fresh = MixSource({"text": (source(a), 3.0), "chat": (source(b), 1.0)}, seed=5)
    assert same(fresh.next(200).micro[1], batches[200].micro[1]) and same(mix.next(3).micro[0], batches[3].micro[0])
    assert batches[9].counts["tokens"] == sum(float(m.weights.sum()) for m in batches[9].micro)
    fresh.load_state_dict(json.loads(json.dumps(mix.state_dict())))
    with pytest.raises(ArtifactError, match=r"mix\.chat\.share"):
        MixSource({"text": (source(a), 1.0), "chat": (source(b), 1.0)}, seed=5).load_state_dict(mix.state_dict())
    with pytest.raises(ConfigError, match="different batches"):
        MixSource({"text": (source(a), 1.0), "chat": (source(b, micro_rows=1), 1.0)}, seed=5)
    assert len(mix.describe()) == 3 and len(mix.largest().rows) == 4


def test_fingerprints_tell_data_apart(tmp_path):
    """Guards against a printed fingerprint that says nothing: other data or another seed shows another one, ranks do not."""
    a, b = token_folder(tmp_path / "a"), token_folder(tmp_path / "b", first=2000)
    prints = {s.fingerprint() for s in (source(a), source(b), source(a, seed=2), source(a, world=2))}
    assert len(prints) == 3
    assert source(a).fingerprint() in source(a).describe()[0]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_evaluation_counts_each_target_once(tmp_path, kind):
    """Guards against held-out numbers over windows that overlap or leave gaps, and names the document of each piece."""
    segments = token_folder(tmp_path / "t", kind=kind)
    seen: Counter[int] = Counter()
    for part in eval_batches(segments, row_length=32, stride=16, micro_rows=3):
        batch = part.batch
        for r, of in enumerate(part.segment_of):
            for n, i in enumerate(of, 1):
                at = (batch.segments[r] == n) & (batch.weights[r] > 0)
                seen.update(batch.targets[r][at].tolist())
                assert set(batch.targets[r][at].tolist()) <= set(segments.ids(i).tolist())
    assert sum(seen.values()) == len(seen) == segments.totals["supervised"]
