"""Distillation in the head: chunked values and gradients equal dense ones, whatever is known of the teacher."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tutelage.models import heads
from tutelage.models.divergence import Distillation, Teacher, TopTokens, divergence
from tutelage.models.heads import LmHead
from tutelage.models.hf.causal import LogitsHead

V, N = 53, 150
KINDS = ["forward", "reverse", "jsd"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CHUNK_LOGITS", 64 * V)  # several chunks of 64 tokens, the last one short


def data() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Teacher]:
    """hidden [150,16], targets, weights, output matrix [53,16], bias, and a teacher of another width."""
    g = torch.Generator().manual_seed(0)
    teacher = Teacher(LmHead(nn.Parameter(torch.randn(V, 24, generator=g))), torch.randn(N, 24, generator=g) / 2)
    matrix, bias = torch.randn(V, 16, generator=g), torch.randn(V, generator=g)
    targets, weights = torch.randint(V, (N,), generator=g), torch.rand(N, generator=g)
    return torch.randn(N, 16, generator=g) / 2, targets, weights, matrix, bias, teacher


def by_definition(q: Tensor, p: Tensor, how: Distillation) -> Tensor:
    """The divergence of each row of probabilities."""
    kl = lambda a, b: (a * (a.log() - b.log())).sum(1)  # noqa: E731
    m = how.beta * p + (1 - how.beta) * q
    return {"forward": kl(p, q), "reverse": kl(q, p), "jsd": how.beta * kl(p, m) + (1 - how.beta) * kl(q, m)}[how.kind]


def surprise(z: Tensor, targets: Tensor) -> Tensor:
    return -z.log_softmax(1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("scale", "temperature", "share"), [(1.0, 1.0, 0.0), (0.4, 2.0, 0.3), (1.0, 1.0, 0.6)])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_vocabulary(path: str, kind: str, scale: float, temperature: float, share: float, softcap: float | None) -> None:
    """Wrong slopes of temperature, scale, soft-cap, bias or weights train something else than what is reported."""
    hidden, targets, weights, matrix, bias, teacher = data()
    h = hidden.clone().requires_grad_()
    head = LmHead(nn.Parameter(matrix.clone()), nn.Parameter(bias.clone()), scale, softcap)
    how = Distillation(kind, 0.3, temperature, share)  # type: ignore[arg-type]
    loss, distance, entropy = head.distil(h, targets, weights, teacher, how)
    (loss * 0.5).backward()
    doubles = [x.double().requires_grad_() for x in (hidden, matrix, bias)]
    z = (doubles[0] @ doubles[1].t() + doubles[2]) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    p = (teacher.part(slice(None)).detach().double() / temperature).softmax(1)
    apart = by_definition((z / temperature).softmax(1), p, how), surprise(z, targets)
    each = [(x * weights.double()).sum() for x in apart]
    ((1 - share) * each[0] + share * each[1]).mul(0.5).backward()
    torch.testing.assert_close(loss.double(), (1 - share) * each[0] + share * each[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.stack([distance, entropy]).double(), torch.stack(each), rtol=1e-5, atol=0)
    for a, b in zip((h.grad, head.weight.grad, head.bias.grad), doubles, strict=True):  # type: ignore[union-attr]
        assert a is not None
        torch.testing.assert_close(a.double(), b.grad, rtol=1e-4, atol=1e-5)
    assert not distance.requires_grad
    assert teacher.head.weight.grad is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("rest", ["bucket", "renormalise"])
@pytest.mark.parametrize("kind", KINDS)
def test_top_tokens(path: str, kind: str, rest: str) -> None:
    """Guards against a student that is pushed off tokens of which nothing is known, or gets no gradient for them where their
    common mass is known."""
    hidden, targets, weights, matrix, _, teacher = data()
    how = Distillation(kind, 0.3, 2.0, 0.25, rest)  # type: ignore[arg-type]
    logp, ids = (teacher.part(slice(None)).detach() / 2).log_softmax(1).topk(5)
    h = hidden.clone().requires_grad_()
    head = LmHead(nn.Parameter(matrix.clone()))
    loss, distance, _ = head.distil(h, targets, weights, TopTokens(ids, logp), how)
    loss.backward()
    doubles = [x.double().requires_grad_() for x in (hidden, matrix)]
    z = doubles[0] @ doubles[1].t()
    q, p = (z / 2).softmax(1).gather(1, ids), logp.double().exp()
    if rest == "bucket":
        q, p = (torch.cat([x, 1 - x.sum(1, keepdim=True)], 1) for x in (q, p))
    else:
        q, p = (x / x.sum(1, keepdim=True) for x in (q, p))
    each = (by_definition(q, p, how) * weights.double()).sum()
    (0.75 * each + 0.25 * (surprise(z, targets) * weights.double()).sum()).backward()
    torch.testing.assert_close(distance.double(), each, rtol=1e-5, atol=0)
    for a, b in zip((h.grad, head.weight.grad), doubles, strict=True):
        assert a is not None
        torch.testing.assert_close(a.double(), b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_made_by_hand(kind: str) -> None:
    """Guards the definitions themselves: which side of a KL is the teacher's, and whose share of the mixture beta is."""
    q, p, beta = np.array([0.5, 0.25, 0.25]), np.array([0.7, 0.2, 0.1]), 0.3
    forward, reverse, jsd = 0.0, 0.0, 0.0
    for a, b in zip(p, q, strict=True):
        m = 0.3 * a + 0.7 * b
        forward += a * math.log(a / b)
        reverse += b * math.log(b / a)
        jsd += 0.3 * a * math.log(a / m) + 0.7 * b * math.log(b / m)
    found, _ = divergence(torch.tensor(q)[None].log(), torch.tensor(p)[None].log(), kind, beta)
    assert found.item() == pytest.approx({"forward": forward, "reverse": reverse, "jsd": jsd}[kind], rel=1e-9)
    assert [round(x, 4) for x in (forward, reverse)] == [0.0993, 0.1166]  # on a pocket calculator
    same, _ = divergence(torch.tensor(p)[None].log(), torch.tensor(p)[None].log(), kind, beta)
    assert same.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_distributions(path: str, kind: str) -> None:
    """A teacher that is certain has probabilities of 0, and its top tokens leave less than nothing: no NaN, no infinity."""
    hidden, targets, weights, matrix, _, teacher = data()
    sure = Teacher(teacher.head, teacher.hidden * 200)
    logp, ids = sure.part(slice(None)).detach().log_softmax(1).topk(5)
    for known in (sure, TopTokens(ids, logp)):
        h = (hidden * 50).requires_grad_()
        loss, _, _ = LmHead(nn.Parameter(matrix)).distil(h, targets, weights, known, Distillation(kind))  # type: ignore[arg-type]
        loss.backward()
        assert torch.isfinite(loss)
        assert h.grad is not None
        assert torch.isfinite(h.grad).all()


