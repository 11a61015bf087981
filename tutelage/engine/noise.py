"""A draw from each row of scores: the largest once Gumbel noise is added, which is a sample of their softmax.

Noise comes from a counter-based generator, Philox4x32-10 ("Parallel random numbers: as easy as 1, 2, 3", Salmon et al. 2011):
each number is a function of (seed, sample, token index, place in the vocabulary) and of nothing that happened before. The key is
the seed; the counter holds the rest, so no two places share a block's word. On our own kernel (`models/kernels/sample.cpp`) where
`kernels.fits`, else on plain torch: the same integers bit for bit, the same noise to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tutelage.models import kernels
from tutelage.models.kernels import calls

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)  # of the key, from round to round
_BLOCKS, _WORDS = 16, 4  # 64 places take word 0 of 16 blocks, then word 1 of them, and so on: vectors read them side by side

_AT_ONCE = 2**17  # places, so that what is in between stays in the processor's cache: three times faster


def draw(scores: Tensor, top: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
    """A token [S] int64 of each row of scores [S,V], drawn from the softmax of scores / temperature; temperature 0 takes the
    first of the largest. top [S] are the rows' largest scores. keys [S,3] int64: seed (64 bits), sample, token index."""
    if kernels.fits(scores, top, temperature):
        return calls.sample(scores, top, temperature, keys)
    rows = max(1, (_AT_ONCE if scores.device.type == "cpu" else 64 * _AT_ONCE) // scores.shape[1])
    parts = zip(*(x.split(rows) for x in (scores, top[:, None], temperature[:, None], keys)), strict=True)
    return torch.cat([_draw_torch(*part) for part in parts])


def _draw_torch(scores: Tensor, top: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
    greedy = temperature == 0
    scaled = (scores - top) / temperature.masked_fill(greedy, 1.0)
    return (scaled + gumbel(keys, scores.shape[1]).masked_fill_(greedy, 0.0)).argmax(-1)


def gumbel(keys: Tensor, size: int) -> Tensor:
    """Noise [S,size] float32, from -3.13 to 22.88: -ln(-ln(1 - u)) with u = (word + 1/2) / 2^32, which float64 holds exactly."""
    exponential = words(keys, size).double().add_(0.5).mul_(-(2.0**-32)).log1p_().neg_()
    return exponential.float().log_().neg_()


def words(keys: Tensor, size: int) -> Tensor:
    """Random integers [S,size] of 32 bits in int64; keys as in `draw`."""
    seed, sample, token = keys[:, :, None].unbind(1)
    groups = -(-size // (_BLOCKS * _WORDS))
    block = torch.arange(groups * _BLOCKS, device=keys.device)[None]
    out = philox((block, token & _LOW, sample & _LOW, sample >> 32 & _LOW), (seed & _LOW, seed >> 32 & _LOW))
    return torch.stack([w.view(-1, groups, _BLOCKS) for w in out], 2).view(len(keys), -1)[:, :size]


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The four words of each counter (four words) under its key (two); words of 32 bits in int64, of shapes that broadcast."""
    (a, b, c, d), (left, right) = counter, key
    for i in range(10):
        # Of a and c the upper halves are 0. A product of 64 bits may wrap into the sign; its bits are right all the same.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a = (second >> 32 ^ b ^ left + i * _STEPS[0]) & _LOW
        c = (first >> 32 ^ d ^ right + i * _STEPS[1]) & _LOW
        b, d = second, first
    return a, b & _LOW, c, d & _LOW
