"""New models: every tensor from its own random stream, so a seed gives the same weights on any machine and device."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from tutelage.models.config import DecoderConfig
from tutelage.models.decoder import Decoder
from tutelage.models.unfilled import unfilled

SCHEMES = {
    "depth": lambda layers: (2 * layers) ** -0.5,  # GPT-2: each of 2 x layers blocks adds its share of variance
    "plain": lambda layers: 1.0,
    "zero": lambda layers: 0.0,  # every layer starts as the identity
}
"""Factor on the projections that write to the residual stream, by scheme."""


def build(
    config: DecoderConfig,
    seed: int,
    *,
    scheme: str = "depth",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """A decoder with new weights: normal with the config's `initializer_range`, norms the identity, biases 0.

    A tensor depends on the seed and its name alone: not on the number of layers, the device or the order of creation.
    """
    factor = SCHEMES[scheme](config.num_hidden_layers)
    with unfilled():
        model = Decoder(config)
    model = model.to(dtype).to_empty(device=device)
    model.tie()
    with torch.no_grad():
        for name, module in model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                if parameter is model.model.embed_tokens.weight and module is model.lm_head:
                    continue
                parameter.copy_(_values(module, f"{name}.{own}", parameter, config, seed, factor))
    return model


def _values(module: nn.Module, name: str, like: Tensor, config: DecoderConfig, seed: int, factor: float) -> Tensor:
    if name.endswith(".bias"):
        return torch.zeros(like.shape)
    if not isinstance(module, nn.Linear | nn.Embedding) and like.ndim == 1:
        identity = 0.0 if config.norm == "rms" and config.norm_unit_offset else 1.0
        return torch.full(like.shape, identity)
    deviation = config.initializer_range * (factor if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
    stream = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(stream)) * deviation