def test_no_logits_of_the_whole_batch() -> None:
    """Guards the memory: neither model's logits [N,V] are ever held."""
    hidden, targets, weights, matrix, _, teacher = data()
    seen: list[int] = []

    class Watched(LmHead):
        def logits(self, hidden: Tensor) -> Tensor:
            seen.append(len(hidden))
            return super().logits(hidden)

    known = Teacher(Watched(teacher.head.weight), teacher.hidden)  # type: ignore[attr-defined]
    LmHead(nn.Parameter(matrix)).distil(hidden.requires_grad_(), targets, weights, known, Distillation())[0].backward()
    assert seen == [64, 64, 22]


def test_a_model_whose_hidden_states_are_logits() -> None:
    """Models of `transformers` that do more after the last product learn from a teacher all the same."""
    hidden, targets, weights, matrix, _, teacher = data()
    found = []
    for whole in (False, True):
        h = hidden.clone().requires_grad_()
        z = h @ matrix.t()
        how = Distillation("jsd", 0.3, 2.0, 0.25)
        if whole:
            loss = LogitsHead().distil(z, targets, weights, teacher, how)[0]
        else:
            loss = LmHead(nn.Parameter(matrix)).distil(h, targets, weights, teacher, how)[0]
        loss.backward()
        found.append((loss.detach(), h.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_tied_weight_gets_both_gradients(path: str) -> None:
    """A tied matrix is used twice; overwriting instead of adding would lose the embedding's part."""
    _, targets, weights, matrix, _, teacher = data()
    shared = nn.Parameter(matrix.clone())
    ids = targets.roll(1)
    LmHead(shared).distil(nn.functional.embedding(ids, shared), targets, weights, teacher, Distillation())[0].backward()
    double = matrix.double().requires_grad_()
    q = (nn.functional.embedding(ids, double) @ double.t()).softmax(1)
    p = teacher.part(slice(None)).detach().double().softmax(1)
    (by_definition(q, p, Distillation()) * weights.double()).sum().backward()
    assert shared.grad is not None
    torch.testing.assert_close(shared.grad.double(), double.grad, rtol=1e-4, atol=1e-5)
