"""Muon: orthogonal updates, equal to torch's own to the precision of bfloat16."""

from __future__ import annotations

import pytest
import torch

from tutelage.train.muon import Muon, orthogonalise


def matrices(count: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (48, 32), (32, 96)])
def test_singular_values_come_near_one(rows, columns):
    """Guards against an iteration that diverges, or is run on the wrong side of a rectangular matrix; scale does not matter."""
    given = matrices(3, rows, columns)
    u, s, v = torch.linalg.svd(given, full_matrices=False)
    given = u @ torch.diag_embed(torch.linspace(1.0, 0.1, s.shape[1])) @ v  # five iterations lift no value from nearly zero
    for scale in (1e-6, 1.0, 1e4):
        values = torch.linalg.svdvals(orthogonalise(scale * given))
        assert values.min() > 0.6 and values.max() < 1.3


def test_the_direction_is_kept():
    """Guards against losing signs or mixing the matrices of a batch: the result is near U V^T of each."""
    given = matrices(2, 16, 24)
    for x, found in zip(given, orthogonalise(given), strict=True):
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        nearest = u @ v
        assert (found * nearest).sum() / (found.norm() * nearest.norm()) > 0.97
        assert torch.allclose(found, orthogonalise(x[None])[0], atol=1e-5)


def test_a_zero_gradient_gives_no_update():
    """Guards against a division by zero."""
    assert torch.equal(orthogonalise(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


def trained(make, steps: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.nn.Parameter(matrices(1, 24, 40, seed=1)[0])
    start = weight.detach().clone()
    optimizer = make([weight])
    for step in range(steps):
        weight.grad = matrices(1, 24, 40, seed=10 + step)[0]
        optimizer.step()
    return start, weight.detach()


def test_it_is_torchs_muon_in_float32():
    """Guards against another momentum (Nesterov, decayed mean) or weight decay than the method's: after four steps the weights
    are where `torch.optim.Muon` (bfloat16 iteration, same scale of updates) brings them."""
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    start, ours = trained(lambda p: Muon(p, **settings))
    _, theirs = trained(lambda p: torch.optim.Muon(p, **settings, nesterov=True, adjust_lr_fn="match_rms_adamw"))
    one, two = ours - start, theirs - start
    assert (one * two).sum() / (one.norm() * two.norm()) > 0.999
    assert one.norm() / two.norm() == pytest.approx(1.0, abs=0.01)


def test_the_updates_size_is_adamws():
    """Guards against a scale that depends on the shape: the root mean square of a first update is near 0.2 of the rate."""
    for rows, columns in ((16, 64), (64, 16), (32, 32)):
        weight = torch.nn.Parameter(torch.zeros(rows, columns))
        weight.grad = matrices(1, rows, columns)[0]
        Muon([weight], lr=0.1).step()
        assert weight.detach().square().mean().sqrt() / 0.1 == pytest.approx(0.2, rel=0.25)


def test_matrices_of_one_shape_do_not_touch():
    """Guards against products over a batch that mix the parameters of a group."""
    pair = [torch.nn.Parameter(torch.zeros(8, 12)) for _ in range(2)]
    alone = torch.nn.Parameter(torch.zeros(8, 12))
    for p, seed in zip(pair, (1, 2), strict=True):
        p.grad = matrices(1, 8, 12, seed=seed)[0]
    alone.grad = matrices(1, 8, 12, seed=2)[0]
    Muon(pair, lr=0.1).step()
    Muon([alone], lr=0.1).step()
    assert torch.allclose(pair[1], alone, atol=1e-6)
