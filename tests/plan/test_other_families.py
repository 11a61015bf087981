"""Shapes of families that are not ours: their configs have other names, and a plan must not fail on them."""

from __future__ import annotations

from typing import Any

import pytest

from tutelage.plan.flops import train_flops_per_token
from tutelage.plan.parameters import count_config

SMALL: dict[str, dict[str, Any]] = {
    "OPT": {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128,
            "max_position_embeddings": 64, "word_embed_proj_dim": 64},
    "Bloom": {"vocab_size": 200, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "Mamba": {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2},
    "GPTNeoX": {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256},
    "GPTJ": {"vocab_size": 200, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64},
}  # fmt: skip


@pytest.mark.parametrize("family", SMALL)
def test_a_foreign_config_is_counted(family: str) -> None:
    """Fine-tuning OPT that ends with `config.json lacks a key: intermediate_size`."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**SMALL[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    real = sum(p.numel() for p in model.parameters())
    assert count_config(config.to_dict()).total == pytest.approx(real, rel=0.4)
    assert train_flops_per_token(config.to_dict(), 32) > 0
