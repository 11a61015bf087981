"""Settings of adapters: a few weights trained on a frozen base."""

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
"""The settings that each kind uses."""
_OF_A, _OF_VALUES = ("kaiming", "gaussian"), ("vocabulary", "random")
INITS = {"lora": _OF_A, "dora": _OF_A, "prompt": _OF_VALUES, "prefix": _OF_VALUES}


class Adapter(Section):
    kind: Literal["none", "lora", "dora", "ia3", "prompt", "prefix"] = setting(
        "none",
        "Kind of adapter. none: all weights are trained; lora: low-rank updates of linear layers; dora: lora with "
        "a trained norm of each row; ia3: trained scales of keys, values and feed-forward activations; prompt: "
        "virtual tokens before every text; prefix: keys and values of virtual tokens in every layer.",
    )
    rank: int = setting(16, "Rank of the update (lora, dora).", ge=1)
    alpha: float = setting(32.0, "Scale of the update, which is multiplied by alpha / rank (lora, dora).", gt=0.0)
    rslora: bool = setting(False, "Multiply the update by alpha / sqrt(rank) instead: rsLoRA (lora, dora).")
    dropout: float = setting(0.0, "Share of the update's inputs dropped in each step, 0 to 1 (lora, dora).", ge=0.0, lt=1.0)
    targets: Targets = setting(
        ["derived"],
        "Names of linear layers as they are in the model's folder, such as q_proj; or all-linear; derived: all-"
        "linear, and for ia3 keys, values and the last of the feed-forward network (lora, dora, ia3).",
    )
    quantize: Literal["none", "nf4"] = setting(
        "none", "Quantization of the base. nf4: its linear layers are held in 4 bits (QLoRA), and the adapter is trained on top."
    )
    embeddings: bool = setting(
        False,
        "Train embedding and head in full as well, for a base that has not read the control tokens of its chat "
        "template, or texts like these (lora, dora, ia3).",
    )
    tokens: int = setting(20, "Number of virtual tokens (prompt, prefix).", ge=1)
    init: Literal["derived", "kaiming", "gaussian", "vocabulary", "random"] = setting(
        "derived",
        "Initial values. lora, dora: matrix A kaiming (uniform, the default) or gaussian; prompt, prefix: from "
        "real tokens (vocabulary, the default) or random.",
    )

    @model_validator(mode="after")
    def _honoured(self) -> Self:
        """Raises `ConfigError` for a setting that the kind does not use."""
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
