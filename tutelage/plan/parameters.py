"""Parameters of a decoder, counted from its config.json: exact, without building the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tutelage.errors import ConfigError

LOCAL = "sliding_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What differs between families as far as parameters and FLOPs go."""

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True  # three matrices in the feed-forward block, else two
    qk_norm: str = "none"  # none | head (one weight a dimension of a head) | full (one a dimension of the projection)
    layer_norms: int = 2  # in each layer
    norm_bias: bool = False
    learned_positions: bool = False
    tie: bool = False  # the family's default when config.json says nothing
    head_dim: int | None = None  # likewise; None: hidden_size / heads
    window: str = "none"  # which layers see a sliding window: none | all | from_layer | every:N (but each N-th)


FAMILIES: dict[str, Traits] = {
    "llama": Traits(),
    "mistral": Traits(window="all"),
    "qwen2": Traits(qkv_bias=True, window="from_layer"),
    "qwen3": Traits(qk_norm="head", head_dim=128, window="from_layer"),
    "gemma": Traits(tie=True, head_dim=256),
    "gemma2": Traits(layer_norms=4, tie=True, head_dim=256, window="every:2"),
    "gemma3_text": Traits(layer_norms=4, qk_norm="head", tie=True, head_dim=256, window="every:6"),
    "phi3": Traits(window="all"),
    "smollm3": Traits(tie=True),
    "olmo2": Traits(qk_norm="full"),
    "gpt2": Traits(qkv_bias=True, output_bias=True, mlp_bias=True, gated=False, norm_bias=True, learned_positions=True, tie=True),
}
_GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The numbers of a config.json that parameters, FLOPs and memory depend on.

    Example:
        >>> small = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
        ...          "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 768, "tie_word_embeddings": True}
        >>> count(Shape.of({"model_type": "qwen3", **small})).total
        5771264
    """

    traits: Traits
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    context: int  # longest sequence
    tied: bool
    windows: tuple[int | None, ...]  # of each layer: tokens that a token sees, itself included; None: all before it
    outputs: int  # of the head: the vocabulary, or the classes of a classifier
    exact: bool = True  # False: a family that is not in `FAMILIES`, counted as if it were Llama

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From the object of a config.json. Raises `ConfigError` for a key that is missing."""
        config = config.get("text_config") or config
        name = config.get("model_type", "")
        traits = FAMILIES.get(name, FAMILIES["llama"])
        keys = _GPT2_KEYS if name == "gpt2" else {}

        def get(key: str, default: Any = None) -> Any:
            value = config.get(keys.get(key, key))
            value = default if value is None else value
            if value is None:
                raise ConfigError("config.json lacks a key", field=keys.get(key, key), expected="a positive whole number")
            return value

        if name not in FAMILIES:
            config = _renamed(config)
        hidden, heads = get("hidden_size"), get("num_attention_heads")
        layers = get("num_hidden_layers")
        return cls(
            traits=_with_biases(traits, config),
            vocab=get("vocab_size"),
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or traits.head_dim or hidden // heads,
            intermediate=get("intermediate_size", 4 * hidden if name == "gpt2" else None),
            context=get("max_position_embeddings", 1024 if name == "gpt2" else 2048),
            tied=bool(config.get("tie_word_embeddings", traits.tie)),
            windows=_windows(traits, config, layers),
            outputs=len(config.get("id2label", ())) if _classifies(config) else get("vocab_size"),
            exact=name in FAMILIES,
        )


OTHER_NAMES = {
    "hidden_size": ("d_model", "n_embd", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "decoder_layers"),
    "num_attention_heads": ("n_head", "n_heads", "decoder_attention_heads"),
    "intermediate_size": ("ffn_dim", "d_ff", "decoder_ffn_dim", "n_inner"),
}
"""What families that are not ours call the numbers of a shape."""


def _classifies(config: Mapping[str, Any]) -> bool:
    return any(str(name).endswith("Classification") for name in config.get("architectures") or ())


def _renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the usual names. What it does not say is as in most models: counts of such a family are estimates."""
    out = dict(config)
    for key, names in OTHER_NAMES.items():
        if out.get(key) is None:
            out[key] = next((config[n] for n in names if config.get(n)), None)
    out["num_attention_heads"] = out["num_attention_heads"] or 1  # recurrent models have none
    if out["intermediate_size"] is None and out["hidden_size"]:
        out["intermediate_size"] = 4 * out["hidden_size"]
    return out


def _with_biases(traits: Traits, config: Mapping[str, Any]) -> Traits:
    if not (config.get("attention_bias") or config.get("mlp_bias")):
        return traits
    values = {name: getattr(traits, name) for name in Traits.__dataclass_fields__}
    if config.get("attention_bias"):
        values.update(qkv_bias=True, output_bias=True)
    if config.get("mlp_bias"):
        values.update(mlp_bias=True)
    return Traits(**values)


def _windows(traits: Traits, config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    size = config.get("sliding_window")
    off = traits.window == "none" or (traits.window == "from_layer" and not config.get("use_sliding_window"))
    if size is None or off:
        return (None,) * layers
    if config.get("layer_types"):
        return tuple(size if kind == LOCAL else None for kind in config["layer_types"])
    if traits.window == "all":
        return (size,) * layers
    if traits.window == "from_layer":
        first = config.get("max_window_layers", 28)
        return tuple(size if i >= first else None for i in range(layers))
    every = config.get("sliding_window_pattern") or int(traits.window.split(":")[1])
    return tuple(None if (i + 1) % every == 0 else size for i in range(layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Counts of a model's parameters; a tied head is counted once, in `embedding`."""

    embedding: int  # token table, and positions where they are learned
    head: int  # output head where it is not tied
    matrices: int  # of all layers
    vectors: int  # norms and biases

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.matrices + self.vectors

    @property
    def without_embedding(self) -> int:
        """What most scaling laws count: neither token table nor head."""
        return self.matrices + self.vectors


def layer_matrices(s: Shape) -> int:
    """Weights of the matrices of one layer."""
    attention = s.hidden * s.head_dim * (2 * s.heads + 2 * s.kv_heads)
    return attention + (3 if s.traits.gated else 2) * s.hidden * s.intermediate


def layer_vectors(s: Shape) -> int:
    """Norm weights and biases of one layer."""
    t, q, kv = s.traits, s.heads * s.head_dim, s.kv_heads * s.head_dim
    norms = t.layer_norms * s.hidden * (2 if t.norm_bias else 1)
    qk = {"none": 0, "head": 2 * s.head_dim, "full": q + kv}[t.qk_norm]
    biases = t.qkv_bias * (q + 2 * kv) + t.output_bias * s.hidden
    mlp = t.mlp_bias * ((2 if t.gated else 1) * s.intermediate + s.hidden)
    return norms + qk + biases + mlp


def count(s: Shape) -> Parameters:
    """Exact counts."""
    positions = s.context * s.hidden if s.traits.learned_positions else 0
    return Parameters(
        embedding=s.vocab * s.hidden + positions,
        head=0 if s.tied else s.vocab * s.hidden,
        matrices=s.layers * layer_matrices(s),
        vectors=s.layers * layer_vectors(s) + s.hidden * (2 if s.traits.norm_bias else 1),
    )


def count_config(config: Mapping[str, Any]) -> Parameters:
    """Exact counts of the model of a config.json."""
    return count(Shape.of(config))
