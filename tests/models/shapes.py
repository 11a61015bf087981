"""Tiny models of every family, as `transformers` configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 4.0, 8.0],
}  # fmt: skip
HALF_LONG = {**LONG, "short_factor": [1.0, 1.2], "long_factor": [2.0, 6.0], "partial_rotary_factor": 0.5}

CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SHAPE},
    "llama-biased-tied": {"model_type": "llama", **SHAPE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama-llama3": {"model_type": "llama", **SHAPE, "rope_parameters": LLAMA3},
    "llama-linear": {"model_type": "llama", **SHAPE, "rope_parameters": LINEAR},
    "llama-yarn": {"model_type": "llama", **SHAPE, "rope_parameters": YARN},
    "mistral": {"model_type": "mistral", **SHAPE, "sliding_window": 7},
    "mistral-whole": {"model_type": "mistral", **SHAPE, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", **{k: v for k, v in SHAPE.items() if k != "head_dim"}},
    "qwen2-window": {"model_type": "qwen2", **SHAPE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": {"model_type": "qwen3", **SHAPE, "head_dim": 16, "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", **SHAPE},
    "gemma2": {"model_type": "gemma2", **SHAPE, "sliding_window": 6, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0},
    "gemma3": {"model_type": "gemma3_text", **SHAPE, "sliding_window": 6, "sliding_window_pattern": 3,
               "query_pre_attn_scalar": 20},
    "gemma3-linear": {"model_type": "gemma3_text", **SHAPE, "sliding_window": 6, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}},
    "phi3": {"model_type": "phi3", **SHAPE, "original_max_position_embeddings": 128},
    "phi3-partial-window": {"model_type": "phi3", **SHAPE, "original_max_position_embeddings": 128, "sliding_window": 9,
                            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "phi3-longrope": {"model_type": "phi3", **SHAPE, "original_max_position_embeddings": 16, "rope_parameters": LONG},
    "phi3-longrope-short": {"model_type": "phi3", **SHAPE, "original_max_position_embeddings": 64, "rope_parameters": HALF_LONG},
    "smollm3": {"model_type": "smollm3", **SHAPE},
    "smollm3-window": {"model_type": "smollm3", **SHAPE, "no_rope_layers": [1, 0, 0, 1], "use_sliding_window": True,
                       "sliding_window": 5},
    "olmo2": {"model_type": "olmo2", **SHAPE},
    "gpt2": {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
             "bos_token_id": 1, "eos_token_id": 2},
    "gpt2-by-layer": {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
                      "n_inner": 40, "scale_attn_by_inverse_layer_idx": True, "bos_token_id": 1, "eos_token_id": 2},
}  # fmt: skip


def reference(case: str | dict[str, Any]) -> Any:
    """A `transformers` model with random weights, norms and biases moved away from their starting values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = dict(CASES[case] if isinstance(case, str) else case)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw), attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.3))
    return model


def written(case: str | dict[str, Any], folder: Path) -> tuple[Any, Path]:
    """The reference model and the folder it was saved to."""
    model = reference(case)
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def reference_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits
