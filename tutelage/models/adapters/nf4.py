"""NF4: 4-bit weights whose 16 values are quantiles of a normal distribution, in blocks of 64 with a scale each (QLoRA, Dettmers
et al. 2023, arXiv:2305.14314). Codes and scales are those of `bitsandbytes`, bit for bit; its code is used on a GPU where it is
installed. Half a byte a weight, and one for each sixteen as scales.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

BLOCK = 64
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The quantiles, as published with the paper."""


@torch.no_grad()
def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n/2] uint8, two a byte, the first in the upper half; and the largest value of each block, [n/64] float32."""
    flat = weight.reshape(-1).float()
    missing = -len(flat) % BLOCK
    blocks = torch.cat((flat, flat.new_zeros(missing))).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / largest.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    values = torch.tensor(VALUES, device=flat.device)
    codes = torch.bucketize(scaled, (values[1:] + values[:-1]) / 2).to(torch.uint8).view(-1, 2)
    packed = (codes[:, 0] << 4) | codes[:, 1]
    return packed[: -(-weight.numel() // 2)].clone(), largest


def dequantize(packed: Tensor, largest: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weights that codes and scales stand for."""
    if packed.is_cuda and _has_bitsandbytes():
        return torch.ops.bitsandbytes.dequantize_4bit(packed[:, None], largest, BLOCK, "nf4", shape, dtype)
    count = shape.numel()
    flat = nn.functional.embedding(packed.int(), _pairs(packed.device)).view(-1)
    missing = -len(flat) % BLOCK
    if missing:
        flat = torch.cat((flat, flat.new_zeros(missing)))
    return (flat.view(-1, BLOCK) * largest[:, None]).view(-1)[:count].view(shape).to(dtype)


@cache
def _pairs(device: torch.device) -> Tensor:
    """[256,2]: the two values of every byte."""
    values = torch.tensor(VALUES)
    byte = torch.arange(256)
    return torch.stack((values[byte >> 4], values[byte & 15]), 1).to(device)


@cache
def _has_bitsandbytes() -> bool:
    if find_spec("bitsandbytes") is None:
        return False
    import bitsandbytes  # noqa: F401 (registers its operators)

    return True


class Packed(nn.Module):
    """A weight in NF4. Its tensors are no parameters: nothing trains or stores them."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        codes, largest = quantize(weight)
        self.shape, self.dtype = weight.shape, weight.dtype
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("largest", largest, persistent=False)

    def whole(self) -> Tensor:
        assert isinstance(self.codes, Tensor) and isinstance(self.largest, Tensor)
        return dequantize(self.codes, self.largest, self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        assert isinstance(self.codes, Tensor) and isinstance(self.largest, Tensor)
        return self.codes.nbytes + self.largest.nbytes
