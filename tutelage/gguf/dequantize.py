"""The values of packed tensors as float32, equal to the bit to those of `gguf.quants.dequantize`.

Shapes: N blocks, V values in a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tutelage.gguf.blocks import BlockType

CHUNK = 1 << 14
"""Values that are unpacked together: they stay in a core's cache, and are few enough for torch to use one thread. With several,
each of the many small steps waits for all of them, which takes ten times as long on a machine that others use too."""


def dequantize(raw: Tensor, kind: BlockType) -> Tensor:
    """float32 values of the bytes `raw` (uint8, whole blocks), which stay as they are."""
    blocks = raw.view(-1, kind.bytes)
    out = torch.empty(blocks.shape[0] * kind.values)
    unpack, step = UNPACK[kind.name], max(1, CHUNK // kind.values)
    for start in range(0, blocks.shape[0], step):
        part = blocks[start : start + step]
        unpack(part, out[start * kind.values :][: part.shape[0] * kind.values].view(part.shape[0], -1))
    return out


def _halves(blocks: Tensor, start: int) -> Tensor:
    """[N,1] float32: the half-precision number at byte `start` of each block."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _plain(dtype: torch.dtype) -> Callable[[Tensor, Tensor], None]:
    def unpack(blocks: Tensor, out: Tensor) -> None:
        # Copied first: bytes at any place of a file need not be aligned for the wider type.
        out.view(-1).copy_(blocks.clone(memory_format=torch.contiguous_format).view(-1).view(dtype))

    return unpack


def _nibbles(packed: Tensor, out: Tensor) -> None:
    """Low halves of the bytes [N,..,W], then high halves, as numbers into out [N,..,2W]."""
    width = packed.shape[-1]
    out[..., :width].copy_(packed & 15)
    out[..., width:].copy_(packed >> 4)


def _fifth_bits(blocks: Tensor, start: int, out: Tensor) -> None:
    """Adds 16 where the bit of the value, in the 4 bytes from `start`, is set. out [N,32]."""
    bits = (blocks[:, start : start + 4, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    out.add_(bits.flatten(1), alpha=16)


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 2:], out)
    out.sub_(8).mul_(_halves(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 4:], out)
    out.mul_(_halves(blocks, 0)).add_(_halves(blocks, 2))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 6:], out)
    _fifth_bits(blocks, 2, out)
    out.sub_(16).mul_(_halves(blocks, 0))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 8:], out)
    _fifth_bits(blocks, 4, out)
    out.mul_(_halves(blocks, 0)).add_(_halves(blocks, 2))


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_halves(blocks, 0))


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[N,8,1] each: factors and minima of the eight parts of a block, from their 6 bits each in the 12 bytes from byte 4."""
    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), 1)
    minima = torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), 1)
    return (_halves(blocks, 0) * scales)[..., None], (_halves(blocks, 2) * minima)[..., None]


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    scales, minima = _scales_and_minima(blocks)
    _nibbles(blocks[:, 16:].unflatten(1, (4, 32)), out.view(-1, 4, 64))
    out.view(-1, 8, 32).mul_(scales).sub_(minima)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    scales, minima = _scales_and_minima(blocks)
    _nibbles(blocks[:, 48:].unflatten(1, (4, 32)), out.view(-1, 4, 64))
    bits = (blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1
    out.view(-1, 8, 32).add_(bits, alpha=16).mul_(scales).sub_(minima)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    parts = out.view(-1, 2, 128)
    _nibbles(blocks[:, :128].unflatten(1, (2, 64)), parts)
    high = (blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]) & 3
    parts.add_(high.flatten(2), alpha=16).sub_(32)
    scales = _halves(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8)
    out.view(-1, 16, 16).mul_(scales[..., None])


UNPACK: dict[str, Callable[[Tensor, Tensor], None]] = {
    "F32": _plain(torch.float32),
    "F16": _plain(torch.float16),
    "BF16": _plain(torch.bfloat16),
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""By the names in `blocks.BLOCKS`."""
