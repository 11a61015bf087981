"""Heads: what turns hidden states into losses, logits or log-probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.models import kernels
from tutelage.models.divergence import Distillation, Teacher, TopTokens
from tutelage.models.kernels import calls

CHUNK_LOGITS = 1 << 22
"""Logits held at a time (16 MiB of float32)."""
SEVERAL = 4
"""Matrices of that size that a distillation's chunk holds instead of one: the chunk is so much shorter."""


class LmHead(nn.Module):
    """The output matrix of a language model, fused with its loss: the logits of a whole batch are never held.

    `weight` [V,H] may be the embedding's own parameter (tied). Logits are `scale * (hidden @ weight.T + bias)`, then
    `softcap * tanh(logits / softcap)` where a soft-cap is set.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None = None, scale: float = 1.0, softcap: float | None = None
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.scale, self.softcap = scale, softcap

    def forward(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Sum over tokens of weights[n] * cross-entropy(hidden[n], targets[n]), a float32 scalar.

        hidden [N,H], targets [N], weights [N]. Tokens of weight 0 cost nothing, whatever their hidden state holds.
        """
        picked = weights.nonzero().squeeze(1)
        if len(picked) < len(weights):
            hidden, targets, weights = hidden[picked], targets[picked], weights[picked]
        loss = _LinearLoss.apply(hidden, self.weight, self.bias, targets, weights, self.scale, self.softcap)
        return loss  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., H] -> [.., V]."""
        return _logits(hidden, self.weight, self.bias, self.scale, self.softcap)

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probability of each target: [N,H], [N] -> [N] float32. Differentiable; the backward pass makes the logits again."""
        return _LinearLogprobs.apply(hidden, self.weight, self.bias, targets, self.scale, self.softcap)  # type: ignore[no-any-return]

    def distil(
        self, hidden: Tensor, targets: Tensor, weights: Tensor, teacher: Teacher | TopTokens, how: Distillation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sums over tokens of (the mixture that is trained, its divergence, its cross-entropy); the last two are only
        measured. hidden [N,H], targets [N], weights [N], `teacher` of the same N tokens."""
        return distilled(hidden, self.weight, self.bias, targets, weights, self.scale, self.softcap, teacher, how)

    def logprobs_and_entropy(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability of each target, and the entropy in nats of the distribution that it is drawn from: [N,H], [N] -> two
        [N] float32, from one set of logits that are divided by `temperature`. Differentiable, as `logprobs` is."""
        scale, softcap = self.scale / temperature, None if self.softcap is None else self.softcap / temperature
        return _LinearScores.apply(hidden, self.weight, self.bias, targets, scale, softcap)  # type: ignore[no-any-return]

    def entropy(self, hidden: Tensor) -> Tensor:
        """Entropy in nats of the next token: [N,H] -> [N] float32. Differentiable."""
        return self.logprobs_and_entropy(hidden, torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device))[1]


