"""The shape of a decoder, read from and written to a Hugging Face config.json. Imports without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tutelage.errors import ArtifactError
from tutelage.models import families
from tutelage.models.families import Family
from tutelage.plan.config_json import check_types

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
LOCAL, GLOBAL = "sliding_attention", "full_attention"
_ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
_SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip


@dataclass(slots=True, frozen=True, kw_only=True)
class Rope:
    """Rotary positions of one kind of layer."""

    theta: float  # base of the wavelengths
    width: int  # dimensions of a head that turn; the others stay
    kind: str = "default"  # default | linear | llama3 | yarn | longrope
    scaling: dict[str, Any] = field(default_factory=dict)  # the kind's own numbers, under Hugging Face's names


@dataclass(slots=True, frozen=True)
class LayerKind:
    """What differs between the layers of one model."""

    window: int | None  # tokens a token sees, itself included; None: all before it
    rope: str | None  # key of DecoderConfig.ropes; None: no rotary positions here


@dataclass(slots=True, frozen=True, kw_only=True)
class DecoderConfig:
    """Everything that the decoder needs to know. Code branches on these fields, never on the family's name.

    Example:
        >>> shape = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        ...          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        >>> DecoderConfig.from_hf({"model_type": "qwen3", **shape}).qk_norm
        'head'
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    initializer_range: float  # standard deviation of new weights
    norm: str  # rms | layer
    norm_eps: float
    norm_unit_offset: bool
    norms: dict[str, str | None]  # attention_in, attention_out, mlp_in, mlp_out -> module name
    activation: str
    gated: bool
    mlp_bias: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: str  # none | head | full
    attention_scale: float  # factor of the scores
    scale_by_layer: bool
    attention_softcap: float | None
    logit_softcap: float | None
    embedding_scale: float
    learned_positions: bool
    layers: tuple[LayerKind, ...]
    ropes: dict[str, Rope]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # any of these ends a text
    pad_token_id: int | None
    source: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # config.json as it was read

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], file: Path | None = None) -> DecoderConfig:
        """From the object of a config.json, or from a shape with a `model_type`; keys left out take the family's defaults.

        Raises ArtifactError for a missing or wrong key, and for what `unsupported` names; `file` is named in it.
        """
        check_types(raw, file)
        reason = unsupported(raw)
        if reason is not None:
            raise ArtifactError(f"our decoder does not run this model: {reason}", file=file)
        return _Reader(raw, families.family(raw["model_type"]), file).config()

    def to_hf(self) -> dict[str, Any]:
        """The object of a config.json for `transformers` 5, with both the older and the new rotary keys."""
        return _write(self, families.family(self.model_type))

    def with_tokens(self, *, bos: int | None, eos: tuple[int, ...], pad: int | None) -> DecoderConfig:
        """A copy with the special tokens of another tokenizer."""
        return dataclasses.replace(self, bos_token_id=bos, eos_token_ids=eos, pad_token_id=pad)

    def with_vocabulary(self, size: int) -> DecoderConfig:
        """A copy with another number of embeddings."""
        return dataclasses.replace(self, vocab_size=size)


def unsupported(raw: Mapping[str, Any]) -> str | None:
    """Why our decoder can't run the model of this config.json, or None when it can."""
    name = raw.get("model_type")
    if name not in families.names():
        return f"model_type {name!r} is not one of {', '.join(families.names())}"
    own = families.family(name)
    if raw.get("quantization_config"):
        return "its weights are quantized (quantization_config)"
    for key in ("use_bidirectional_attention", "add_cross_attention"):
        if raw.get(key):
            return f"{key} is set"
    activation = _activation(raw, own)
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"
    for row in _rope_rows(raw, own).values():
        if row["rope_type"] not in ROPE_KINDS:
            return f"rope_type {row['rope_type']!r} is not one of {', '.join(ROPE_KINDS)}"
    return None


def check_vocabulary(config: Any, tokenizer_size: int, file: Path | None = None) -> None:
    """Raises ArtifactError when a tokenizer can give ids that the model of `config` has no embedding for."""
    if tokenizer_size > config.vocab_size:
        raise ArtifactError(
            "the tokenizer has more tokens than the model has embeddings", file=file, field="vocab_size",
            found=tokenizer_size, expected=f"at most {config.vocab_size} tokens (vocab_size in the model's config.json)",
            fix="use the tokenizer that the model was trained with",
        )  # fmt: skip


def _activation(raw: Mapping[str, Any], own: Family) -> Any:
    trait = str(own.traits["activation"])
    value = _look(raw, own, trait[1:]) if trait.startswith("$") else trait
    return own.activations.get(value, value)


def _look(raw: Mapping[str, Any], own: Family, key: str) -> Any:
    return raw[key] if key in raw else own.defaults.get(key)


