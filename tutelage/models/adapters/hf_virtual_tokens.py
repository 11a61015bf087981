"""Virtual tokens before the texts of models of `transformers`: the arguments of a forward pass with them, as `peft` makes them.

Shapes: n texts, L tokens of the longest, P virtual tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tutelage.models.adapters.virtual_tokens import VirtualTokens

DECODER_LAYERS = ("num_decoder_layers", "decoder_layers")  # what families of encoder-decoders call it


def prepend_virtual(hf: Any, tokens: VirtualTokens, how: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments `how` of a forward pass, `input_ids` and `attention_mask` [n,L] among them, for texts after virtual tokens.

    Prompt tuning adds P positions to input and output; a prefix lives only in the key-value cache.
    """
    rows = len(how["input_ids"])
    mask = how["attention_mask"]
    out = {**how, "attention_mask": torch.cat((mask.new_ones(rows, len(tokens)), mask), 1)}
    if tokens.is_prefix:
        return out | {"past_key_values": cache_of(hf, tokens, rows)}
    ids = out.pop("input_ids")
    before = tokens.values.to(hf.dtype).expand(rows, -1, -1)
    out["inputs_embeds"] = torch.cat((before, hf.get_input_embeddings()(ids)), 1)
    if "token_type_ids" in out:  # they are of the first text
        types = out["token_type_ids"]
        out["token_type_ids"] = torch.cat((types.new_zeros(rows, len(tokens)), types), 1)
    return out


def cache_of(hf: Any, tokens: VirtualTokens, rows: int) -> Any:
    """A cache in which every row has read a prefix."""
    from transformers import DynamicCache

    cache = DynamicCache(config=hf.config) if _causal(hf) else DynamicCache()
    for layer, (k, v) in enumerate(tokens.keys_and_values(hf.dtype)):
        cache.update(*(x.transpose(0, 1).expand(rows, -1, -1, -1) for x in (k, v)), layer)
    return cache


def _causal(hf: Any) -> bool:
    """Whether the cache is of the model's own layers, which may be of several kinds."""
    return not hf.config.is_encoder_decoder and not is_encoder(hf)


def is_encoder(hf: Any) -> bool:
    """Whether a model reads in both directions."""
    from transformers import AutoModelForMaskedLM

    return type(hf.config) in AutoModelForMaskedLM._model_mapping and not hf.config.is_encoder_decoder


def takes_prefix(hf: Any) -> bool:
    """Whether the layers of an encoder read keys and values before its texts."""
    return "past_key_values" in inspect.signature(hf.base_model.forward).parameters


@contextmanager
def encoder_prefix(hf: Any, tokens: VirtualTokens, rows: int, mask: Tensor) -> Iterator[None]:
    """Inside, the encoder of a classification model gets a prefix, for which the model itself has no argument."""
    more = {
        "attention_mask": torch.cat((mask.new_ones(rows, len(tokens)), mask), 1),
        "past_key_values": cache_of(hf, tokens, rows),
    }
    hook = hf.base_model.register_forward_pre_hook(lambda _, args, how: (args, how | more), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def prefix_shape(hf: Any, config: Any) -> tuple[int, int, int]:
    """Layers, heads and head width of the keys and values of a prefix; of an encoder-decoder those of its decoder."""
    layers = next((n for name in DECODER_LAYERS if (n := getattr(hf.config, name, None))), config.num_hidden_layers)
    heads = getattr(hf.config, "decoder_attention_heads", None) or config.num_key_value_heads
    return int(layers), int(heads), int(config.head_dim)


@torch.no_grad()
def keys_and_values(hf: Any, ids: Tensor) -> Tensor:
    """[P, L*2*Hkv*D] float32: what the model keeps in its cache of the tokens ids [P]; of an encoder-decoder its decoder."""
    from transformers import DynamicCache

    if is_encoder(hf):
        cache: Any = DynamicCache()
        hf.base_model(input_ids=ids[None], past_key_values=cache)
    elif hf.config.is_encoder_decoder:
        cache = hf(input_ids=ids[None], decoder_input_ids=ids[None], use_cache=True).past_key_values.self_attention_cache
    else:
        cache = hf(input_ids=ids[None], use_cache=True).past_key_values
    both = torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers])  # [L,2,Hkv,P,D]
    return both.permute(3, 0, 1, 2, 4).flatten(1).float()
