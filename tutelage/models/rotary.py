"""Rotary positions: frequencies of each kind of scaling, and the cosines and sines of a batch.

Sources: RoPE https://arxiv.org/abs/2104.09864, YaRN https://arxiv.org/abs/2309.00071, LongRoPE https://arxiv.org/abs/2402.13753,
Llama 3.1's scaling as in its model card. Numbers equal those of `transformers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tutelage.models.config import DecoderConfig, Rope

Turns = Mapping[str, tuple[Tensor, Tensor]]
"""By kind of layer: cosines and sines [B,T,R], both halves equal."""


class Rotary:
    """Cosines and sines for the positions of a batch."""

    def __init__(self, config: DecoderConfig) -> None:
        self.ropes = config.ropes
        self._tables: dict[str, tuple[tuple[Tensor, ...], float]] = {}
        self._held: dict[tuple[str, torch.device], list[Tensor]] = {}  # on the devices that asked
        with torch.device("cpu"):  # a model may be built on "meta", where these would have no values
            for kind, rope in config.ropes.items():
                self._tables[kind] = frequencies(rope, config.max_position_embeddings)

    @property
    def steady(self) -> int | None:
        """Tokens up to which a text can grow without another angle for those it has; None for any number."""
        first = [r.scaling["original_max_position_embeddings"] for r in self.ropes.values() if r.kind == "longrope"]
        return int(min(first)) if first else None

    @torch.no_grad()
    def __call__(self, positions: Tensor, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
        """positions [B,T] -> by kind of layer, (cos, sin) [B,T,R] of `dtype`, computed in float32."""
        out = {}
        for kind, (sets, factor) in self._tables.items():
            inverse = self._held.setdefault((kind, positions.device), [])
            if not inverse:
                inverse += [x.to(positions.device) for x in sets]
            chosen = inverse[0]
            if len(inverse) == 2:  # longrope: a row that grows past the first training length turns at the long factors
                first = self.ropes[kind].scaling["original_max_position_embeddings"]
                chosen = torch.where(positions.amax(1)[:, None, None] >= first, inverse[1], inverse[0])
            angles = positions[..., None].float() * chosen
            angles = torch.cat((angles, angles), -1)
            out[kind] = ((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype))
        return out


def frequencies(rope: Rope, longest: int) -> tuple[tuple[Tensor, ...], float]:
    """Radians per position [R/2] (two sets for longrope: short and long), and the factor of the cosines and sines."""
    exponent = torch.arange(0, rope.width, 2, dtype=torch.int64).float() / rope.width
    inverse = 1.0 / (rope.theta**exponent)
    scaling = rope.scaling
    if rope.kind == "linear":
        return (inverse / scaling["factor"],), 1.0
    if rope.kind == "llama3":
        return (_llama3(inverse, scaling),), 1.0
    if rope.kind == "yarn":
        return (_yarn(rope, scaling),), _yarn_factor(scaling)
    if rope.kind == "longrope":
        sets = tuple(1.0 / (torch.tensor(scaling[k]).float() * rope.theta**exponent) for k in ("short_factor", "long_factor"))
        return sets, _longrope_factor(scaling, longest)
    return (inverse,), 1.0


def _llama3(inverse: Tensor, scaling: Mapping[str, float]) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    first = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse
    blend = (first / wavelength - low) / (high - low)
    blended = (1 - blend) * inverse / factor + blend * inverse
    out = torch.where(wavelength > first / low, inverse / factor, blended)
    return torch.where(wavelength < first / high, inverse, out)


def _yarn(rope: Rope, scaling: Mapping[str, float]) -> Tensor:
    first, width = scaling["original_max_position_embeddings"], rope.width

    def dimension(turns: float) -> float:
        """The dimension with that many turns within the original training length."""
        return (width * math.log(first / (turns * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = ((torch.arange(width // 2).float() - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    powers = rope.theta ** (torch.arange(0, width, 2).float() / width)
    return (1.0 / (scaling["factor"] * powers)) * ramp + (1.0 / powers) * (1 - ramp)


def _yarn_factor(scaling: Mapping[str, float]) -> float:
    given, factor = scaling.get("attention_factor"), scaling["factor"]
    if given is not None:
        return float(given)

    def grown(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    own, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return grown(own) / grown(all_dims) if own and all_dims else grown(1.0)


def _longrope_factor(scaling: Mapping[str, float], longest: int) -> float:
    first = scaling["original_max_position_embeddings"]
    given, factor = scaling.get("attention_factor"), scaling.get("factor") or longest / first
    if given is not None:
        return float(given)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(first))
