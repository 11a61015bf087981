"""Adapters on disk: the folders of `peft`, written and read without it.

    adapter_config.json, adapter_model.safetensors    peft's
    tutelage_adapter.json                             ours: the digest of the base's weights, and whether they were in 4 bits
    tokenizer.json, chat_template.jinja, …            the tokenizer that it was trained with, where there is one

A folder says which base it is for. It is found by `base_model_name_or_path`, or where the run that wrote it had it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tutelage import log
from tutelage.artifacts import adapter_config, weights_digest
from tutelage.config.adapter import Adapter
from tutelage.errors import ArtifactError
from tutelage.files import read_object, whole_folder, write_json
from tutelage.gguf.folder import reference_to
from tutelage.models.adapters import attach
from tutelage.models.adapters.attach import AttachedAdapter, adapter_of, attach_adapter
from tutelage.models.adapters.embeddings import put_tables
from tutelage.models.adapters.host import host_of
from tutelage.models.adapters.linear import Adapted, LowRankChange, Rescaling
from tutelage.models.adapters.lora import CONFIG, WEIGHTS, check_plain, module_scale, read_tensors
from tutelage.models.adapters.virtual_tokens import VirtualTokens
from tutelage.models.folder import tokenizer_files
from tutelage.models.shard import collected, is_sharded

OURS = "tutelage_adapter.json"
PREFIX = "base_model.model."
KINDS = {"LORA": "lora", "IA3": "ia3", "PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}
_SAME = {"prefix_projection": (False,), "num_transformer_submodules": (1, 2, None)}  # of virtual tokens: the values that fit


# Writing


def save_adapter(model: Any, folder: Path, *, base: Path, tokenizer: Path | None = None) -> None:
    """Writes the adapter of `model` so that `PeftModel.from_pretrained(base, folder)` and ours give its logits. `base` is
    the folder that the model was loaded from; the files of `tokenizer` are copied. Of a sharded model every rank calls this, and
    rank 0 writes."""
    attached = adapter_of(model)
    assert attached is not None, "this model has no adapter"
    copied = () if tokenizer is None else tokenizer_files(tokenizer)
    whole = collected(tensors_of(model, attached).items())
    if is_sharded(model) and log.rank() != 0:
        return
    own = {"base_weights": weights_digest(base), "quantize": attached.config.quantize, "version": 1}
    write_adapter(folder, whole, peft_config(model, attached) | {"base_model_name_or_path": reference_to(base)}, own, copied)


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], own: Mapping[str, Any], copied: Sequence[Path]
) -> None:
    """Writes the folder: the tensors and adapter_config.json of `peft`, `own` for us, and copies of files."""
    held = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    with whole_folder(folder) as out:
        save_file(held, out / WEIGHTS, metadata={"format": "pt"})
        write_json(out / CONFIG, dict(config))
        write_json(out / OURS, dict(own))
        for file in copied:
            shutil.copyfile(file, out / file.name)


def peft_config(model: Any, attached: AttachedAdapter) -> dict[str, Any]:
    """The object of adapter_config.json, without the base."""
    config = attached.config
    task = "SEQ_2_SEQ_LM" if model.traits.encoder_decoder else "CAUSAL_LM"
    out: dict[str, Any] = {"task_type": task, "inference_mode": True}
    if config.kind in ("prompt", "prefix"):
        return out | _config_of_virtual(model)
    if attached.tables:
        out["modules_to_save"] = [name.rpartition(".")[2] for name in attached.tables]
    host = host_of(model)
    layers = host.linear_layers()
    changed = [each for name in attached.targets for each in layers[name]]
    out |= {"target_modules": _shortened(attached.targets, list(layers)), "fan_in_fan_out": host.stores_transposed(changed)}
    if config.kind == "ia3":
        return out | {"peft_type": "IA3", "feedforward_modules": _shortened(attached.inputs, list(layers))}
    return out | {
        "peft_type": "LORA", "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none",
        "use_rslora": config.rslora, "use_dora": config.kind == "dora", "init_lora_weights": True, **attached.patterns,
    }  # fmt: skip


def _config_of_virtual(model: Any) -> dict[str, Any]:
    shape, tokens = model.config, model.virtual
    if not tokens.is_prefix:
        return {
            "peft_type": "PROMPT_TUNING", "num_virtual_tokens": len(tokens), "num_layers": shape.num_hidden_layers,
            "token_dim": shape.hidden_size, "num_transformer_submodules": 1, "num_attention_heads": shape.num_attention_heads,
            "prompt_tuning_init": "RANDOM",
        }  # fmt: skip
    times = 2 if model.traits.encoder_decoder else 1  # see `_spread`
    return {
        "peft_type": "PREFIX_TUNING", "num_virtual_tokens": len(tokens), "num_layers": times * tokens.layers,
        "token_dim": tokens.values.shape[1] // (2 * tokens.layers), "num_attention_heads": tokens.heads,
        "num_transformer_submodules": times, "prefix_projection": False,
    }  # fmt: skip


def _shortened(names: tuple[str, ...], known: list[str]) -> list[str]:
    """Endings that mean these layers and no others."""
    out: dict[str, None] = {}
    for name in names:
        last = name.rpartition(".")[2]
        alike = {n for n in known if n == last or n.endswith(f".{last}")}
        out[last if alike <= set(names) else name] = None
    return list(out)


def tensors_of(model: Any, attached: AttachedAdapter) -> dict[str, Tensor]:
    """The adapter's tensors by `peft`'s names."""
    if attached.config.kind in ("prompt", "prefix"):
        spread = model.virtual.is_prefix and model.traits.encoder_decoder
        return {"prompt_embeddings": _spread(model.virtual) if spread else model.virtual.values}
    tables = host_of(model).token_tables()
    out: dict[str, Tensor] = {f"{PREFIX}{name}.weight": tables[name].clone() for name in attached.tables}
    layers = host_of(model).linear_layers()
    for name in attached.targets:
        changes = [model.get_submodule(each).change for each in layers[name]]
        if isinstance(changes[0], Rescaling):
            factor = changes[0].factor if changes[0].of_input else torch.cat([c.factor for c in changes])
            out[f"{PREFIX}{name}.ia3_l"] = factor[None] if changes[0].of_input else factor[:, None]
            continue
        out[f"{PREFIX}{name}.lora_A.weight"] = changes[0].a
        out[f"{PREFIX}{name}.lora_B.weight"] = torch.cat([c.b for c in changes])
        if changes[0].length is not None:
            out[f"{PREFIX}{name}.lora_magnitude_vector"] = torch.cat([c.length for c in changes])
    return out


# Reading


def check_base(folder: Path, base: Path) -> None:
    """Raises `ArtifactError` where the base's weights are not those that the adapter was trained on, if it says which."""
    if not (folder / OURS).is_file():
        return
    wanted, found = ours(folder).get("base_weights"), weights_digest(base)
    if wanted != found:
        raise ArtifactError(
            "the adapter was made for another base", file=folder, found=f"{base}, weights {found[:12]}",
            expected=f"weights {str(wanted)[:12]}", fix="take the base that it was trained on; after a change of it, train again",
        )  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """The object of adapter_config.json. Raises `ArtifactError` for a kind that is not one of ours."""
    raw = adapter_config(folder)
    if raw.get("peft_type") not in KINDS:
        raise ArtifactError(
            "unknown kind of adapter",
            file=folder / CONFIG,
            field="peft_type",
            found=raw.get("peft_type"),
            expected=f"one of: {', '.join(KINDS)}",
        )
    return raw


