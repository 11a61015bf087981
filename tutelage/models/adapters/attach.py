"""Adapters: a few trained weights on a frozen base. Attached, disabled, and handed to the engine.

    attach_adapter(model, config, seed)     freezes the base and adds a trainable adapter, in place
    with adapter_disabled(model): ...       the base alone: a reference without a second copy in memory
    plain, lora = inference_view(model)     for `Engine(plain)` and `lora=lora`, sharing tensors with the model in training

`folder.py` reads and writes the folders of `peft`; `merge.py` merges.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.config.adapter import Adapter
from tutelage.errors import ConfigError
from tutelage.models.adapters.embeddings import base_tables, train_tables
from tutelage.models.adapters.host import host_of
from tutelage.models.adapters.linear import Adapted, LowRankChange, Rescaling, adapted, put_in_place
from tutelage.models.adapters.lora import Lora, LowRank
from tutelage.models.adapters.nf4 import Packed
from tutelage.models.adapters.virtual_tokens import VirtualTokens, max_text_tokens
from tutelage.models.shard import is_sharded

IA3_OUTPUTS = ("k_proj", "v_proj", "key", "value", "k", "v", "c_attn", "qkv_proj", "query_key_value")
IA3_INPUTS = ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h", "wo", "output.dense")


@dataclass(slots=True)
class AttachedAdapter:
    """What is attached to a model: the model holds it as `attached_adapter`."""

    config: Adapter
    targets: tuple[str, ...]  # linear layers by the names that they have on disk
    inputs: tuple[str, ...] = ()  # ia3: those of them whose input is rescaled
    patterns: dict[str, Any] = field(default_factory=dict)  # of `peft`: ranks and alphas of single layers
    tables: dict[str, Tensor] = field(default_factory=dict)  # trained whole: as the base has them, by name on disk
    base: Path | None = None  # the folder that the model came from
    start: dict[str, Tensor] | None = None  # what an adapter that is trained on began with; None for a new one


def adapter_of(model: Any) -> AttachedAdapter | None:
    """The adapter of a model, if it has one; a scorer has that of the model under its head."""
    found: AttachedAdapter | None = model.body.__dict__.get("attached_adapter")
    return found


def attach_adapter(model: Any, config: Adapter, seed: int) -> Any:
    """Freezes the model and puts a new adapter on it, in place. Its first values depend on the seed and the layers' names alone.

    Raises `ConfigError` for targets that the model does not have, and for a model that has an adapter already.
    """
    if (before := adapter_of(model)) is not None:
        raise ConfigError(
            "one adapter at a time: the model has one that can't be merged", field="adapter.kind", found=config.kind,
            expected=f"its own, {before.config.kind}", fix="start from the base",
        )  # fmt: skip
    model.requires_grad_(False)
    if config.quantize == "nf4":
        quantize(model)
    if config.kind in ("prompt", "prefix"):
        _attach_virtual(model, config, seed)
        model.attached_adapter = AttachedAdapter(config, ())
        return model
    layers = host_of(model).linear_layers()
    targets, inputs = chosen(config, list(layers))
    for name in targets:
        if config.kind == "ia3":
            _rescale(model, layers[name], name in inputs)
        else:
            _attach_low_rank(model, name, layers[name], config, config.rank, scale_of(config, config.rank, config.alpha), seed)
    tables = train_tables(model) if config.embeddings else {}
    model.attached_adapter = AttachedAdapter(config, tuple(targets), tuple(inputs), tables=tables)
    return model


def attach_to_scorer(scorer: Any, config: Adapter, seed: int) -> Any:
    """Attaches an adapter to the model under a score head, or under an encoder's class heads; the heads are trained in full."""
    attach_adapter(scorer.body, config, seed)
    return attach_heads(scorer)


def attach_heads(scorer: Any) -> Any:
    """Makes the virtual tokens of a scorer's model the scorer's parameters, too, and its heads trainable."""
    scorer.virtual = scorer.body.virtual
    for name in scorer.heads:
        scorer.get_submodule(name).requires_grad_(True)
    return scorer


