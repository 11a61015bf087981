"""New models of `transformers`: a configuration from the keys of a config.json, and random weights in its shape."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from tutelage import log
from tutelage.config.base import nearest
from tutelage.errors import ConfigError, MissingExtra

FIELD = "architecture"
TOKENS = tuple(
    f"{name}_token_id" for name in ("bos", "eos", "pad", "sep", "cls", "mask", "decoder_start", "forced_bos", "forced_eos")
)
ROTARY = ("rope_theta", "rope_scaling", "partial_rotary_factor")  # become rope_parameters
# What the library says of a model itself, what only its own loops read, and what is written here whatever is asked for
NOT_SHAPE = frozenset(
    ("_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label", "label2id", "model_type", "num_labels",
     "output_attentions", "output_hidden_states", "problem_type", "return_dict", "torch_dtype", "transformers_version",
     "use_cache")
)  # fmt: skip


def new_config(given: Mapping[str, Any], base: Mapping[str, Any], kind: str) -> Any:
    """The configuration of a new model: `given`, where it says nothing `base`, else its family's own defaults. `kind` is the
    family where `given` names no `model_type`.

    Keys of `base` that the family does not have are left out, and named; those of `given` are errors with the nearest known
    name. Raises `ConfigError`, `MissingExtra`.
    """
    try:
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "a new model of its families") from error
    kind = str(given.get("model_type", kind))
    if kind not in CONFIG_MAPPING:
        near = nearest(kind, list(CONFIG_MAPPING))
        raise ConfigError("transformers knows no such model", field=f"{FIELD}.model_type", found=kind,
                          fix=f"did you mean `{near}`?" if near else None)  # fmt: skip
    known = keys_of(CONFIG_MAPPING[kind])
    for key in given:
        if key not in known and key != "model_type" and not _read_by_hand(CONFIG_MAPPING[kind], key):
            near = nearest(key, sorted(known))
            raise ConfigError(
                f"{kind} has no such key", field=f"{FIELD}.{key}", found=given[key],
                expected=f"one of: {', '.join(sorted(known))}", fix=f"did you mean `{near}`?" if near else None,
            )  # fmt: skip
    if foreign := [key for key in base if key not in known]:
        log.say(f"{kind} has no {', '.join(foreign)}: what is not said of its shape in {FIELD} is as its family has it")
    shape = {**{k: v for k, v in base.items() if k in known}, **{k: v for k, v in given.items() if k != "model_type"}}
    try:
        return AutoConfig.for_model(kind, **shape)
    except Exception as error:  # the library checks types with classes of its own, which changed between releases
        raise _refused(error, shape) from error


def keys_of(config_class: Any) -> set[str]:
    """The keys of a family's config.json that shape a model, other names that it knows for them included."""
    named = {*config_class().to_dict(), *inspect.signature(config_class.__init__).parameters} - {"self", "kwargs"}
    return {*named, *config_class.attribute_map, *TOKENS} - NOT_SHAPE


def _read_by_hand(config_class: Any, key: str) -> bool:
    """Whether a family takes a key that it does not keep, out of the keywords that it did not name: only its source says so."""
    turned = "rope_parameters" in keys_of(config_class) and key in ROTARY
    return key not in NOT_SHAPE and (turned or f'"{key}"' in inspect.getsource(config_class))


def new_weights(auto: Any, config: Any) -> Any:
    """A model of the class that `auto` chooses, random. Raises `ConfigError` for numbers that do not go together."""
    try:
        return auto.from_config(config)
    except Exception as error:  # families say it with whatever error they run into
        raise _refused(error, config.to_diff_dict()) from error


def _refused(error: Exception, shape: Mapping[str, Any]) -> ConfigError:
    said = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(f"transformers makes no such model ({said})", field=FIELD, found=dict(shape))