def kind_of(folder: Path) -> str:
    raw = read_config(folder)
    return "dora" if raw.get("use_dora") else KINDS[raw["peft_type"]]


def quantized_as(folder: Path) -> str:
    """How the base was held while the adapter was trained."""
    return str(ours(folder).get("quantize", "none"))


def ours(folder: Path) -> dict[str, Any]:
    """The content of our own file in an adapter's folder; empty for a folder of `peft`. Raises `ArtifactError`."""
    return read_object(folder / OURS) if (folder / OURS).is_file() else {}


def load_adapter(folder: Path, model: Any, *, quantize: str | None = None) -> Any:
    """Puts the adapter in `folder` on its base, in place and ready to be trained on. `quantize`: how the base is held; as it was
    in training when left out.

    Raises `ArtifactError`: no adapter, a kind or a part that is not known here, one that was made for another base.
    """
    return put_adapter(folder, model, read_config(folder), read_tensors(folder), quantize or quantized_as(folder))


def put_adapter(folder: Path, model: Any, raw: dict[str, Any], tensors: dict[str, Tensor], held: str) -> Any:
    """`load_adapter` of what was read from `folder`: its settings, and its tensors by name, which are taken out."""
    kind = kind_of(folder)
    if kind in ("prompt", "prefix"):
        return _load_virtual(folder, model, raw, tensors, kind, held)
    if kind != "ia3":
        check_plain(raw, folder / CONFIG, but=("use_dora", "modules_to_save"))
    layers = host_of(model).linear_layers(heads_too=True)  # `peft` changes an encoder's pooler, too
    suffix = ".ia3_l" if kind == "ia3" else ".lora_A.weight"
    targets = [key.removeprefix(PREFIX).removesuffix(suffix) for key in tensors if key.endswith(suffix)]
    unknown = [t for t in targets if t not in layers]
    if unknown or not targets:
        raise ArtifactError(
            "the adapter changes a module that this model does not have as a linear layer", file=folder / WEIGHTS,
            found=", ".join(sorted(unknown)[:3]) or "no such tensors", expected="linear layers of the base",
            fix="take the base that its adapter_config.json names",
        )  # fmt: skip
    config = adapter_section(raw, kind, held)
    model.requires_grad_(False)
    tables = _load_tables(folder, model, raw, tensors)
    if held == "nf4":
        attach.quantize(model)
    ordered = [n for n in layers if n in set(targets)]
    inputs = []
    for name in ordered:
        if kind == "ia3":
            factor = tensors.pop(f"{PREFIX}{name}.ia3_l")
            if factor.shape[0] == 1 and factor.shape[1] > 1:
                inputs.append(name)
            _put_factor(folder, model, name, layers[name], factor, name in inputs)
        else:
            _put_low_rank(folder, model, name, layers[name], tensors, config, raw)
    if tensors:
        raise ArtifactError(
            "the adapter has tensors that are not known here", file=folder / WEIGHTS, found=", ".join(sorted(tensors)[:3])
        )
    patterns = {key: raw[key] for key in ("rank_pattern", "alpha_pattern") if raw.get(key)}
    model.attached_adapter = AttachedAdapter(
        config, tuple(ordered), tuple(inputs), patterns, tables, start=attach.snapshot(model)
    )
    return model


