"""The config.json of a model folder, its values checked by type: what uses them counts on numbers being numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tutelage.errors import ArtifactError, UserError
from tutelage.files import read_object
from tutelage.plan.parameters import FAMILIES

EXPORT_AGAIN = "export or download the model again"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _ids(value: Any) -> bool:
    return _whole(value) or (isinstance(value, list) and all(map(_whole, value)))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_number, value))


Test = tuple[Callable[[Any], bool], str]
SIZE: Test = (lambda value: _whole(value) and value > 0, "a whole number above 0")
MAX_LAYERS = 2048  # several times the deepest model there is; each layer is built before any weight is read
LAYERS: Test = (lambda value: _whole(value) and 0 < value <= MAX_LAYERS, f"a whole number from 1 to {MAX_LAYERS}")
WHOLE: Test = (_whole, "a whole number")
NUMBER: Test = (_number, "a number")
NUMBERS: Test = (_numbers, "a list of numbers")
FLAG: Test = (lambda value: isinstance(value, bool) or (_whole(value) and value in (0, 1)), "true or false")
TEXT: Test = (lambda value: isinstance(value, str), "a text")
TEXTS: Test = (_texts, "a list of texts")
IDS: Test = (_ids, "the number of a token, or a list of them")
OBJECT: Test = (lambda value: isinstance(value, dict), "an object: {…}")
LIST: Test = (lambda value: isinstance(value, list), "a list")

TYPES: dict[str, Test] = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
         "head_dim", "max_position_embeddings", "n_embd", "n_head", "n_positions", "n_inner"), SIZE),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), LAYERS),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_pattern", "max_window_layers", "no_rope_layer_interval",
         "original_max_position_embeddings"), WHOLE),
    **dict.fromkeys(
        ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "rope_theta", "rope_local_base_freq", "partial_rotary_factor",
         "initializer_range", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"), NUMBER),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), FLAG),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), TEXT),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), WHOLE),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), OBJECT),
    "eos_token_id": IDS, "layer_types": TEXTS, "no_rope_layers": LIST,
}  # fmt: skip
"""Keys of the families of ours. null is as if the key were not there."""

OF_ROPE: dict[str, Test] = {
    **dict.fromkeys(("rope_type", "type"), TEXT),
    **dict.fromkeys(
        ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor",
         "partial_rotary_factor", "original_max_position_embeddings"), NUMBER),
    **dict.fromkeys(("short_factor", "long_factor"), NUMBERS),
}  # fmt: skip

OTHER_LAYERS: Test = (lambda value: not _number(value) or value <= MAX_LAYERS, f"a number up to {MAX_LAYERS}")
OF_ALL: dict[str, Test] = {
    **dict.fromkeys(("num_layers", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"), OTHER_LAYERS),
    "architectures": TEXTS, "id2label": OBJECT, "text_config": OBJECT, "quantization_config": OBJECT,
}  # fmt: skip
"""Keys that mean the same in every family. Those of others are checked by `transformers`, but numbers are no texts anywhere."""


def read_config_json(path: Path) -> dict[str, Any]:
    """The object in a model's config.json. Raises `ArtifactError` naming the key whose value is of another type."""
    raw = read_object(path, EXPORT_AGAIN, "an object with a model_type")
    check_types(raw, path)
    return raw


def check_types(raw: Mapping[str, Any], file: Path | None, prefix: str = "", error: type[UserError] = ArtifactError) -> None:
    """Raises `error` for the first value of a config.json that is not of its type."""
    for key, value, (fits, expected) in _checks(raw):
        if value is not None and not fits(value):
            raise error(
                "the model's configuration does not fit: a value of another type or size", file=file, field=prefix + key,
                found=value, expected=expected, fix=EXPORT_AGAIN if file else None,
            )  # fmt: skip


def end_ids(raw: Mapping[str, Any], file: Path) -> tuple[int, ...]:
    """The tokens that end a text by a config.json or generation_config.json. Raises `ArtifactError` for what are no numbers."""
    eos = raw.get("eos_token_id")
    if eos is not None and not IDS[0](eos):
        raise ArtifactError(
            "not the number of a token", file=file, field="eos_token_id", found=eos, expected=IDS[1], fix=EXPORT_AGAIN
        )
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def _checks(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any, Test]]:
    ours = raw.get("model_type") in FAMILIES
    tests = {**OF_ALL, **TYPES} if ours else {**OF_ALL, **{key: _for_others(test) for key, test in TYPES.items()}}
    yield from ((key, raw[key], test) for key, test in tests.items() if key in raw)
    for key in ("rope_parameters", "rope_scaling"):
        if ours and isinstance(raw.get(key), dict):
            yield from _of_rope(f"{key}.", raw[key])
    if isinstance(raw.get("text_config"), dict):
        yield from ((f"text_config.{key}", value, test) for key, value, test in _checks(raw["text_config"]))


def _of_rope(prefix: str, row: Mapping[str, Any]) -> Iterator[tuple[str, Any, Test]]:
    for key, value in row.items():
        if key in OF_ROPE:
            yield prefix + key, value, OF_ROPE[key]
        elif key in ("full_attention", "sliding_attention"):  # one for each kind of layer
            yield prefix + key, value, OBJECT
            if isinstance(value, dict):
                yield from _of_rope(f"{prefix}{key}.", value)


def _for_others(test: Test) -> Test:
    """Other families have lists where ours have numbers, and zeros."""
    if test is LAYERS:
        return (lambda value: isinstance(value, list | dict) or (_number(value) and value <= MAX_LAYERS), OTHER_LAYERS[1])
    if test in (SIZE, WHOLE, NUMBER, IDS):
        return (lambda value: _number(value) or isinstance(value, list | dict), "a number")
    return (lambda value: True, test[1])
