"""How far a student's next-token distribution q is from a teacher's p, and the slope of that by the student's logits.

- forward KL(p||q): the student covers all that the teacher may say (Hinton et al. 2015, arXiv:1503.02531).
- reverse KL(q||p): it says only what the teacher might (MiniLLM, Gu et al. 2024, arXiv:2306.08543).
- jsd: beta KL(p||m) + (1 - beta) KL(q||m) with m = beta p + (1 - beta) q, between the two (GKD, Agarwal et al. 2024,
  arXiv:2306.13649, equation 1); near forward for a small beta and near reverse for one near 1, each times its small share.

Both distributions are softened by `temperature` first. The result is not multiplied by its square, as in GKD and unlike Hinton's,
so that a high temperature makes it small compared with a cross-entropy.

Shapes: n tokens, V vocabulary, k tokens of the teacher that are known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

LEAST_REST = 1e-8  # probability of all that a teacher's top k leave out, at least: float32 knows no less of 1


@dataclass(slots=True, frozen=True)
class TopTokens:
    """What is known of a teacher whose k likeliest tokens were kept."""

    ids: Tensor  # [n,k] int64, all different
    logprobs: Tensor  # [n,k] float32: of the whole vocabulary, at the temperature of the loss

    def part(self, part: slice) -> TopTokens:
        return TopTokens(self.ids[part], self.logprobs[part])


class Logits(Protocol):
    """A head's `logits`."""

    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(slots=True, frozen=True)
class Teacher:
    """A teacher that runs with the student. Its logits are made for some tokens at a time."""

    head: Logits
    hidden: Tensor  # [n,H']

    def part(self, part: slice) -> Tensor:
        return self.head.logits(self.hidden[part])


@dataclass(slots=True, frozen=True)
class Distillation:
    """(1 - cross_entropy) * divergence + cross_entropy * next-token cross-entropy. The second is
    that of temperature 1."""

    kind: Literal["forward", "reverse", "jsd"] = "forward"
    beta: float = 0.5  # jsd: the teacher's share of the mixture, between 0 and 1
    temperature: float = 1.0
    cross_entropy: float = 0.0  # its share
    rest: Literal["bucket", "renormalise"] = "bucket"  # of a teacher's top k: all other tokens are one; or there are none

    def measure(
        self, z: Tensor, targets: Tensor, teacher: Tensor | TopTokens, slope: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(divergence [n], cross-entropy [n], with `slope` their mixture's gradient [n,V]), from final logits z [n,V] in float32.
        `teacher`: its logits [n,V], or its top tokens."""
        soft = z if self.temperature == 1 else z / self.temperature
        share, logq = self.cross_entropy, z.log_softmax(1)
        entropy = -logq.gather(1, targets[:, None]).squeeze(1)
        if isinstance(teacher, TopTokens):
            distance, dz = self._coarse(soft, teacher, slope)
        else:
            logp = (teacher.float() / self.temperature).log_softmax(1)
            softq = logq if soft is z else soft.log_softmax(1)
            distance, pull = divergence(softq, logp, self.kind, self.beta)
            dz = _through_softmax(softq, pull) if slope else None
        if dz is None:
            return distance, entropy, None
        dz.mul_((1 - share) / self.temperature)
        if share:
            dz.add_(logq.exp_(), alpha=share).scatter_add_(1, targets[:, None], dz.new_full((len(dz), 1), -share))
        return distance, entropy, dz

    def _coarse(self, soft: Tensor, top: TopTokens, slope: bool) -> tuple[Tensor, Tensor | None]:
        """The divergence over the teacher's top tokens, with all others as one more, or as if there were no others."""
        picked = soft.gather(1, top.ids)
        if self.rest == "renormalise":
            logq, logp = picked.log_softmax(1), top.logprobs.log_softmax(1)
            distance, pull = divergence(logq, logp, self.kind, self.beta)
            dz = torch.zeros_like(soft).scatter_(1, top.ids, _through_softmax(logq, pull)) if slope else None
            return distance, dz
        others = soft.scatter(1, top.ids, -math.inf)
        rest = others.logsumexp(1, keepdim=True)
        logq = torch.cat([picked, rest], 1).log_softmax(1)
        left = 1 - top.logprobs.exp().sum(1, keepdim=True)
        logp = torch.cat([top.logprobs, left.clamp_min(LEAST_REST).log()], 1)
        distance, pull = divergence(logq, logp, self.kind, self.beta)
        if not slope:
            return distance, None
        coarse = _through_softmax(logq, pull)
        dz = others.sub_(rest).exp_().mul_(coarse[:, -1:])
        return distance, dz.scatter_(1, top.ids, coarse[:, :-1])


def divergence(logq: Tensor, logp: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence of each row [n] from log-probabilities [n,V], and q times its slope with respect to q [n,V], up to a
    multiple of q, which a softmax takes away."""
    p = logp.exp()
    if kind == "forward":
        return (p * (logp - logq)).sum(1), -p
    q = logq.exp()
    if kind == "reverse":
        pull = q.mul_(logq - logp)
        return pull.sum(1), pull
    assert kind == "jsd", kind
    logm = torch.logaddexp(logp + math.log(beta), logq + math.log1p(-beta))
    pull = q.mul_(logq - logm).mul_(1 - beta)
    return beta * (p * (logp - logm)).sum(1) + pull.sum(1), pull


def _through_softmax(logq: Tensor, pull: Tensor) -> Tensor:
    """Gradient with respect to logits from q times that with respect to q."""
    return pull - logq.exp() * pull.sum(1, keepdim=True)