def _rope_rows(raw: Mapping[str, Any], own: Family) -> dict[str, dict[str, Any]]:
    """Rotary parameters by kind of layer, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    if own.ropes == "learned":
        return {}
    given, scaling = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    kinds = (GLOBAL, LOCAL) if own.ropes == "per_window" or GLOBAL in given or LOCAL in given else (GLOBAL,)
    rows = {}
    for kind in kinds:
        local = own.ropes == "per_window" and kind == LOCAL
        row = {**(given.get(kind) or {}), **({} if local else scaling)} if len(kinds) > 1 else dict(scaling or given)
        row["rope_type"] = row.pop("type", None) or row.get("rope_type") or "default"
        if row["rope_type"] == "su":  # the name that the first Phi-3 releases gave it
            row["rope_type"] = "longrope"
        row.setdefault("rope_theta", _look(raw, own, "rope_local_base_freq" if local else "rope_theta"))
        row.setdefault("partial_rotary_factor", _look(raw, own, "partial_rotary_factor") or 1.0)
        rows[kind] = row
    return rows


class _Reader:
    """One config.json being read."""

    def __init__(self, raw: Mapping[str, Any], own: Family, file: Path | None) -> None:
        self.raw, self.own, self.file = dict(raw), own, file

    def config(self) -> DecoderConfig:
        shape = self.shape()
        trait = {name: self.value(v) for name, v in self.own.traits.items()}
        scalar = trait["query_scalar"] or shape["head_dim"]
        eos = _look(self.raw, self.own, "eos_token_id")
        return DecoderConfig(
            model_type=self.own.name,
            **shape,
            tie_word_embeddings=bool(_look(self.raw, self.own, "tie_word_embeddings")),
            initializer_range=float(_look(self.raw, self.own, "initializer_range")),
            norm=trait["norm"],
            norm_eps=float(trait["norm_eps"]),
            norm_unit_offset=trait["norm_unit_offset"],
            norms=dict(self.own.norms),
            activation=_activation(self.raw, self.own),
            gated=trait["gated"],
            mlp_bias=bool(trait["mlp_bias"]),
            qkv_bias=bool(trait["qkv_bias"]),
            output_bias=bool(trait["output_bias"]),
            qk_norm=trait["qk_norm"],
            attention_scale=float(scalar) ** -0.5 if trait["scale_scores"] else 1.0,
            scale_by_layer=bool(trait["scale_by_layer"]),
            attention_softcap=trait["attention_softcap"],
            logit_softcap=trait["logit_softcap"],
            embedding_scale=shape["hidden_size"] ** 0.5 if trait["scale_embeddings"] else 1.0,
            learned_positions=self.own.ropes == "learned",
            layers=self.layers(shape["num_hidden_layers"]),
            ropes=self.ropes(shape),
            bos_token_id=_look(self.raw, self.own, "bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),),
            pad_token_id=_look(self.raw, self.own, "pad_token_id"),
            source=self.raw,
        )

    def value(self, trait: Any) -> Any:
        return _look(self.raw, self.own, trait[1:]) if isinstance(trait, str) and trait.startswith("$") else trait

    def shape(self) -> dict[str, int]:
        out: dict[str, Any] = {name: self.number(name) for name in _SHAPE}
        heads = out["num_attention_heads"] or 1
        fallbacks = {"num_key_value_heads": heads, "head_dim": (out["hidden_size"] or 0) // heads}
        if not self.own.traits["gated"]:
            fallbacks["intermediate_size"] = 4 * (out["hidden_size"] or 0)
        for name in _SHAPE:
            value = out[name] if out[name] is not None else fallbacks.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise self.wrong(name, value, "a whole number above 0")
            out[name] = value
        if out["num_attention_heads"] % out["num_key_value_heads"]:
            divisor = f"a divisor of num_attention_heads ({out['num_attention_heads']})"
            raise self.wrong("num_key_value_heads", out["num_key_value_heads"], divisor)
        if out["head_dim"] % 2 and self.own.ropes != "learned":
            raise self.wrong("head_dim", out["head_dim"], "an even number: rotary positions turn pairs")
        return out

    def number(self, name: str) -> Any:
        """A shape under the family's key, or under ours."""
        key = self.own.keys.get(name, name)
        if key is None:
            return None
        return self.raw.get(key, self.raw.get(name, self.own.defaults.get(key)))

    def wrong(self, name: str, found: Any, expected: str) -> ArtifactError:
        key = self.own.keys.get(name) or name
        return ArtifactError(
            f"the model's configuration does not fit ({self.own.name})", file=self.file, field=key,
            found="nothing" if found is None else found, expected=expected,
        )  # fmt: skip

    def layers(self, count: int) -> tuple[LayerKind, ...]:
        turning = self.turning(count)
        window = _look(self.raw, self.own, "sliding_window")
        if self.own.windows == "all":
            local = [True] * count
        else:
            switched = self.own.windows == "every" or _look(self.raw, self.own, "use_sliding_window")
            some = self.own.windows != "none" and window is not None and switched
            local = self.local(count, turning) if some else [False] * count
        two = len(_rope_rows(self.raw, self.own)) > 1
        return tuple(
            LayerKind(window if here else None, (LOCAL if here and two else GLOBAL) if turns else None)
            for here, turns in zip(local, turning, strict=True)
        )

    def turning(self, count: int) -> list[bool]:
        """Which layers have rotary positions."""
        if self.own.ropes == "learned":
            return [False] * count
        if self.own.ropes != "no_rope":
            return [True] * count
        given = self.raw.get("no_rope_layers")
        if given is None:
            interval = _look(self.raw, self.own, "no_rope_layer_interval")
            return [bool((i + 1) % interval) for i in range(count)]
        if len(given) < count:
            raise self.wrong("no_rope_layers", given, f"one entry for each of the {count} layers")
        return [bool(x) for x in given[:count]]

    def local(self, count: int, turning: list[bool]) -> list[bool]:
        """Which layers see a sliding window, where it is not all or none of them."""
        given = self.raw.get("layer_types")
        if given is not None:
            if len(given) != count or not set(given) <= {LOCAL, GLOBAL}:
                raise self.wrong("layer_types", given, f"{count} times {LOCAL} or {GLOBAL}")
            return [kind == LOCAL for kind in given]
        if self.own.windows == "from_layer":
            return [i >= _look(self.raw, self.own, "max_window_layers") for i in range(count)]
        if self.own.windows == "no_rope":
            return [not turns for turns in turning]
        pattern = _look(self.raw, self.own, "sliding_window_pattern")
        return [bool((i + 1) % pattern) for i in range(count)]

    def ropes(self, shape: dict[str, int]) -> dict[str, Rope]:
        out = {}
        for kind, row in _rope_rows(self.raw, self.own).items():
            theta, name = row.pop("rope_theta"), row.pop("rope_type")
            width = int(shape["head_dim"] * row.pop("partial_rotary_factor"))
            if name in ("llama3", "yarn", "longrope"):
                first = _look(self.raw, self.own, "original_max_position_embeddings")
                row["original_max_position_embeddings"] = (
                    first or row.get("original_max_position_embeddings") or shape["max_position_embeddings"]
                )
            for key in _NEEDED.get(name, ()):
                if row.get(key) is None:
                    raise self.wrong(f"rope_parameters.{key}", None, f"a number, for rope_type {name}")
            out[kind] = Rope(theta=float(theta), width=width, kind=name, scaling=row)
        return out