def chosen(config: Adapter, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of the layers `names` (on disk) that an adapter changes, and for ia3 those of them whose input it rescales."""
    if config.kind != "ia3":
        wanted = ("all-linear",) if config.targets == ["derived"] else config.targets
        return _matching(wanted, names), []
    if config.targets == ["derived"]:
        # What ends in `output.dense` is also the attention's in some families: only the feed-forward's inputs are rescaled.
        inputs = [n for n in names if _ends(n, IA3_INPUTS) and ".attention." not in n and ".attn." not in n]
        outputs = [n for n in names if _ends(n, IA3_OUTPUTS)]
        if not (inputs and outputs):
            raise ConfigError(
                "can't tell which layers make keys and values and which are the feed-forward network", field="adapter.targets",
                found=", ".join(sorted({n.rpartition(".")[2] for n in names})), fix="name them in adapter.targets",
            )  # fmt: skip
        return outputs + inputs, inputs
    targets = _matching(config.targets, names)
    return targets, [n for n in targets if _ends(n, IA3_INPUTS)]


def _ends(name: str, endings: Sequence[str]) -> bool:
    return any(name == e or name.endswith(f".{e}") for e in endings)


def _matching(wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    if "all-linear" in wanted:
        return list(names)
    for target in wanted:
        if not any(_ends(n, [target]) for n in names):
            raise ConfigError(
                "the model has no linear layer of this name", field="adapter.targets", found=target,
                expected=f"all-linear, or some of: {', '.join(sorted({n.rpartition('.')[2] for n in names}))}",
            )  # fmt: skip
    return [n for n in names if _ends(n, wanted)]


def scale_of(config: Adapter, rank: int, alpha: float) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / (math.sqrt(rank) if config.rslora else rank)


def quantize(model: Any) -> None:
    """Quantizes the base's linear layers to 4 bits, in place; output head and embeddings are left alone."""
    for names in host_of(model).linear_layers().values():
        for name in names:
            module = model.get_submodule(name)
            if not isinstance(module, Adapted):
                put_in_place(model, name, Adapted(module, None, Packed(module.weight)))


def layer(model: Any, name: str) -> Adapted:
    """The layer of this name, ready to be changed."""
    module = model.get_submodule(name)
    if not isinstance(module, Adapted):
        module = Adapted(module, None)
        put_in_place(model, name, module)
    return module


def _attach_low_rank(model: Any, name: str, ours: Sequence[str], config: Adapter, rank: int, scale: float, seed: int) -> None:
    changed = [layer(model, each) for each in ours]
    first = changed[0].base_weight()
    a = nn.Parameter(_first_a(config, rank, changed[0].in_features, seed, name).to(first.device))
    for own in changed:
        weight = own.base_weight()
        b = nn.Parameter(torch.zeros(own.out_features, rank, device=weight.device))
        length = nn.Parameter(torch.linalg.vector_norm(weight.float(), dim=1)) if config.kind == "dora" else None
        own.change = LowRankChange(a, b, scale, length, config.dropout).train(model.training)


def _first_a(config: Adapter, rank: int, width: int, seed: int, name: str) -> Tensor:
    g = _generator(seed, name)
    if config.init == "gaussian":
        return torch.randn(rank, width, generator=g) / rank
    return (torch.rand(rank, width, generator=g) * 2 - 1) / math.sqrt(width)  # Kaiming's with a = sqrt(5), as linear layers begin


def _generator(seed: int, name: str) -> torch.Generator:
    stream = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(stream)


def _rescale(model: Any, ours: Sequence[str], of_input: bool) -> None:
    for own in [layer(model, each) for each in ours]:
        size = own.in_features if of_input else own.out_features
        factor = nn.Parameter(torch.ones(size, device=own.base_weight().device))
        own.change = Rescaling(factor, of_input).train(model.training)


@torch.no_grad()
def _attach_virtual(model: Any, config: Adapter, seed: int) -> None:
    g = _generator(seed, config.kind)
    host, shape, prefix = host_of(model), model.config, config.kind == "prefix"
    layers, heads, width = 0, 0, shape.hidden_size
    if prefix:
        layers, heads, head = host.prefix_shape()
        width = layers * 2 * heads * head
    ids = torch.randint(shape.vocab_size, (config.tokens,), generator=g)
    values = torch.randn(config.tokens, width, generator=g)
    device = next(model.parameters()).device
    if config.init != "random":
        values = host.prefix_of(ids.to(device)) if prefix else host.embeddings()[ids.to(device)].float()
    model.virtual = VirtualTokens(values.to(device), layers, heads).train(model.training)
    if max_text_tokens(model) < 1:
        raise ConfigError(
            "virtual tokens fill the context", field="adapter.tokens", found=config.tokens,
            expected=f"fewer than the model's context of {shape.max_position_embeddings}",
        )  # fmt: skip


@contextmanager
def adapter_disabled(model: Any) -> Iterator[None]:
    """Inside, the model runs without its adapter."""
    parts: list[Any] = [module for _, module in adapted(model)]
    if model.virtual is not None:
        parts.append(model.virtual)
    before = [part.disabled for part in parts]
    for part in parts:
        part.disabled = True
    attached = adapter_of(model)
    try:
        with base_tables(model.body, attached.tables if attached else {}):
            yield
    finally:
        for part, was in zip(parts, before, strict=True):
            part.disabled = was


@contextmanager
def reference_weights(model: Any) -> Iterator[None]:
    """The model as it was before this training, inside: a reference. That is the base, or for an adapter that is trained on the
    base with what the adapter began with."""
    attached = adapter_of(model)
    if attached is None:
        yield
    elif attached.start is None:
        with adapter_disabled(model):
            yield
    else:
        now = snapshot(model)
        _put(model, attached.start)
        try:
            yield
        finally:
            _put(model, now)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what is trained."""
    return {name: p.detach().clone() for name, p in trainable(model)}


@torch.no_grad()
def _put(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, p in trainable(model):
        p.copy_(values[name])


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What is trained, by name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """How many parameters of a model are trained, and the bytes of base and adapter."""

    trained: int  # values
    whole: int  # values, the adapter's included, as if nothing were quantized
    base_bytes: int
    adapter_bytes: int

    @classmethod
    def of(cls, model: Any) -> ParameterCount:
        own = {id(p): p for _, p in trainable(model)}.values()
        held = {id(p): p for p in model.parameters() if not p.requires_grad}.values()
        packed = [m.packed for _, m in adapted(model) if m.packed is not None]
        mine = sum(p.numel() for p in own)
        base = sum(p.numel() for p in held) + sum(p.shape.numel() for p in packed)
        bytes_ = sum(p.nbytes for p in held) + sum(p.nbytes for p in packed)
        return cls(mine, mine + base, bytes_, sum(p.nbytes for p in own))

    def summary(self) -> str:
        return (
            f"{self.trained:,} of {self.whole:,} values trained ({self.trained / self.whole:.2%}); "
            f"base {self.base_bytes / 1e6:,.1f} MB, adapter {self.adapter_bytes / 1e6:,.1f} MB"
        )


@torch.no_grad()
def inference_view(model: Any) -> tuple[Any, Lora | None]:
    """A model and an adapter for `Engine(plain)` and `lora=`. They share tensors with `model`, which may be trained in place:
    call `engine.weights_changed()` then.

    DoRA and IA3 give (a copy of the changed layers merged, None): `sync_merged_weights(model, plain)` writes the changes of
    training to it.
    Virtual tokens, a base in 4 bits, shards and models of `transformers` give (model, None): the engine runs these operation by
    operation.
    """
    attached = adapter_of(model)
    if attached is None:
        return model, None
    layers = adapted(model)
    plain = None if is_sharded(model) or any(m.quantized for _, m in layers) else host_of(model).empty_twin()
    if plain is None:
        return model, None
    lora: dict[str, LowRank] = {}
    state = {name: p.detach() for name, p in model.named_parameters() if ".change." not in name}
    for name, own in layers:
        change = own.change
        if isinstance(change, LowRankChange) and change.length is None:
            lora[name] = LowRank(change.a.detach(), change.b.detach(), change.scale)
        elif change is not None:
            state[f"{name}.weight"] = own.merged_weight()
            if own.bias is not None:
                state[f"{name}.bias"] = own.merged_bias().clone()  # type: ignore[union-attr]
    plain.load_state_dict(state, strict=False, assign=True)
    plain.tie()
    plain.requires_grad_(False)
    return plain.eval(), Lora(lora) if lora else None


@torch.no_grad()
def sync_merged_weights(model: Any, plain: Any) -> None:
    """Writes what training has changed to the merged layers of `plain`, which `inference_view(model)` returned. Does
    nothing where tensors are shared."""
    if plain is model:
        return
    for name, own in adapted(model):
        copy = plain.get_submodule(name)
        if copy.weight.data_ptr() != own.weight.data_ptr():
            copy.weight.copy_(own.merged_weight())
            if own.bias is not None:
                copy.bias.copy_(own.merged_bias())
