"""Low-rank adapters (LoRA, Hu et al. 2021) applied to an unchanged base: y = W x + scale * B A x.

Folders are `peft`'s. What one of them may ask for beyond that product (DoRA, biases, whole modules) is refused by name: such an
adapter is to be merged into its base.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tutelage.errors import ArtifactError
from tutelage.files import check_readable
from tutelage.models.adapters.host import host_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "fan_in_fan_out": (False, True), "use_dora": (False,), "use_qalora": (False,), "lora_bias": (False,),
    "modules_to_save": ([],), "layer_replication": ([],), "target_parameters": ([],), "trainable_token_indices": ([], {}),
    "alora_invocation_tokens": ([],), "arrow_config": (), "use_bdlora": (False,), "ensure_weight_tying": (False,),
    "kasa_config": (), "monteclora_config": (), "velora_config": (),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others take a part out of the base
}  # fmt: skip
"""Settings of `peft` that would change the product, and the values (other than null) that do not."""


@dataclass(slots=True, frozen=True)
class LowRank:
    """What an adapter adds to one linear layer."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out]."""
        return F.linear(F.linear(x, self.a), self.b) * self.scale


class Lora:
    """One adapter: its parts by the names of the model's linear layers. Two are never the same, whatever they hold."""

    def __init__(self, parts: Mapping[str, LowRank]) -> None:
        self.parts = dict(parts)

    @property
    def parameters(self) -> int:
        return sum(p.a.numel() + p.b.numel() for p in self.parts.values())


@contextmanager
def applied(model: nn.Module, lora: Lora | None) -> Iterator[None]:
    """The model with the adapter, inside."""
    parts = {} if lora is None else lora.parts
    handles = [model.get_submodule(name).register_forward_hook(_adding(part)) for name, part in parts.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(part: LowRank) -> Any:
    return lambda module, inputs, output: output + part(inputs[0])


def is_lora(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_lora(folder: Path, model: Any) -> Lora:
    """The adapter in a folder that `peft` wrote, for `model`, in its type of numbers and on its device.

    Raises `ArtifactError`: no adapter, another kind of adapter, one that was made for another base.
    """
    config = _config(folder)
    tensors = read_tensors(folder)
    layers = host_of(model).linear_layers()
    weight = next(model.parameters())
    parts: dict[str, LowRank] = {}
    for module in sorted({key.rpartition(".lora_")[0] for key in tensors}):
        ours = layers.get(module.removeprefix(_PREFIX))
        pair = [tensors.pop(f"{module}.lora_{x}.weight", None) for x in "AB"]
        if ours is None or pair[0] is None or pair[1] is None:
            raise ArtifactError(
                "the adapter changes a module that can't be changed without merging", file=folder / WEIGHTS, field=module,
                expected="linear layers of this model's decoder", fix="merge the adapter into its base, or take its own base",
            )  # fmt: skip
        a, b = (x.to(weight.device, weight.dtype) for x in pair if x is not None)
        sizes = [sizes_of(model.get_submodule(name)) for name in ours]
        expected = sizes[0][0], sum(out for _, out in sizes)
        if (a.shape[1], b.shape[0]) != expected or a.shape[0] != b.shape[1]:
            raise ArtifactError(
                "the adapter was made for another base", file=folder / WEIGHTS, field=module,
                found=f"{b.shape[0]} x {b.shape[1]} times {a.shape[0]} x {a.shape[1]}",
                expected=f"{expected[1]} x r times r x {expected[0]}", fix="take the base that its adapter_config.json names",
            )  # fmt: skip
        scale = module_scale(config, module.removeprefix(_PREFIX), a.shape[0])
        rows = b.split([out for _, out in sizes])
        parts |= {name: LowRank(a.contiguous(), own.contiguous(), scale) for name, own in zip(ours, rows, strict=True)}
    if tensors:
        raise ArtifactError("tensors that are not of a LoRA", file=folder / WEIGHTS, found=", ".join(sorted(tensors)[:3]))
    return Lora(parts)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"not an adapter's folder: {CONFIG} is missing", file=folder) from error
    except ValueError as error:
        raise ArtifactError(f"not valid JSON ({error})", file=path) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise ArtifactError("only LoRA runs without being merged", file=path, field="peft_type", found=found, expected="LORA")
    check_plain(config, path)
    return config


def check_plain(config: Mapping[str, Any], path: Path, but: tuple[str, ...] = ()) -> None:
    """Raises `ArtifactError` for a setting, `but` some, that asks for more than a low-rank product."""
    for key, fine in _PLAIN.items():
        value = config.get(key)
        if key not in but and value is not None and value not in fine:
            raise ArtifactError(
                "this adapter is more than a LoRA", file=path, field=key, found=value, fix="merge it into its base"
            )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:6])
        raise ArtifactError(f"the adapter's weights are missing: {WEIGHTS}", file=folder, found=held)
    check_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ArtifactError(f"a damaged safetensors file ({error})", file=path) from error


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """(in, out)."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    assert isinstance(module.weight, Tensor)
    first, second = module.weight.shape
    return first, second


def module_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023); patterns name modules by their endings."""
    alphas = config.get("alpha_pattern") or {}
    own = (value for key, value in alphas.items() if re.fullmatch(rf"(.*\.)?({key})", module))
    alpha = float(next(own, config.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
