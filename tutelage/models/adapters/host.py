"""What an adapter needs to know of the model that it is attached to: our decoder, or a model of `transformers`.

Modules and tables go by the names that they have on disk, which are those of `peft`'s folders. Our decoder has some under other
names in memory, and some in parts (GPT-2, Phi-3).

Shapes: V vocabulary, H hidden width, P tokens of a prefix, L layers, Hkv key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tutelage.errors import ConfigError
from tutelage.models import families
from tutelage.models.adapters.hf_virtual_tokens import is_encoder, keys_and_values, prefix_shape, takes_prefix
from tutelage.models.decoder import Decoder
from tutelage.models.interface import Batch, CacheView
from tutelage.models.names import Stored, stored
from tutelage.models.unfilled import unfilled


class AdapterHost(Protocol):
    def linear_layers(self, heads_too: bool = False) -> dict[str, tuple[str, ...]]:
        """Our names of the linear layers by the name on disk; several where a family fuses them there. Without the language
        head, and without the heads of an encoder's classes, unless these are asked for."""
        ...

    def token_tables(self) -> dict[str, nn.Parameter]:
        """The tables [V,H] by their modules' names on disk: the embeddings, and the output matrix where there is one; the same
        parameter twice where they are tied."""
        ...

    def embeddings(self) -> Tensor:
        """[V,H]."""
        ...

    def prefix_shape(self) -> tuple[int, int, int]:
        """Layers, heads and head width of a prefix's keys and values. Raises `ConfigError` for a family that takes no prefix."""
        ...

    def prefix_of(self, ids: Tensor) -> Tensor:
        """Keys and values [P, L*2*Hkv*D] float32 that the base makes of real tokens [P]."""
        ...

    def stores_transposed(self, layers: Iterable[str]) -> bool:
        """Whether `transformers` holds the weights of these adapted layers (our names) as [in, out]."""
        ...

    def empty_twin(self) -> Decoder | None:
        """A model of the same shape on "meta", without weights. None where the engine runs the adapted model itself."""
        ...


def host_of(model: Any) -> AdapterHost:
    return DecoderHost(model) if isinstance(model, Decoder) else TransformersHost(model)


class DecoderHost:
    def __init__(self, model: Decoder) -> None:
        self.model = model

    def linear_layers(self, heads_too: bool = False) -> dict[str, tuple[str, ...]]:
        names = [name for name, module in self.model.named_modules() if is_linear(module) and name != "lm_head"]
        rows = self._stored([f"{name}.weight" for name in names])
        return {row.name.removesuffix(".weight"): tuple(n.removesuffix(".weight") for n in row.ours) for row in rows}

    def token_tables(self) -> dict[str, nn.Parameter]:
        found = {name: p for name, p in self.model.named_parameters(remove_duplicate=False) if name in _OUR_TABLES}
        return {row.name.removesuffix(".weight"): found[row.ours[0]] for row in self._stored(list(found))}

    def embeddings(self) -> Tensor:
        return self.model.model.embed_tokens.weight.detach()

    def prefix_shape(self) -> tuple[int, int, int]:
        shape = self.model.config
        return shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim

    def prefix_of(self, ids: Tensor) -> Tensor:
        cache = self.model.new_cache(1, len(ids))
        zero = torch.zeros(1, dtype=torch.int64, device=ids.device)
        self.model(Batch.of([ids.tolist()], cache=CacheView(cache, zero, zero), device=ids.device))
        both = torch.stack([torch.stack((k[0], v[0])) for k, v in zip(cache.k, cache.v, strict=True)])  # [L,2,P,Hkv,D]
        return both.permute(2, 0, 1, 3, 4).flatten(1).float()

    def stores_transposed(self, layers: Iterable[str]) -> bool:
        return self.model.config.model_type == "gpt2"

    def empty_twin(self) -> Decoder | None:
        if self.model.virtual is not None:
            return None
        with unfilled():
            return Decoder(self.model.config)

    def _stored(self, names: Sequence[str]) -> list[Stored]:
        return stored(families.family(self.model.config.model_type).disk, list(names))


_OUR_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


class TransformersHost:
    def __init__(self, model: Any) -> None:
        self.model, self.hf = model, model.hf

    def linear_layers(self, heads_too: bool = False) -> dict[str, tuple[str, ...]]:
        output = self.hf.get_output_embeddings()
        heads = tuple(f"{name}." for name in ("lm_head", *(() if heads_too else self.model.heads)))
        found = [name for name, m in self.model.named_modules() if is_linear(m) and m is not output]
        return {name: (name,) for name in found if not f"{name}.".startswith(heads)}

    def token_tables(self) -> dict[str, nn.Parameter]:
        wanted = (self.hf.get_input_embeddings(), self.hf.get_output_embeddings())
        return {name: m.weight for name, m in self.hf.named_modules() if any(m is w for w in wanted)}

    def embeddings(self) -> Tensor:
        weight: Tensor = self.hf.get_input_embeddings().weight
        return weight.detach()

    def prefix_shape(self) -> tuple[int, int, int]:
        if is_encoder(self.hf) and not takes_prefix(self.hf):
            raise ConfigError(
                "the layers of this encoder read no keys and values before a text", field="adapter.kind",
                found=f"prefix, of {self.model.config.model_type}", expected="prompt, lora, dora or ia3",
            )  # fmt: skip
        return prefix_shape(self.hf, self.model.config)

    def prefix_of(self, ids: Tensor) -> Tensor:
        return keys_and_values(self.hf, ids)

    def stores_transposed(self, layers: Iterable[str]) -> bool:
        return any(self.model.get_submodule(name).transposed for name in layers)

    def empty_twin(self) -> Decoder | None:
        return None


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's in `transformers`: [in, out]
