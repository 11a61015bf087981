"""Fused operations: our kernels and the torch path against plain formulas in double precision, forward and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.models import kernels, ops


def random(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def same(found: Callable[..., object], expected: Callable[..., object], inputs: list[Tensor]) -> None:
    """Both functions, one in float32 and one in float64, give the same outputs and gradients."""

    def run(function: Callable[..., object], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves)
        parts = list(out) if isinstance(out, tuple) else [out]
        generator = torch.Generator().manual_seed(1)
        total = sum((x * torch.randn(x.shape, generator=generator).to(dtype)).sum() for x in parts)
        return [*parts, *torch.autograd.grad(total, leaves)]

    for a, b in zip(run(found, torch.float32), run(expected, torch.float64), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Rotation of pairs (d, d + half) by angle [B,T,half], as complex numbers; further dimensions stay."""
    half = angle.shape[-1]
    pairs = torch.complex(x[..., :half], x[..., half : 2 * half])
    pairs = pairs * torch.polar(torch.ones_like(angle), angle).to(pairs.dtype)[:, :, None]
    return torch.cat((pairs.real, pairs.imag, x[..., 2 * half :]), -1)


@pytest.mark.parametrize("shape", [(3, 130, 37), (1, 1, 64), (200, 256)])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm(path: str, shape: tuple[int, ...], unit_offset: bool) -> None:
    """Widths beside the vector width, Gemma's weight + 1, and a weight gradient summed over parts of the rows."""
    offset = 1.0 if unit_offset else 0.0
    same(lambda x, w: ops.rms_norm(x, w, 1e-5, unit_offset), lambda x, w: norm(x, w + offset), random(shape, shape[-1:]))


def test_add_rms_norm(path: str) -> None:
    """The gradient of the sum arrives by two ways; losing one would train a network without residuals."""
    same(
        lambda x, r, w: ops.add_rms_norm(x, r, w, 1e-5),
        lambda x, r, w: (norm(x + r, w), x + r),
        random((3, 9, 37), (3, 9, 37), (37,)),
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rotary", [24, 16])
def test_rope(path: str, shared: bool, rotary: int) -> None:
    """Rotary positions of all or part of the dimensions, shared by the rows or not, on strided views."""
    angle = random((1 if shared else 2, 13, rotary // 2))[0]
    both = torch.cat((angle, angle), -1)
    turns = (both[0] if shared else both).cos(), (both[0] if shared else both).sin()

    def ours(merged: Tensor) -> tuple[Tensor, Tensor]:
        q, k = merged.split((4, 2), 2)
        return ops.rope(q, k, *(x.to(merged.dtype) for x in turns))

    same(ours, lambda m: (turned(m[:, :, :4], angle.to(m.dtype)), turned(m[:, :, 4:], angle.to(m.dtype))), random((2, 13, 6, 24)))


def test_qk_norm_rope(path: str) -> None:
    """The norm comes before the rotation, with the weight of its own tensor."""
    angle = random((2, 13, 12))[0]
    both = torch.cat((angle, angle), -1)

    def ours(q: Tensor, k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return ops.qk_norm_rope(q, k, a, b, 1e-5, both.cos().to(q.dtype), both.sin().to(q.dtype))

    def plain(q: Tensor, k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return turned(norm(q, a), angle.to(q.dtype)), turned(norm(k, b), angle.to(q.dtype))

    same(ours, plain, random((2, 13, 4, 24), (2, 13, 2, 24), (24,), (24,)))


def test_silu_mul(path: str) -> None:
    """Gate and up swapped, or a saturated exponential, would show here."""
    same(lambda x: ops.silu_mul(x * 20), lambda x: F.silu(x[..., :37] * 20) * x[..., 37:] * 20, random((3, 70, 74)))


def test_norm_linear(path: str) -> None:
    """The normed rows are made again in the backward pass; each of the joined weights must get its own gradient."""
    same(
        lambda x, n, a, b, c: ops.norm_linear(x, n, 1e-5, [a, b], c),
        lambda x, n, a, b, c: norm(x, n) @ torch.cat((a, b)).t() + c,
        random((3, 20, 37), (37,), (10, 37), (6, 37), (16,)),
    )


def test_norm_linear_frozen(path: str) -> None:
    """With frozen weights (adapters) the input's gradient must still arrive, and frozen tensors get none."""
    x, n, w = random((4, 8), (8,), (3, 8))
    x.requires_grad_()
    ops.norm_linear(x, n, 1e-5, [w]).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    assert w.grad is None


def test_silu_mul_linear(path: str) -> None:
    """The activation is made again in the memory of its own gradient; both must be right."""
    same(
        lambda x, w, b: ops.silu_mul_linear(x, w, b),
        lambda x, w, b: (F.silu(x[..., :37]) * x[..., 37:]) @ w.t() + b,
        random((3, 70, 74), (9, 37), (9,)),
    )


def test_embedding(path: str) -> None:
    """Repeated ids must add up, ids that do not occur stay at 0."""
    ids = torch.tensor([[3, 3, 3, 0], [7, 3, 0, 8]])
    same(lambda w: ops.embedding(ids, w), lambda w: w[ids], random((9, 150)))


def test_non_finite_stays_visible(path: str) -> None:
    """A kernel that swallows NaN would hide a diverged run from its guard."""
    x = torch.ones(2, 64)
    x[1, 3] = float("nan")
    for out in (ops.rms_norm(x, torch.ones(64), 1e-5), ops.silu_mul(x)):
        assert torch.isfinite(out[0]).all()
        assert out[1].isnan().any()
    gate = torch.tensor([[float("inf"), 1.0], [-200.0, 1.0], [200.0, 1.0]])
    torch.testing.assert_close(ops.silu_mul(gate)[:, 0], torch.tensor([float("inf"), 0.0, 200.0]))


def test_same_bits_for_any_number_of_threads() -> None:
    """Weight gradients are sums over rows: added in another order they would break exact resume."""
    if not kernels.available():
        pytest.skip(kernels.why_not())
    x, w = random((700, 48), (48,))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            leaf = w.clone().requires_grad_()
            results.append(torch.autograd.grad(ops.rms_norm(x, leaf, 1e-5).square().sum(), leaf)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])
