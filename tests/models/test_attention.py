"""Attention: our kernel, the torch path and a written-out reference in double precision agree; segments never meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tutelage.models import kernels
from tutelage.models.attention import Layout, attend, attend_cached, attend_qkv, layout

SEGMENTS = [[1] * 50 + [2] * 3 + [3] * 47 + [4] + [0] * 29, [1] * 130]


def reference(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Attention written out with a tokens x tokens mask, in double precision."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    at = torch.arange(q.shape[1])
    seen = (segments[:, :, None] == segments[:, None]) & (segments != 0)[:, :, None] & (at <= at[:, None])
    if window is not None:
        seen &= at > at[:, None] - window
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def tensors(heads: int = 4, kv_heads: int = 2, width: int = 24, length: int = 130, rows: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, length, h, width, generator=generator) for h in (heads, kv_heads, kv_heads)]


def compare(shapes: dict[str, int], segments: Tensor, window: int | None, softcap: float | None) -> None:
    """Result and the gradients of q, k, v against the reference."""
    inputs = [x.requires_grad_() for x in tensors(**shapes)]
    out = attend(*inputs, layout(segments), scale=0.3, window=window, softcap=softcap)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference(*doubles, segments, 0.3, window, softcap)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(out, inputs, grad)
    wanted = torch.autograd.grad(expected, doubles, grad.double())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=3e-5)


def test_layout_of_packed_rows() -> None:
    """A wrong start or end would let a token look into its neighbour's document."""
    where = layout(torch.tensor([[1, 1, 1, 2, 2, 0], [0, 0, 5, 5, 5, 5]], dtype=torch.int32))
    assert where.starts.tolist() == [[0, 0, 0, 3, 3, 6], [6, 6, 2, 2, 2, 2]]
    assert where.ends.tolist() == [[3, 3, 3, 5, 5, 0], [0, 0, 6, 6, 6, 6]]
    assert where.spans.tolist() == [[1, 2, 4], [0, 0, 3], [0, 3, 2]]
    assert not where.is_full
    assert layout(torch.ones(2, 3, dtype=torch.int32)).is_full


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("window", [None, 1, 7, 65, 129])
def test_equals_reference(path: str, window: int | None, softcap: float | None) -> None:
    """Masks off by one at block edges, windows, soft-caps, grouped heads, padding: forward and all three gradients."""
    compare({}, torch.tensor(SEGMENTS, dtype=torch.int32), window, softcap)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(2, 2, 16), (3, 1, 64), (4, 4, 80), (2, 1, 256), (6, 2, 8)])
def test_head_shapes(path: str, heads: int, kv_heads: int, width: int) -> None:
    """Head widths that are no multiple of the vector width, and every kind of head sharing."""
    compare(
        {"heads": heads, "kv_heads": kv_heads, "width": width, "rows": 1},
        torch.tensor(SEGMENTS[:1], dtype=torch.int32),
        None,
        None,
    )


@pytest.mark.parametrize("window", [None, 300])
def test_long_rows(path: str, window: int | None) -> None:
    """Rows longer than one unit of work of the kernel, with and without a window that starts in an earlier unit."""
    compare(
        {"heads": 2, "kv_heads": 1, "width": 16, "rows": 1, "length": 1100}, torch.ones(1, 1100, dtype=torch.int32), window, None
    )


def test_many_lengths(path: str) -> None:
    """Every length from 1 on: tails of tiles, and the groups of the torch path."""
    ids = [n for n in range(1, 40) for _ in range(n)]
    compare({"rows": 1, "length": len(ids), "width": 8}, torch.tensor([ids], dtype=torch.int32), None, None)


def test_other_segments_change_nothing(path: str) -> None:
    """A packing leak: other tokens in another segment must not change one bit, nor may gradients cross."""
    segments = torch.tensor(SEGMENTS, dtype=torch.int32)
    q, k, v = tensors()
    where = layout(segments)
    before = attend(q, k, v, where, scale=0.3)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[0, 50:53] += 1
        x[0, 100:] *= -2
    after = attend(*changed, where, scale=0.3)
    assert torch.equal(before[0, :50], after[0, :50])
    assert torch.equal(before[0, 53:100], after[0, 53:100])
    assert not torch.equal(before[0, 50:53], after[0, 50:53])
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    attend(*leaves, where, scale=0.3)[0, 53:100].sum().backward()
    for x in leaves:
        assert x.grad is not None
        assert x.grad[0, :53].abs().max() == 0
        assert x.grad[0, 100:].abs().max() == 0


def test_packed_equals_alone(path: str) -> None:
    """A document packed behind others must attend as it does alone in a row."""
    segments = torch.tensor(SEGMENTS, dtype=torch.int32)
    q, k, v = tensors()
    packed = attend(q, k, v, layout(segments), scale=0.3, window=20)[0, 53:100]
    own = [x[:1, 53:100] for x in (q, k, v)]
    alone = attend(*own, layout(torch.ones(1, 47, dtype=torch.int32)), scale=0.3, window=20)[0]
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-6)


def test_padding_is_zero(path: str) -> None:
    """Padding must give 0 (not NaN, not what lay in memory), and its gradients too."""
    q, k, v = (x.requires_grad_() for x in tensors())
    out = attend(q, k, v, layout(torch.zeros(2, 130, dtype=torch.int32)), scale=0.3)
    assert torch.equal(out, torch.zeros_like(out))
    out = attend(q, k, v, layout(torch.tensor(SEGMENTS, dtype=torch.int32)), scale=0.3)
    assert out[0, 101:].abs().max() == 0
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad[0, 101:].abs().max() == 0


