"""The output head: chunked loss and gradients equal the plain ones, on both paths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.models import heads
from tutelage.models.heads import LmHead
from tutelage.models.hf.causal import LogitsHead


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CHUNK_LOGITS", 64 * 53)  # several chunks of 64 tokens, the last one short


def data() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [150,16], targets, weights (a third of them 0), output matrix [53,16], bias."""
    g = torch.Generator().manual_seed(0)
    weights = torch.rand(150, generator=g)
    weights[::3] = 0
    targets = torch.randint(53, (150,), generator=g)
    return torch.randn(150, 16, generator=g), targets, weights, torch.randn(53, 16, generator=g), torch.randn(53, generator=g)


def plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    z = (hidden @ weight.t() + (0 if bias is None else bias)) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients(path: str, softcap: float | None, scale: float, with_bias: bool) -> None:
    """Wrong gradients of scale, soft-cap, bias or weights train something else than what is evaluated."""
    hidden, targets, weights, matrix, bias = data()
    h = hidden.clone().requires_grad_()
    head = LmHead(nn.Parameter(matrix.clone()), nn.Parameter(bias.clone()) if with_bias else None, scale, softcap)
    loss = head(h, targets, weights)
    (loss * 0.5).backward()
    doubles = [x.double().requires_grad_() for x in (hidden, matrix, bias)]
    z = plain_logits(doubles[0], doubles[1], doubles[2] if with_bias else None, scale, softcap)
    expected = (F.cross_entropy(z, targets, reduction="none") * weights.double()).sum()
    (expected * 0.5).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    found = [h.grad, head.weight.grad, head.bias.grad if head.bias is not None else None]
    for a, b in zip(found, doubles, strict=True):
        if a is not None:
            torch.testing.assert_close(a.double(), b.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.logits(hidden).double(), z.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logprobs(path: str, softcap: float | None) -> None:
    """Preference and policy objectives differentiate log-probabilities: value and gradients, with a factor for each token."""
    hidden, targets, weights, matrix, _ = data()
    h = hidden.clone().requires_grad_()
    head = LmHead(nn.Parameter(matrix.clone()), None, 1.0, softcap)
    logprobs = head.logprobs(h, targets)
    (logprobs * weights).sum().backward()
    doubles = [x.double().requires_grad_() for x in (hidden, matrix)]
    z = plain_logits(doubles[0], doubles[1], None, 1.0, softcap)
    expected = z.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    (expected * weights).sum().backward()
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip((h.grad, head.weight.grad), doubles, strict=True):
        assert a is not None
        torch.testing.assert_close(a.double(), b.grad, rtol=1e-4, atol=1e-5)


def test_unsupervised_tokens_do_not_count(path: str) -> None:
    """Weight 0 means not there: a NaN in such a hidden state must not reach the loss or a gradient."""
    hidden, targets, weights, matrix, _ = data()
    hidden[weights == 0] = float("nan")
    h = hidden.requires_grad_()
    head = LmHead(nn.Parameter(matrix))
    loss = head(h, targets, weights)
    loss.backward()
    assert torch.isfinite(loss)
    assert h.grad is not None
    assert head.weight.grad is not None
    assert torch.isfinite(head.weight.grad).all()
    assert h.grad[weights == 0].abs().max() == 0


def test_nothing_supervised(path: str) -> None:
    """A micro-batch without supervised tokens gives 0 and zero gradients, not an error in the middle of a run."""
    hidden, targets, weights, matrix, _ = data()
    h = hidden.requires_grad_()
    head = LmHead(nn.Parameter(matrix))
    loss = head(h, targets, torch.zeros_like(weights))
    loss.backward()
    assert loss.item() == 0
    assert h.grad is not None
    assert h.grad.abs().max() == 0


def test_tied_weight_gets_both_gradients(path: str) -> None:
    """A tied matrix is used twice; overwriting instead of adding would lose the embedding's part."""
    _, targets, weights, matrix, _ = data()
    shared = nn.Parameter(matrix.clone())
    head = LmHead(shared)
    ids = targets.roll(1)
    for _ in range(2):
        head(F.embedding(ids, shared), targets, weights).backward()
    double = matrix.double().requires_grad_()
    z = F.embedding(ids, double) @ double.t()
    (2 * (F.cross_entropy(z, targets, reduction="none") * weights.double()).sum()).backward()
    assert shared.grad is not None
    torch.testing.assert_close(shared.grad.double(), double.grad, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in head.named_parameters()] == ["weight"]


def test_evaluation_makes_no_gradients(path: str) -> None:
    """Under no_grad the head must neither keep nor compute gradients, and the loss is the same."""
    hidden, targets, weights, matrix, _ = data()
    head = LmHead(nn.Parameter(matrix))
    trained = head(hidden, targets, weights)
    with torch.no_grad():
        evaluated = head(hidden, targets, weights)
    assert not evaluated.requires_grad
    assert head.weight.grad is None
    torch.testing.assert_close(evaluated, trained, rtol=1e-6, atol=0)


def test_second_backward_is_refused(path: str) -> None:
    """The gradients are handed over once; a silent second use would scale them twice."""
    hidden, targets, weights, matrix, _ = data()
    loss = LmHead(nn.Parameter(matrix))(hidden, targets, weights)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="differentiated once"):
        loss.backward()


