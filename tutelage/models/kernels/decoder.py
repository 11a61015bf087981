"""A decoder's forward pass over a few new tokens as one call: weights are read where they lie, activations never leave C++.

`FusedDecoder.of(model, cache)` gives one where our kernels can run the whole model, else None; the model itself does the
same, operation by operation. Weights may change in place at any time. With `dtype="int8"` the matrices are copied as 8-bit rows,
each with a scale of its own (largest value / 127), while activations stay float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tutelage.models import kernels
from tutelage.models.adapters.lora import Lora, LowRank
from tutelage.models.decoder import Decoder
from tutelage.models.interface import KVCache
from tutelage.models.kernels.calls import call
from tutelage.models.layers import Layer, is_plain

LANES = 16
"""Widths must be multiples of this: the kernels read whole vectors."""

_KINDS = {torch.float32: 0, torch.int8: 1, torch.bfloat16: 2}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}
_NORMS = ("attention_in", "attention_out", "mlp_in", "mlp_out")


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Matrix(ctypes.Structure):
    _fields_ = (*_fields(_POINTER, "weight scale bias"), *_fields(_LONG, "out inner kind"))


class _Norm(ctypes.Structure):
    _fields_ = (*_fields(_POINTER, "weight bias"), ("kind", _LONG))


class _Layer(ctypes.Structure):
    _fields_ = (
        *_fields(_Matrix, "q k v o gate up down"),
        *_fields(_Norm, "attention_in attention_out mlp_in mlp_out q_norm k_norm"),
        *_fields(_POINTER, "keys values cos sin"),
        *_fields(_LONG, "rotary window"),
        *_fields(_FLOAT, "scale unused"),
    )


class _LowRank(ctypes.Structure):
    _fields_ = (*_fields(_POINTER, "a b"), ("rank", _LONG), *_fields(_FLOAT, "scale unused"))


class _LayerAdapter(ctypes.Structure):
    _fields_ = (*_fields(_LowRank, "q k v o gate up down"),)


class _Plan(ctypes.Structure):
    _fields_ = (
        ("layers", _POINTER),
        *_fields(_LONG, "count hidden heads kv_heads width wide gated activation qk_norm"),
        *_fields(_POINTER, "embeddings positions"),
        ("last", _Norm),
        ("head", _Matrix),
        *_fields(_LONG, "slot_stride threads"),
        *_fields(_FLOAT, "eps offset cap embedding_scale logit_scale logit_cap"),
    )


class FusedDecoder:
    """The plan of one model and one cache. Holds addresses of both, and sees when a weight's data have moved.

    Call `refresh` after putting other parameters in the place of the model's.
    """

    def __init__(self, model: Decoder, cache: KVCache, dtype: str = "float32") -> None:
        self.model, self.cache, self.dtype = model, cache, dtype
        self._turns = {kind: _table(model, kind, cache.length) for kind in model.config.ropes}
        self.refresh()

    @classmethod
    def of(cls, model: Any, cache: KVCache | None, dtype: str = "float32") -> FusedDecoder | None:
        """A plan, or None where something in the model needs its own forward pass."""
        return cls(model, cache, dtype) if cache is not None and _fits(model, cache) else None

    def refresh(self) -> None:
        """Reads the model's weights anew: addresses, and with int8 the values. Called by itself when an address has changed;
        with int8, call it after weights changed in place."""
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._adapters: WeakKeyDictionary[Lora, tuple[Any, list[Tensor]]] = WeakKeyDictionary()  # structures, what they point to
        self._parameters = list(self.model.parameters())
        self._addresses = self._now()
        config, model = self.model.config, self.model.model
        self._layers = (_Layer * len(model.layers))(*(self._layer(i) for i in range(len(model.layers))))
        head = self.model.lm_head
        self._plan = _Plan(
            layers=ctypes.addressof(self._layers), count=len(model.layers), hidden=config.hidden_size,
            heads=config.num_attention_heads, kv_heads=config.num_key_value_heads, width=config.head_dim,
            wide=config.intermediate_size, gated=config.gated, activation=_ACTIVATIONS[config.activation],
            qk_norm=("none", "head", "full").index(config.qk_norm), embeddings=model.embed_tokens.weight.data_ptr(),
            positions=model.embed_positions.weight.data_ptr() if config.learned_positions else None,
            last=_norm(model.norm), head=self._matrix(head.weight, head.bias),
            slot_stride=self.cache.k[0].stride(0), threads=torch.get_num_threads(), eps=config.norm_eps,
            offset=float(config.norm_unit_offset), cap=config.attention_softcap or 0.0,
            embedding_scale=config.embedding_scale, logit_scale=head.scale, logit_cap=head.softcap or 0.0,
        )  # fmt: skip

    def __call__(
        self, ids: Tensor, slots: Tensor, places: Tensor, wanted: Tensor, hidden: bool = False,
        loras: Sequence[Lora | None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Logits [n,V] of rows `wanted` [n], and all hidden states [N,H] after the last norm if asked.

        ids, slots and places are int64 [N]: a token, its slot of the cache and its place there; rows of one slot are in order.
        loras: the adapter of each row.
        """
        if self._now() != self._addresses:
            self.refresh()
        rows, config = len(ids), self.model.config
        assert rows and int(places.max()) < self.cache.length, "a place beyond the cache"
        self._plan.threads = torch.get_num_threads()
        logits = torch.empty(len(wanted), config.vocab_size)
        states = torch.empty(rows, config.hidden_size) if hidden else None
        adapters = None if loras is None else torch.tensor([self._adapter(lora) for lora in loras])
        call("decoder_forward", self._plan, ids, slots, places, adapters, rows, wanted, len(wanted), logits, states)
        return logits, states

    def _now(self) -> list[int]:
        return [
            p.data_ptr() for p in self._parameters
        ]  # not `model.parameters()`: that walk takes longer than a small model's step

    def _layer(self, index: int) -> _Layer:
        config, layer = self.model.config, self.model.model.layers[index]
        assert isinstance(layer, Layer)
        attention, mlp = layer.self_attn, layer.mlp
        out = _Layer(
            keys=self.cache.k[index].data_ptr(), values=self.cache.v[index].data_ptr(), window=attention.window or 0,
            scale=attention.scale, **{name: _norm(layer.norm(name)) for name in _NORMS},
        )  # fmt: skip
        for name in ("q", "k", "v", "o"):
            setattr(out, name, self._linear(getattr(attention, f"{name}_proj")))
        for name in ("gate", "up", "down") if config.gated else ("up", "down"):
            setattr(out, name, self._linear(getattr(mlp, f"{name}_proj")))
        if config.qk_norm != "none":
            out.q_norm, out.k_norm = _norm(attention.q_norm), _norm(attention.k_norm)
        if attention.rope is not None:
            cos, sin = self._turns[attention.rope]
            out.cos, out.sin, out.rotary = cos.data_ptr(), sin.data_ptr(), cos.shape[1]
        return out

    def _adapter(self, lora: Lora | None) -> int:
        """The address of an adapter's structures [layers], 0 for none."""
        if lora is None:
            return 0
        if lora not in self._adapters:
            layers, held = (_LayerAdapter * len(self._layers))(), []
            for name, part in lora.parts.items():
                _, _, layer, _, module = name.split(".")  # model.layers.3.mlp.up_proj
                a, b = whole_vectors(part)
                held += [a, b]
                low = _LowRank(a=a.data_ptr(), b=b.data_ptr(), rank=len(a), scale=part.scale)
                setattr(layers[int(layer)], module.removesuffix("_proj"), low)
            self._adapters[lora] = layers, held
        return ctypes.addressof(self._adapters[lora][0])

    def _linear(self, module: nn.Linear) -> _Matrix:
        return self._matrix(module.weight, module.bias)

    def _matrix(self, weight: Tensor, bias: Tensor | None) -> _Matrix:
        out, inner = weight.shape
        scale = None
        if self.dtype == "int8":
            weight, scale = self._rounded(weight)
        return _Matrix(
            weight=weight.data_ptr(), scale=None if scale is None else scale.data_ptr(),
            bias=None if bias is None else bias.data_ptr(), out=out, inner=inner, kind=_KINDS[weight.dtype],
        )  # fmt: skip

    @torch.no_grad()
    def _rounded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """8-bit rows and their scales [out]; a shared weight once."""
        if weight.data_ptr() not in self._copies:
            self._copies[weight.data_ptr()] = round_rows(weight)
        return self._copies[weight.data_ptr()]


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] float32 -> int8 of the same shape and scales [out]: weight is about int8 * scale, row by row."""
    scale = weight.abs().amax(1).clamp(min=1e-30) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def whole_vectors(part: LowRank) -> tuple[Tensor, Tensor]:
    """A and B as they are, or filled up with zeros to a rank that is a multiple of LANES."""
    missing = -len(part.a) % LANES
    if not missing:
        return part.a, part.b
    return nn.functional.pad(part.a, (0, 0, 0, missing)), nn.functional.pad(part.b, (0, missing))


def _norm(module: nn.Module | None) -> _Norm:
    if module is None:
        return _Norm()
    bias = getattr(module, "bias", None)
    kind = 2 if isinstance(module, nn.LayerNorm) else 1
    return _Norm(weight=module.weight.data_ptr(), bias=None if bias is None else bias.data_ptr(), kind=kind)  # type: ignore[operator,union-attr]


def _table(model: Decoder, kind: str, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, R] of every place."""
    cos, sin = model.rotary(torch.arange(length)[None], torch.float32)[kind]
    return cos[0].contiguous(), sin[0].contiguous()


def _fits(model: Any, cache: KVCache) -> bool:
    if type(model) is not Decoder or model.virtual is not None or not kernels.fits(*model.parameters(), *cache.k[:1]):
        return False
    config = model.config
    widths = (config.hidden_size, config.intermediate_size, config.head_dim)
    plain = all(is_plain(m) for m in model.modules() if isinstance(m, nn.Linear))
    known = all(rope.kind != "longrope" for rope in config.ropes.values())  # its turns depend on how long a text has grown
    contiguous = all(p.is_contiguous() for p in model.parameters())
    return plain and known and contiguous and config.vocab_size >= LANES and not any(w % LANES for w in widths)