def distilled(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, targets: Tensor, weights: Tensor, scale: float,
    softcap: float | None, teacher: Teacher | TopTokens, how: Distillation,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `LmHead.distil`. Where `weight` is None `hidden` are the logits themselves."""
    return _Distilled.apply(hidden, weight, bias, targets, weights, scale, softcap, teacher, how)  # type: ignore[no-any-return]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    z = F.linear(hidden, weight, bias)
    if scale != 1.0:
        z = z * scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    return z


def _chunk(hidden: Tensor, weight: Tensor) -> int:
    return max(64, CHUNK_LOGITS // weight.shape[0])


def _loss_and_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of each row [n]; and, given `weights` [n], the gradient of their sum with respect to the raw logits [n,V]."""
    if kernels.fits(hidden, weight, bias):
        raw = F.linear(hidden, weight, bias)
        wanted = None if weights is None else weights.contiguous()
        loss = calls.cross_entropy(raw, targets.contiguous(), wanted, scale, softcap)
        return loss, None if weights is None else raw
    z = _logits(hidden, weight, bias, scale, softcap)
    return _score(z, targets), None if weights is None else _grad_logits(z, targets, weights, scale, softcap)


def _loss_and_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row [n], and the entropy of its distribution [n]."""
    if kernels.fits(hidden, weight, bias):
        return calls.entropy(F.linear(hidden, weight, bias), targets.contiguous(), scale, softcap)
    z = _logits(hidden, weight, bias, scale, softcap)
    return _score(z, targets), _entropy(z.float().log_softmax(1))


def _score(z: Tensor, targets: Tensor) -> Tensor:
    """Minus log-probabilities of `targets` [n], from logits z [n,V] of any float type."""
    return z.float().logsumexp(1) - z.gather(1, targets[:, None]).squeeze(1).float()


def _grad_logits(z: Tensor, targets: Tensor, weights: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Gradient of sum(weights * cross-entropy) with respect to hidden @ weight.T + bias, from final logits z [n,V]."""
    slope = None if softcap is None else 1 - (z / softcap).square()
    p = z.float().softmax(1)
    p.scatter_add_(1, targets[:, None], p.new_full((len(p), 1), -1.0))
    p.mul_(weights[:, None] * scale)
    return p.to(z.dtype) if slope is None else p.to(z.dtype).mul_(slope)


class _Gradients:
    """Gradients of hidden, weight and bias, summed chunk by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]) -> None:
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(weight) if wanted[1] else None
        self.bias = torch.zeros_like(bias) if bias is not None and wanted[2] else None

    def add(self, part: slice, dz: Tensor, hidden: Tensor, weight: Tensor) -> None:
        if not dz.dtype == hidden.dtype == weight.dtype:
            self._add_mixed(part, dz, hidden, weight)
            return
        if self.hidden is not None:
            torch.mm(dz, weight, out=self.hidden[part])
        if self.weight is not None:
            self.weight.addmm_(dz.t(), hidden)
        if self.bias is not None:
            self.bias.add_(dz.sum(0))

    def _add_mixed(self, part: slice, dz: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Under autocast: products in the type of the logits, sums in that of the weights."""
        if self.hidden is not None:
            self.hidden[part] = dz @ weight.to(dz.dtype)
        if self.weight is not None:
            self.weight += dz.t() @ hidden.to(dz.dtype)
        if self.bias is not None:
            self.bias += dz.sum(0)

    def times(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        for x in (self.hidden, self.weight, self.bias):
            if x is not None:
                x.mul_(factor.to(x.dtype))
        return self.hidden, self.weight, self.bias


class _LinearLoss(torch.autograd.Function):
    """Both passes in one: the forward pass also makes the gradients, chunk by chunk, so that no logits are kept."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weights, scale, softcap):  # type: ignore[no-untyped-def]
        wanted = tuple(ctx.needs_input_grad[:3])
        grads = _Gradients(hidden, weight, bias, wanted) if any(wanted) else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for part in _parts(len(hidden), _chunk(hidden, weight)):
            h, y, w = hidden[part], targets[part], weights[part].float()
            loss, dz = _loss_and_gradient(h, weight, bias, y, w if grads is not None else None, scale, softcap)
            total += (loss.double() * w).sum()
            if grads is not None:
                assert dz is not None
                grads.add(part, dz, h, weight)
        ctx.grads = grads
        return total.float()

    @staticmethod
    def backward(ctx, factor):  # type: ignore[no-untyped-def]
        grads, ctx.grads = ctx.grads, None
        assert grads is not None, "the loss of LmHead can be differentiated once; call it again for a second backward pass"
        return *grads.times(factor), None, None, None, None


class _LinearLogprobs(torch.autograd.Function):
    """Log-probabilities; logits are made chunk by chunk, and again in the backward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap):  # type: ignore[no-untyped-def]
        out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for part in _parts(len(hidden), _chunk(hidden, weight)):
            out[part] = -_loss_and_gradient(hidden[part], weight, bias, targets[part], None, scale, softcap)[0]
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.scale, ctx.softcap = scale, softcap
        return out

    @staticmethod
    def backward(ctx, factor):  # type: ignore[no-untyped-def]
        hidden, weight, bias, targets = ctx.saved_tensors
        grads = _Gradients(hidden, weight, bias, tuple(ctx.needs_input_grad[:3]))
        for part in _parts(len(hidden), _chunk(hidden, weight)):
            h, y, w = hidden[part], targets[part], -factor[part]
            _, dz = _loss_and_gradient(h, weight, bias, y, w, ctx.scale, ctx.softcap)
            assert dz is not None
            grads.add(part, dz, h, weight)
        return grads.hidden, grads.weight, grads.bias, None, None, None


class _Distilled(torch.autograd.Function):
    """As `_LinearLoss`, against a teacher's distributions."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weights, scale, softcap, teacher, how):  # type: ignore[no-untyped-def]
        wanted = tuple(ctx.needs_input_grad[:3])
        matrix = hidden.new_empty(hidden.shape[1], 0) if weight is None else weight
        grads = _Gradients(hidden, matrix, bias, wanted) if any(wanted) else None
        sums = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        for part in _parts(len(hidden), max(64, _chunk(hidden, matrix) // SEVERAL)):
            h, y, w = hidden[part], targets[part], weights[part].float()
            z = h if weight is None else _logits(h, weight, bias, scale, softcap)
            distance, entropy, dz = how.measure(z.float(), y, teacher.part(part), grads is not None)
            sums += torch.stack([distance, entropy]).double() @ w.double()
            if grads is None:
                continue
            dz.mul_((w * scale)[:, None])
            if softcap is not None:
                dz.mul_(1 - (z.float() / softcap).square())
            if weight is None:
                grads.hidden[part] = dz  # type: ignore[index]
            else:
                grads.add(part, dz.to(z.dtype), h, weight)
        ctx.grads = grads
        distance, entropy = sums.float()
        ctx.mark_non_differentiable(distance, entropy)
        return ((1 - how.cross_entropy) * sums[0] + how.cross_entropy * sums[1]).float(), distance, entropy

    @staticmethod
    def backward(ctx, factor, *measured):  # type: ignore[no-untyped-def]
        grads, ctx.grads = ctx.grads, None
        assert grads is not None, "the loss of LmHead can be differentiated once; call it again for a second backward pass"
        return *grads.times(factor), None, None, None, None, None, None


class _LinearScores(torch.autograd.Function):
    """Log-probabilities and entropies; logits are made chunk by chunk, and again in the backward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap):  # type: ignore[no-untyped-def]
        logprobs, entropy = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2))
        for part in _parts(len(hidden), _chunk(hidden, weight)):
            loss, entropy[part] = _loss_and_entropy(hidden[part], weight, bias, targets[part], scale, softcap)
            logprobs[part] = -loss
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.scale, ctx.softcap = scale, softcap
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, by_logprobs, by_entropy):  # type: ignore[no-untyped-def]
        if by_entropy is None:
            return _LinearLogprobs.backward(ctx, by_logprobs)
        hidden, weight, bias, targets = ctx.saved_tensors
        grads = _Gradients(hidden, weight, bias, tuple(ctx.needs_input_grad[:3]))
        by_logprobs = torch.zeros_like(by_entropy) if by_logprobs is None else by_logprobs
        for part in _parts(len(hidden), _chunk(hidden, weight)):
            z = _logits(hidden[part], weight, bias, ctx.scale, ctx.softcap)
            dz = _grad_logits(z, targets[part], -by_logprobs[part], ctx.scale, ctx.softcap)
            dz += _grad_entropy(z, by_entropy[part], ctx.scale, ctx.softcap)
            grads.add(part, dz, hidden[part], weight)
        return grads.hidden, grads.weight, grads.bias, None, None, None


def _entropy(logprobs: Tensor) -> Tensor:
    """[n,V] -> [n]."""
    return -(logprobs.exp() * logprobs).sum(1)


def _grad_entropy(z: Tensor, weights: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Gradient of sum(weights * entropy) with respect to raw logits, from final logits z [n,V]: -p * (log p + entropy)."""
    logprobs = z.float().log_softmax(1)
    factor = (weights * -scale)[:, None]
    slope = factor if softcap is None else factor * (1 - (z.float() / softcap).square())
    return (logprobs.exp() * (logprobs + _entropy(logprobs)[:, None]) * slope).to(z.dtype)


def _parts(total: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]
