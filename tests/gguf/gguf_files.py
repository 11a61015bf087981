"""A small writer of GGUF files, and of the models of Hugging Face folders as GGUF. It shares no code with the reader."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "BF16": 30}
LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
NAMES = {"gemma3_text": "gemma3"}


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(x: Any) -> bytes:
    """A metadata value with its type. Whole numbers are uint32, in lists int32."""
    if isinstance(x, bool):
        return struct.pack("<I?", 7, x)
    if isinstance(x, int):
        return struct.pack("<II", 4, x)
    if isinstance(x, float):
        return struct.pack("<If", 6, x)
    if isinstance(x, str):
        return struct.pack("<I", 8) + text(x)
    if not x or isinstance(x[0], str):
        return struct.pack("<IIQ", 9, 8, len(x)) + b"".join(map(text, x))
    form = "i" if isinstance(x[0], int) else "f"
    return struct.pack("<IIQ", 9, 5 if form == "i" else 6, len(x)) + struct.pack(f"<{len(x)}{form}", *x)


def write(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], int, bytes]], version: int = 3
) -> Path:
    """A file of tensors (shape, number of the type, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(k) + value(v) for k, v in metadata.items())
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def plain(x: torch.Tensor, kind: str = "F32") -> tuple[tuple[int, ...], int, bytes]:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    return tuple(x.shape), NUMBERS[kind], bytes(x.to(dtype).contiguous().view(torch.uint8).numpy())


def byte_tokens() -> dict[str, Any]:
    """The metadata of a tokenizer with one token for each byte, two merges and two control tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["a b", "ab c"]
    tokens = ["<|endoftext|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ab", "abc"]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(tokens) - 2)], "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
    }  # fmt: skip


def tiny(path: Path, tokens: Mapping[str, Any] | None = None, **changed: Any) -> Path:
    """A Llama with one layer, all of its weights small and different. `changed`: keys of its metadata (`__` for a dot)."""
    words = dict(tokens or byte_tokens())
    size, width = len(words["tokenizer.ggml.tokens"]), 16
    draw = torch.Generator().manual_seed(1)
    shapes = {"token_embd": (size, width), "output_norm": (width,)} | {
        f"blk.0.{name}": shape
        for name, shape in {
            "attn_norm": (width,), "attn_q": (width, width), "attn_k": (8, width), "attn_v": (8, width),
            "attn_output": (width, width), "ffn_norm": (width,), "ffn_gate": (32, width), "ffn_up": (32, width),
            "ffn_down": (width, 32),
        }.items()
    }  # fmt: skip
    tensors = {f"{name}.weight": plain(torch.randn(shape, generator=draw) * 0.3) for name, shape in shapes.items()}
    metadata = {
        "general.architecture": "llama", "llama.context_length": 64, "llama.embedding_length": width, "llama.block_count": 1,
        "llama.feed_forward_length": 32, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0, **words,
    }  # fmt: skip
    return write(path, metadata | {k.replace("__", "."): v for k, v in changed.items()}, tensors)


def of_folder(folder: Path, path: Path, kind: str = "F32") -> Path:
    """The model of a Hugging Face folder as llama.cpp's converter writes it."""
    raw = json.loads((folder / "config.json").read_text())
    name = NAMES.get(raw["model_type"], raw["model_type"])
    tensors = {}
    for found, x in load_file(folder / "model.safetensors").items():
        ours = _name(found, name)
        if name == "llama" and ("q_proj" in found or "k_proj" in found):
            heads = raw["num_attention_heads"] if "q_proj" in found else raw["num_key_value_heads"]
            x = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        if name.startswith("gemma") and found.endswith("norm.weight"):
            x = x + 1
        tensors[ours] = plain(x, kind if x.ndim > 1 else "F32")
    if factors := _llama3_factors(raw):
        tensors["rope_freqs.weight"] = plain(torch.tensor(factors))
    return write(path, _metadata(raw, name) | _numbered_tokens(raw), tensors)


def _name(found: str, family: str) -> str:
    module, _, kind = found.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    four = family in ("gemma2", "gemma3")
    norms = {
        "post_attention_layernorm": "post_attention_norm" if four else "ffn_norm",
        "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
    }  # fmt: skip
    return f"blk.{layer}.{(LAYER | norms)[part]}.{kind}"


def _metadata(raw: dict[str, Any], name: str) -> dict[str, Any]:
    heads = raw["num_attention_heads"]
    width = raw.get("head_dim") or raw["hidden_size"] // heads
    scaling = raw.get("rope_parameters") or {}
    main = scaling.get("full_attention", scaling)
    out: dict[str, Any] = {
        "context_length": raw["max_position_embeddings"], "embedding_length": raw["hidden_size"],
        "block_count": raw["num_hidden_layers"], "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": heads, "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.key_length": width, "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": raw["rms_norm_eps"],
        "rope.freq_base": float(main.get("rope_theta", raw.get("rope_theta", 10000.0))),
    }  # fmt: skip
    if main.get("rope_type") in ("linear", "yarn"):
        out |= {"rope.scaling.type": main["rope_type"], "rope.scaling.factor": main["factor"]}
        if main["rope_type"] == "yarn":
            out["rope.scaling.original_context_length"] = main["original_max_position_embeddings"]
    softcaps = ("attn_logit_softcapping", "final_logit_softcapping")
    for key, theirs in ((softcaps[0],) * 2, (softcaps[1],) * 2, ("sliding_window", "attention.sliding_window")):
        if name in ("gemma2", "gemma3") and raw.get(key):
            out[theirs] = raw[key]
    return {"general.architecture": name, **{f"{name}.{k}": v for k, v in out.items()}}


def _llama3_factors(raw: dict[str, Any]) -> list[float]:
    """What frequencies are divided by, got from those of `transformers`."""
    scaling = raw.get("rope_parameters") or {}
    if scaling.get("rope_type") != "llama3":
        return []
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.for_model(**raw)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    bare = 1.0 / scaling["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    return (bare / scaled).tolist()


def _numbered_tokens(raw: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer of as many tokens as the model has embeddings."""
    tokens = ["<pad>", "<s>", "</s>", *(chr(0x4E00 + i) for i in range(raw["vocab_size"] - 3))]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (len(tokens) - 3)], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.padding_token_id": 0,
    }  # fmt: skip