def test_views_of_a_merged_tensor(path: str) -> None:
    """Strided inputs read as if they were contiguous would give another model."""
    merged = torch.cat(tensors(), 2).requires_grad_()
    where = layout(torch.tensor(SEGMENTS, dtype=torch.int32))
    out = attend(*merged.split((4, 2, 2), 2), where, scale=0.3)
    copies = [x.detach().contiguous().requires_grad_() for x in merged.split((4, 2, 2), 2)]
    expected = attend(*copies, where, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(merged.grad, torch.cat([x.grad for x in copies], 2), rtol=1e-6, atol=1e-6)  # type: ignore[misc]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_stays_visible(path: str, bad: float) -> None:
    """A fast exponential that maps NaN to a number would hide a diverged run from its guard."""
    q, k, v = tensors()
    k[1, 3, 0, 5] = bad
    out = attend(q, k, v, layout(torch.tensor(SEGMENTS, dtype=torch.int32)), scale=0.3)
    assert not torch.isfinite(out[1, 3:, :2]).all()
    assert torch.isfinite(out[0]).all()


def test_same_bits_every_time() -> None:
    """Exact resume needs gradients that do not depend on which thread was faster, nor here on how many there are."""
    if not kernels.available():
        pytest.skip(kernels.why_not())
    where = layout(torch.tensor(SEGMENTS, dtype=torch.int32))
    weight = torch.ones(24, requires_grad=True)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            merged = torch.cat(tensors(), 2).flatten(2).requires_grad_()
            out = attend_qkv(merged, where, (4, 2), scale=0.3, norms=(weight, weight), eps=1e-6)
            results.append((out, *torch.autograd.grad(out.square().sum(), (merged, weight))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_merged_equals_separate(path: str) -> None:
    """Norm and rotation inside the kernel must be those of the separate operations, weight gradients included."""
    where = layout(torch.tensor(SEGMENTS, dtype=torch.int32))
    angle = torch.randn(2, 130, 8, generator=torch.Generator().manual_seed(2)).repeat(1, 1, 2)

    def run(dtype: torch.dtype) -> list[Tensor]:
        merged = torch.cat(tensors(), 2).flatten(2).to(dtype).requires_grad_()
        norms = [torch.linspace(0.5, 1.5, 24, dtype=dtype).requires_grad_() for _ in range(2)]
        turns = (angle.cos().to(dtype), angle.sin().to(dtype))
        kind = {"scale": 0.3, "window": 40, "norms": tuple(norms), "eps": 1e-5, "unit_offset": True, "turns": turns}
        out = attend_qkv(merged, where, (4, 2), **kind)  # type: ignore[arg-type]
        return [out, *torch.autograd.grad(out.square().sum(), (merged, *norms))]

    found, expected = run(torch.float32), run(torch.float64)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("new", [1, 3, 20])
def test_cached_equals_whole(path: str, new: int, window: int | None, softcap: float | None) -> None:
    """Generation must see what training saw: new tokens against a cache give the rows of attention over the whole sequence."""
    lengths = [20, 31, 40]
    q, k, v = tensors(rows=3, length=40)
    knobs = {"scale": 0.3, "window": window, "softcap": softcap}
    whole = reference(q, k, v, torch.ones(3, 40, dtype=torch.int32), **knobs)
    newest = torch.stack([q[s, n - new : n] for s, n in enumerate(lengths)])
    stale_k, stale_v = k.clone(), v.clone()
    for s, n in enumerate(lengths):
        stale_k[s, n:], stale_v[s, n:] = float("nan"), float("nan")  # what an earlier sequence left in the slot
    held = (stale_k.transpose(1, 2).contiguous().transpose(1, 2), stale_v)
    out = attend_cached(newest, *held, torch.tensor(lengths), **knobs)  # type: ignore[arg-type]
    expected = torch.stack([whole[s, n - new : n] for s, n in enumerate(lengths)])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_cached_token_without_keys_is_zero(path: str) -> None:
    """A slot that is idle, or shorter than the new tokens, must not turn the batch into NaN."""
    q, k, v = tensors(rows=2, length=8)
    out = attend_cached(q[:, :3], k, v, torch.tensor([0, 2]), scale=0.3)
    assert out[0].abs().max() == 0
    assert out[1, 0].abs().max() == 0
    assert torch.isfinite(out).all()
    assert out[1, 1:].abs().min() > 0


def test_other_types_take_the_torch_path() -> None:
    """Tensors the kernel does not know must not reach it: their bytes would be read as float32."""
    where = layout(torch.tensor(SEGMENTS, dtype=torch.int32))
    q, k, v = tensors()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 0.05)):
        out = attend(q.to(dtype), k.to(dtype), v.to(dtype), where, scale=0.3)
        assert out.dtype == dtype
        expected = reference(q.to(dtype), k.to(dtype), v.to(dtype), torch.tensor(SEGMENTS), 0.3)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_layout_is_used_by_both_paths() -> None:
    """`starts` is what design.md promises to other users of a Layout; it must describe the same segments as `spans`."""
    where: Layout = layout(torch.tensor(SEGMENTS, dtype=torch.int32))
    for row, start, length in where.spans.tolist():
        assert where.starts[row, start : start + length].eq(start).all()
        assert where.ends[row, start : start + length].eq(start + length).all()
    assert int(where.spans[:, 2].sum()) == int((torch.tensor(SEGMENTS) != 0).sum())
    assert where.shape == (2, 130)
