"""Settings of adapters: a few weights that are trained beside a base that stays as it is."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator
from pydantic import Field as Bound

from tutelage.config.base import Section, setting
from tutelage.errors import ConfigError

Targets = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value), Bound(min_length=1)]

_OF_PRODUCTS = ("rank", "alpha", "rslora", "dropout", "targets", "quantize", "init", "embeddings")
USES: dict[str, tuple[str, ...]] = {
    "none": (),
    "lora": _OF_PRODUCTS,
    "dora": _OF_PRODUCTS,
    "ia3": ("targets", "quantize", "embeddings"),
    "prompt": ("tokens", "init", "quantize"),
    "prefix": ("tokens", "init", "quantize"),
}
"""The settings that each kind has a use for."""
_OF_A, _OF_VALUES = ("kaiming", "gaussian"), ("vocabulary", "random")
INITS = {"lora": _OF_A, "dora": _OF_A, "prompt": _OF_VALUES, "prefix": _OF_VALUES}


class Adapter(Section):
    kind: Literal["none", "lora", "dora", "ia3", "prompt", "prefix"] = setting(
        "none",
        "none: all weights are trained; lora: low-rank changes of linear layers; dora: lora with a trained length of each row; "
        "ia3: factors of keys, values and the feed-forward's inner activations; prompt: virtual tokens before every text; "
        "prefix: keys and values of virtual tokens in every layer",
    )
    rank: int = setting(16, "lora, dora: rank of the change", ge=1)
    alpha: float = setting(32.0, "lora, dora: the change is multiplied by alpha / rank", gt=0.0)
    rslora: bool = setting(False, "lora, dora: multiply by alpha / sqrt(rank) instead (rsLoRA)")
    dropout: float = setting(0.0, "lora, dora: share of the change's inputs left out in each step", ge=0.0, lt=1.0)
    targets: Targets = setting(
        ["derived"],
        "lora, dora, ia3: names of linear layers as they are in the model's folder, such as q_proj; or all-linear; "
        "derived: all-linear, and for ia3 keys, values and the last of the feed-forward network",
    )
    quantize: Literal["none", "nf4"] = setting(
        "none", "nf4: the base's linear layers are held in 4 bits (QLoRA) and the adapter learns on what that leaves of them"
    )
    embeddings: bool = setting(
        False,
        "lora, dora, ia3: the tables of tokens are trained whole beside it, for a base that has not read the control tokens of "
        "its chat template, or texts like these",
    )
    tokens: int = setting(20, "prompt, prefix: virtual tokens", ge=1)
    init: Literal["derived", "kaiming", "gaussian", "vocabulary", "random"] = setting(
        "derived",
        "lora, dora: A is kaiming (uniform, the default) or gaussian; prompt, prefix: what real tokens give (vocabulary, the "
        "default) or random",
    )

    @model_validator(mode="after")
    def _honoured(self) -> Self:
        """Raises `ConfigError` for a setting that the kind has no use for."""
        for name, field in type(self).model_fields.items():
            value: Any = getattr(self, name)
            if name == "kind" or name in USES[self.kind] or value == field.default:
                continue
            users = ", ".join(kind for kind, used in USES.items() if name in used)
            raise ConfigError(
                f"`{name}` means nothing to an adapter of kind {self.kind}", field=f"adapter.{name}", found=value,
                expected=f"adapter.kind={users}", fix=f"leave out adapter.{name}, or choose another adapter.kind",
            )  # fmt: skip
        known = ("derived", *INITS.get(self.kind, ()))
        if self.init not in known:
            raise ConfigError(
                f"`{self.init}` is no way to begin an adapter of kind {self.kind}", field="adapter.init", found=self.init,
                expected=f"one of: {', '.join(known)}",
            )  # fmt: skip
        return self
