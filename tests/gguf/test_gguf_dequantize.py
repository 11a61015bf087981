"""Packed values, to the bit those of the `gguf` package."""

from __future__ import annotations

import hashlib
import importlib.util

import numpy as np
import pytest
import torch

from tutelage.gguf.blocks import BLOCKS
from tutelage.gguf.dequantize import UNPACK, dequantize

# SHA-256, first 16 digits, of what gguf 0.19.0 makes of `_blocks`; NaN counts as 0.
RECORDED = {
    "F32": "81831c86a6161e40",
    "F16": "bd581662c8177dff",
    "BF16": "b174ad6af1a15d8c",
    "Q4_0": "b32a5e87b52b7d5d",
    "Q4_1": "691b53142b64af3d",
    "Q5_0": "58afc04eeff8d7b0",
    "Q5_1": "603ccaa8e10c00fb",
    "Q8_0": "3f4a799b8be35b21",
    "Q4_K": "12882d774f11b56f",
    "Q5_K": "91db580374f6480f",
    "Q6_K": "cb66191705b70b7d",
}


def _blocks(number: int) -> np.ndarray:
    """Random bytes of more values than are unpacked together: every pattern of bits, infinite scales too."""
    kind = BLOCKS[number]
    return np.random.default_rng(number).integers(0, 256, kind.bytes_of((1 << 18) + 5 * 256), dtype=np.uint8)


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=np.inf, neginf=-np.inf).tobytes()).hexdigest()[
        :16
    ]


@pytest.mark.parametrize("number", BLOCKS, ids=lambda n: BLOCKS[n].name)
def test_values_are_those_that_were_recorded(number: int) -> None:
    """Guards the order of nibbles, the high bits and the order of operations, which decides the last bit."""
    found = dequantize(torch.from_numpy(_blocks(number)), BLOCKS[number]).numpy()
    assert _digest(found) == RECORDED[BLOCKS[number].name]


@pytest.mark.parametrize("number", BLOCKS, ids=lambda n: BLOCKS[n].name)
def test_values_are_those_of_the_gguf_package(number: int) -> None:
    """Guards the record itself, against the package that llama.cpp's own tools use."""
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the gguf package (make test-models, or pip install gguf)")
    import gguf

    raw = _blocks(number)
    with np.errstate(invalid="ignore"):
        wanted = gguf.quants.dequantize(raw[None], gguf.GGMLQuantizationType(number)).reshape(-1).astype(np.float32)
    found = dequantize(torch.from_numpy(raw), BLOCKS[number]).numpy()
    real = ~np.isnan(wanted)
    assert np.array_equal(found.view(np.uint32)[real], wanted.view(np.uint32)[real])
    assert np.isnan(found[~real]).all()


def test_every_type_that_the_reader_takes_is_unpacked() -> None:
    """Guards a type that is added in one place only."""
    assert set(UNPACK) == {kind.name for kind in BLOCKS.values()}
