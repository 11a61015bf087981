"""Adapters under a score head, or under the heads of an encoder's classes: the folders of `peft` for SEQ_CLS and TOKEN_CLS, in
which the heads are saved whole. `models/open_scorer.py` reads them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tutelage.artifacts import weights_digest
from tutelage.errors import ArtifactError
from tutelage.gguf.folder import reference_to
from tutelage.models.adapters.attach import adapter_of
from tutelage.models.adapters.folder import PREFIX, peft_config, tensors_of, write_adapter
from tutelage.models.adapters.lora import WEIGHTS
from tutelage.models.folder import tokenizer_files
from tutelage.models.hf.encoder import ClassScorer
from tutelage.models.scorer import Scorer

VIRTUAL = ("prompt", "prefix")
PEFT_PREFIX = "base_model."  # before the names of all heads where `peft` has virtual tokens, and of every tensor


def save_scored(part: Scorer | ClassScorer, folder: Path, *, base: Path, tokenizer: Path) -> None:
    """Writes the adapter of `part`, and its heads, so that `PeftModel.from_pretrained` on the classification model of `base`
    with as many labels gives its scores."""
    attached = adapter_of(part)
    assert attached is not None, "this scorer has no adapter"
    prefix = prefix_of_heads(attached.config.kind)
    tensors = tensors_of(part.body, attached) | {f"{prefix}{name}": p for name, p in _heads(part).items()}
    config = peft_config(part.body, attached) | {"task_type": task_of(part), "base_model_name_or_path": reference_to(base)}
    config["modules_to_save"] = [*config.get("modules_to_save", ()), *head_endings(part)]
    own = {
        "base_weights": weights_digest(base), "quantize": attached.config.quantize, "version": 1, "outputs": list(names_of(part)),
        "problem": part.problem if isinstance(part, Scorer) else part.hf.config.problem_type,
    }  # fmt: skip
    write_adapter(folder, tensors, config, own, tokenizer_files(tokenizer))


def names_of(part: Scorer | ClassScorer) -> tuple[str, ...]:
    """The K outputs."""
    return part.labels if isinstance(part, ClassScorer) else part.outputs


def task_of(part: Scorer | ClassScorer) -> str:
    return "TOKEN_CLS" if isinstance(part, ClassScorer) and part.task == "token" else "SEQ_CLS"


def head_endings(part: Scorer | ClassScorer) -> list[str]:
    """The modules with something to save, as `peft` looks for them: by the ends of their names."""
    held = {name for name in part.heads if any(True for _ in part.get_submodule(name).parameters())}
    return [name.rpartition(".")[2] for name in part.heads if name in held]


def _heads(part: Scorer | ClassScorer) -> dict[str, nn.Parameter]:
    """The parameters of the heads, by name."""
    under = tuple(f"{name}." for name in part.heads)
    return {name: p for name, p in part.named_parameters() if name.startswith(under)}


def prefix_of_heads(kind: str) -> str:
    """What `peft` puts before the names of the heads: one part less where the adapter wraps no module."""
    return PEFT_PREFIX if kind in VIRTUAL else PREFIX


def put_heads(part: Scorer | ClassScorer, folder: Path, kind: str, tensors: dict[str, Tensor]) -> None:
    """Writes the heads among the `tensors` of `folder` into the scorer, and takes them out. Raises `ArtifactError`."""
    for name, p in _heads(part).items():
        stored = f"{prefix_of_heads(kind)}{name}"
        _put(folder, stored, p, tensors.pop(stored, None))


@torch.no_grad()
def _put(folder: Path, name: str, own: nn.Parameter, found: Tensor | None) -> None:
    """A head's tensor, as the folder has it. A pooler that it does not have is the base's: `peft` saves one only when told to."""
    if found is None and ".pooler." in name:
        return
    if found is None or found.shape != own.shape:
        raise ArtifactError(
            "the adapter's heads are not those of this base", file=folder / WEIGHTS, field=name,
            found=None if found is None else list(found.shape), expected=str(list(own.shape)),
            fix="take the base that its adapter_config.json names",
        )  # fmt: skip
    own.copy_(found)