_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


def _write(config: DecoderConfig, own: Family) -> dict[str, Any]:
    out = {k: v for k, v in config.source.items() if k not in _ROPE_KEYS and k not in _SHAPE and k != "transformers_version"}
    for trait in own.traits.values():
        if isinstance(trait, str) and trait.startswith("$") and trait[1:] in own.defaults:
            out.setdefault(trait[1:], own.defaults[trait[1:]])
    out |= {"architectures": [own.architecture], "model_type": own.name}
    for name in _SHAPE:
        key = own.keys.get(name, name)
        plain = name == "head_dim" and own.defaults["head_dim"] is None
        if key is not None and not (plain and config.head_dim == config.hidden_size // config.num_attention_heads):
            out[key] = getattr(config, name)
    eos = config.eos_token_ids
    out |= {
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": config.pad_token_id,
    }
    if own.windows in ("from_layer", "every", "no_rope"):
        out["layer_types"] = [GLOBAL if kind.window is None else LOCAL for kind in config.layers]
    if own.ropes == "no_rope":
        out["no_rope_layers"] = [int(kind.rope is not None) for kind in config.layers]
    return out | _write_ropes(config, own)


def _write_ropes(config: DecoderConfig, own: Family) -> dict[str, Any]:
    rows = {}
    for kind, rope in config.ropes.items():
        rows[kind] = {"rope_type": rope.kind, "rope_theta": rope.theta, **rope.scaling}
        if "partial_rotary_factor" in own.defaults or rope.width != config.head_dim:
            rows[kind]["partial_rotary_factor"] = rope.width / config.head_dim
    if not rows:
        return {}
    main = rows[GLOBAL]
    old = {k: v for k, v in main.items() if k not in ("rope_theta", "partial_rotary_factor")}
    out: dict[str, Any] = {
        "rope_parameters": rows if len(rows) > 1 else main,
        "rope_theta": main["rope_theta"],
        "rope_scaling": None if main["rope_type"] == "default" else old,
    }
    if "partial_rotary_factor" in main:
        out["partial_rotary_factor"] = main["partial_rotary_factor"]
    if own.ropes == "per_window":
        out["rope_local_base_freq"] = rows[LOCAL]["rope_theta"]
    return out