def test_large_logits(path: str) -> None:
    """A softmax without its maximum taken off would overflow: losses of hundreds must come out exact, NaN must stay NaN."""
    matrix, hidden = torch.eye(16) * 300, torch.eye(16)
    head = LmHead(nn.Parameter(matrix))
    ones = torch.ones(16)
    assert head(hidden, torch.arange(16), ones).item() == pytest.approx(0, abs=1e-5)
    assert head(hidden, torch.arange(16).roll(1), ones).item() == pytest.approx(16 * 300, rel=1e-6)
    hidden[3, 2] = float("nan")
    assert head(hidden, torch.arange(16), ones).isnan()


def test_target_outside_the_vocabulary_is_an_error(path: str) -> None:
    """The kernel indexes memory with a target: -100 or a wrong vocabulary must be an error, not a read of foreign memory."""
    hidden, targets, weights, matrix, _ = data()
    for wrong in (-100, 53):
        targets[1] = wrong
        with pytest.raises((IndexError, RuntimeError)):
            LmHead(nn.Parameter(matrix))(hidden, targets, weights)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_entropy(path: str, softcap: float | None, scale: float, with_bias: bool) -> None:
    """The bonus for entropy is trained on: value and gradients against dense logits, beside those of log-probabilities."""
    hidden, targets, weights, matrix, bias = data()
    h = hidden.clone().requires_grad_()
    head = LmHead(nn.Parameter(matrix.clone()), nn.Parameter(bias.clone()) if with_bias else None, scale, softcap)
    logprobs, entropy = head.logprobs_and_entropy(h, targets, temperature=0.7)
    (logprobs * weights + entropy * weights.flip(0)).sum().backward()
    doubles = [x.double().requires_grad_() for x in (hidden, matrix, bias)]
    z = (plain_logits(doubles[0], doubles[1], doubles[2] if with_bias else None, scale, softcap) / 0.7).log_softmax(1)
    expected = z.gather(1, targets[:, None]).squeeze(1), -(z.exp() * z).sum(1)
    (expected[0] * weights + expected[1] * weights.flip(0)).sum().backward()
    for found, wanted in zip((logprobs, entropy), expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip((h.grad, head.weight.grad, None if head.bias is None else head.bias.grad), doubles, strict=True):
        if a is not None:
            torch.testing.assert_close(a.double(), b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_log_probabilities_and_entropy_are_differentiated_apart(path: str, which: int) -> None:
    """Guards the short ways that the backward pass takes when one of the two is only measured."""
    hidden, targets, weights, matrix, _ = data()
    h = hidden.clone().requires_grad_()
    head = LmHead(nn.Parameter(matrix.clone()))
    (head.logprobs_and_entropy(h, targets)[which] * weights).sum().backward()
    doubles = [x.double().requires_grad_() for x in (hidden, matrix)]
    z = (doubles[0] @ doubles[1].t()).log_softmax(1)
    ((z.gather(1, targets[:, None]).squeeze(1), -(z.exp() * z).sum(1))[which] * weights).sum().backward()
    for a, b in zip((h.grad, head.weight.grad), doubles, strict=True):
        assert a is not None
        torch.testing.assert_close(a.double(), b.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.entropy(hidden), head.logprobs_and_entropy(hidden, targets)[1])


def test_entropy_of_certain_and_of_all_tokens(path: str) -> None:
    """Guards 0 * log 0: a certain token has entropy 0, tokens that are all alike log V; NaN stays NaN."""
    head = LmHead(nn.Parameter(torch.eye(16) * 300))
    certain, even = head.entropy(torch.eye(16)), head.entropy(torch.zeros(1, 16))
    torch.testing.assert_close(certain, torch.zeros(16), atol=1e-5, rtol=0)
    assert even.item() == pytest.approx(torch.tensor(16.0).log().item(), rel=1e-6)
    assert head.entropy(torch.full((1, 16), float("nan"))).isnan().all()
    assert len(head.entropy(torch.zeros(0, 16))) == 0


def test_a_head_of_whole_logits_gives_the_same() -> None:
    """Models of `transformers` whose head is more than a product have their own: guards two definitions that drift apart."""
    hidden, targets, _, matrix, _ = data()
    dense, ours = LogitsHead(), LmHead(nn.Parameter(matrix))
    expected = ours.logprobs_and_entropy(hidden, targets, temperature=2.0)
    for a, b in zip(dense.logprobs_and_entropy(hidden @ matrix.t(), targets, temperature=2.0), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dense.entropy(hidden @ matrix.t()), ours.entropy(hidden), rtol=1e-5, atol=1e-5)