def adapter_section(raw: Mapping[str, Any], kind: str, quantize: str) -> Adapter:
    """Our settings of an adapter_config.json."""
    values: dict[str, Any] = {"kind": kind, "quantize": quantize}
    if kind in ("lora", "dora"):
        values |= {"rank": raw.get("r", 8), "alpha": raw.get("lora_alpha", 8), "rslora": bool(raw.get("use_rslora"))}
        values |= {"dropout": raw.get("lora_dropout") or 0.0}
    if kind in ("lora", "dora", "ia3"):
        values["embeddings"] = bool(raw.get("modules_to_save"))
    return Adapter(**values)


def _load_tables(folder: Path, model: Any, raw: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Puts what the adapter has instead of its base's tables into the model, and gives the base's."""
    saved = raw.get("modules_to_save") or []
    tables = {name: f"{PREFIX}{name}.weight" for name in host_of(model).token_tables() if f"{PREFIX}{name}.weight" in tensors}
    others = [m for m in saved if not any(name == m or name.endswith(f".{m}") for name in tables)]
    if others:
        raise ArtifactError(
            "the adapter replaces modules other than embeddings and output matrix", file=folder / CONFIG, field="modules_to_save",
            found=", ".join(others), expected=" | ".join(host_of(model).token_tables()), fix="merge it into its base",
        )  # fmt: skip
    try:
        return put_tables(model, {name: tensors.pop(key).float() for name, key in tables.items()})
    except ValueError as error:
        raise ArtifactError(
            "the adapter's tables of tokens are not those of this base", file=folder / WEIGHTS, found=error,
            fix="take its own base, or merge it there",
        ) from error  # fmt: skip


@torch.no_grad()
def _put_low_rank(
    folder: Path,
    model: Any,
    name: str,
    ours: tuple[str, ...],
    tensors: dict[str, Tensor],
    config: Adapter,
    raw: dict[str, Any],
) -> None:
    parts = [tensors.pop(f"{PREFIX}{name}.{x}", None) for x in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")]
    a, b, length = parts
    layers = [attach.layer(model, each) for each in ours]
    outs = [m.out_features for m in layers]
    fits = a is not None and b is not None and a.shape[1] == layers[0].in_features and b.shape == (sum(outs), len(a))
    if not fits or (length is None) != (config.kind != "dora"):
        raise _misfit(folder, name, a if b is None else b, layers)
    assert a is not None and b is not None
    shared = torch.nn.Parameter(a.float().to(_device(layers[0])))
    rows = b.float().split(outs)
    lengths = [None] * len(layers) if length is None else list(length.float().flatten().split(outs))
    for layer, own, norm in zip(layers, rows, lengths, strict=True):
        at = _device(layer)
        long = None if norm is None else torch.nn.Parameter(norm.contiguous().to(at))
        up = torch.nn.Parameter(own.contiguous().to(at))
        layer.change = LowRankChange(shared, up, module_scale(raw, name, len(a)), long, config.dropout).train(model.training)


@torch.no_grad()
def _put_factor(folder: Path, model: Any, name: str, ours: tuple[str, ...], factor: Tensor, of_input: bool) -> None:
    layers = [attach.layer(model, each) for each in ours]
    sizes = [m.in_features if of_input else m.out_features for m in layers]
    if factor.numel() != (sizes[0] if of_input else sum(sizes)):
        raise _misfit(folder, name, factor, layers)
    flat = factor.float().flatten()
    own = [flat] * len(layers) if of_input else list(flat.split(sizes))
    for layer, part in zip(layers, own, strict=True):
        layer.change = Rescaling(torch.nn.Parameter(part.clone().to(_device(layer))), of_input).train(model.training)


def _device(layer: Adapted) -> torch.device:
    return layer.base_weight().device


def _misfit(folder: Path, name: str, found: Tensor | None, layers: list[Adapted]) -> ArtifactError:
    return ArtifactError(
        "the adapter was made for another base", file=folder / WEIGHTS, field=name,
        found=None if found is None else list(found.shape),
        expected=f"a change of {sum(m.out_features for m in layers)} x {layers[0].in_features}",
        fix="take the base that its adapter_config.json names",
    )  # fmt: skip


@torch.no_grad()
def _load_virtual(folder: Path, model: Any, raw: Mapping[str, Any], tensors: dict[str, Tensor], kind: str, held: str) -> Any:
    for key, fine in _SAME.items():
        if key in raw and raw[key] not in fine:
            raise ArtifactError("this adapter is more than virtual tokens", file=folder / CONFIG, field=key, found=raw[key])
    values, count = tensors.get("prompt_embeddings"), raw.get("num_virtual_tokens")
    both = raw.get("num_transformer_submodules") == 2  # of an encoder-decoder, as `peft` has it when it is told nothing
    if values is not None and both and kind == "prompt" and isinstance(count, int):
        values = values[:count]  # as many for the decoder follow, which it never reads
    if values is not None and both and kind == "prefix":
        values = _as_read(values, int(raw.get("num_layers") or 1), host_of(model).prefix_shape()[0])
    config = Adapter(kind=kind, quantize=held, tokens=1 if values is None else len(values), init="random")  # type: ignore[arg-type]
    attach_adapter(model, config, 0)
    expected = model.virtual.values.shape
    if values is None or values.shape != expected:
        raise ArtifactError(
            "the adapter was made for another base", file=folder / WEIGHTS, field="prompt_embeddings",
            found=None if values is None else list(values.shape), expected=str(list(expected)),
            fix="take the base that its adapter_config.json names",
        )  # fmt: skip
    model.virtual.values.copy_(values)
    model.attached_adapter.start = attach.snapshot(model)
    return model


def _as_read(values: Tensor, held: int, layers: int) -> Tensor:
    """A prefix [P, held*2*D] of an encoder-decoder whose both halves `peft` counts, as it reads it for each of the decoder's
    layers: of every second of those that are held, from the first on again after the last."""
    each = values.view(len(values), held, -1)
    return each[:, [2 * i % held for i in range(layers)]].flatten(1)


def _spread(tokens: VirtualTokens) -> Tensor:
    """A prefix [P, L*2*D] as [P, 2*L*2*D] of which `_as_read` takes every second layer: those between are zeros."""
    each = tokens.values.view(len(tokens), tokens.layers, 1, -1)
    return torch.cat((each, torch.zeros_like(each)), 2).flatten(1)
