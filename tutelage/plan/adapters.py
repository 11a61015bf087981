"""How many values an adapter trains, from its settings and a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tutelage.config.adapter import Adapter
from tutelage.plan.parameters import Shape

_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "c_fc": ("up_proj",),
    "c_proj": ("o_proj", "down_proj"),
}
"""Layers that some families hold as one, by their names there."""


def linear_widths(s: Shape) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear layers of one layer."""
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    out = {"q_proj": (s.hidden, q), "k_proj": (s.hidden, kv), "v_proj": (s.hidden, kv), "o_proj": (q, s.hidden)}
    if s.traits.gated:
        out["gate_proj"] = (s.hidden, s.intermediate)
    return out | {"up_proj": (s.hidden, s.intermediate), "down_proj": (s.intermediate, s.hidden)}


def adapter_values(shape: Mapping[str, Any], adapter: Adapter) -> int:
    """Values that are trained; of layers that a family fuses slightly more than there are."""
    s = Shape.of(shape)
    tables = s.vocab * s.hidden * (1 if s.tied else 2) if adapter.embeddings else 0
    return _of_layers(s, adapter) + tables


def _of_layers(s: Shape, adapter: Adapter) -> int:
    kind = adapter.kind
    if kind == "prompt":
        return adapter.tokens * s.hidden
    if kind == "prefix":
        return adapter.tokens * s.layers * 2 * s.kv_heads * s.head_dim
    widths = linear_widths(s)
    if kind == "ia3" and adapter.targets == ["derived"]:
        return s.layers * (widths["k_proj"][1] + widths["v_proj"][1] + widths["down_proj"][0])
    chosen = list(widths.values())
    if adapter.targets not in (["derived"], ["all-linear"]):
        names = {n for target in adapter.targets for n in _FUSED.get(target.rpartition(".")[2], (target.rpartition(".")[2],))}
        chosen = [width for name, width in widths.items() if name in names]
    if kind == "ia3":
        return s.layers * sum(out for _, out in chosen)
    return s.layers * sum(adapter.rank * (i + o) + (o if kind == "dora" else 0) for i, o in chosen)


def adapter_memory(shape: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """What `plan.memory.estimate` has to know of an adapter."""
    if adapter.kind == "none":
        return {}
    return {"trained": adapter_values(shape, adapter), "quantized": adapter.quantize == "nf4"}
