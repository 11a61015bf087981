"""One tiny decoder for all tests: its shape as a `config.json` would have it, and the model with new weights."""

from __future__ import annotations

from typing import Any

import torch

from tutelage.models.config import DecoderConfig
from tutelage.models.decoder import Decoder
from tutelage.models.init import build

WIDTHS: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "intermediate_size": 48,
}  # fmt: skip


def shape(**change: Any) -> dict[str, Any]:
    """The `config.json` of a Qwen 3 with two layers of width 32, and 320 tokens. It has every key that weights depend on."""
    return {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 320, "max_position_embeddings": 128,
        "tie_word_embeddings": True, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "hidden_act": "silu", **WIDTHS, **change,
    }  # fmt: skip


def config(**change: Any) -> DecoderConfig:
    return DecoderConfig.from_hf(shape(**change))


def model(seed: int = 0, dtype: torch.dtype = torch.float32, **change: Any) -> Decoder:
    return build(config(**change), seed, dtype=dtype)
