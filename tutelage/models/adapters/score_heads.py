"""Adapters under a score head, or under the heads of an encoder's classes: the folders of `peft` for SEQ_CLS and TOKEN_CLS, in
which the heads are saved whole.

What can be merged becomes part of the model when it is read. Virtual tokens can't: a scorer wears them wherever it goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.artifacts import SCORED, base_of, is_scored, weights_digest, whole_of
from tutelage.errors import ArtifactError
from tutelage.files import read_object
from tutelage.gguf.folder import reference_to
from tutelage.models.adapters.attach import adapter_of, with_heads
from tutelage.models.adapters.folder import (
    OURS,
    PREFIX,
    check_base,
    kind_of,
    peft_config,
    put_adapter,
    quantized_as,
    read_config,
    tensors_of,
    write_adapter,
)
from tutelage.models.adapters.lora import WEIGHTS, read_tensors
from tutelage.models.adapters.merge import merge
from tutelage.models.export import tokenizer_files
from tutelage.models.hf.encoder import PROBLEM, ClassScorer, is_encoder, load_classifier
from tutelage.models.load import load, scores
from tutelage.models.load import read_config as read_model
from tutelage.models.scorer import Scorer, build_scorer, load_scorer

VIRTUAL = ("prompt", "prefix")
_LAST = ("score.weight", "classifier.weight", "out_proj.weight")  # the matrices whose rows are the outputs
_WIDER = "base_model."  # before the heads of a folder with virtual tokens


def save_scored(part: Scorer | ClassScorer, folder: Path, *, base: Path, tokenizer: Path) -> None:
    """Writes what `part` wears, and its heads, so that `PeftModel.from_pretrained` on the classification model of `base` with as
    many labels gives its scores."""
    wearing = adapter_of(part)
    assert wearing is not None, "this scorer wears no adapter"
    body, virtual = _body(part), wearing.config.kind in VIRTUAL
    root = _WIDER if virtual else PREFIX
    tensors = tensors_of(body, wearing) | {f"{root}{name}": p for name, p in _heads(part).items()}
    config = peft_config(body, wearing) | {"task_type": task_of(part), "base_model_name_or_path": reference_to(base)}
    config["modules_to_save"] = [*config.get("modules_to_save", ()), *_shortened(part)]
    own = {
        "base_weights": weights_digest(base), "quantize": wearing.config.quantize, "version": 1, "outputs": list(names_of(part)),
        "problem": part.problem if isinstance(part, Scorer) else part.hf.config.problem_type,
    }  # fmt: skip
    write_adapter(folder, tensors, config, own, tokenizer_files(tokenizer))


def load_scored(
    folder: Path, *, device: str | torch.device = "cpu", dtype: str | torch.dtype = "float32", sep_id: int | None = None
) -> Scorer | ClassScorer:
    """The scorer of an adapter's folder, in evaluation mode: its base with the adapter and the heads.

    Raises `ArtifactError` for an adapter of a language model, for another base, and for heads that do not fit.
    """
    raw, tensors = read_config(folder), read_tensors(folder)
    if not is_scored(folder):
        raise ArtifactError(
            "this adapter is of a language model: it has no score head", file=folder, field="task_type",
            found=raw.get("task_type"), expected=" or ".join(SCORED), fix="train a reward model on it: tutelage reward --model",
        )  # fmt: skip
    base = base_of(folder)
    check_base(folder, base)
    kind = kind_of(folder)
    own = read_object(folder / OURS) if (folder / OURS).is_file() else {}
    part = _on_base(base, raw, own, tensors, folder, device=device, dtype=dtype, sep_id=sep_id)
    root = _WIDER if kind in VIRTUAL else PREFIX
    for name, p in _heads(part).items():
        _put(folder, f"{root}{name}", p, tensors.pop(f"{root}{name}", None))
    saved = [name for name in raw.get("modules_to_save") or () if name not in (*_shortened(part), "classifier", "score")]
    put_adapter(folder, _body(part), raw | {"modules_to_save": saved}, tensors, quantized_as(folder))
    with_heads(part)
    return part.eval() if kind in VIRTUAL else merge(part, quiet=True)  # type: ignore[no-any-return]


def names_of(part: Scorer | ClassScorer) -> tuple[str, ...]:
    """The K outputs."""
    return part.labels if isinstance(part, ClassScorer) else part.outputs


def task_of(part: Scorer | ClassScorer) -> str:
    return "TOKEN_CLS" if isinstance(part, ClassScorer) and part.task == "token" else "SEQ_CLS"


def _on_base(
    base: Path, raw: Mapping[str, Any], own: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path, *,
    device: str | torch.device, dtype: str | torch.dtype, sep_id: int | None,
) -> Scorer | ClassScorer:  # fmt: skip
    """The base with heads of as many outputs."""
    count = next((len(x) for name, x in tensors.items() if name.endswith(_LAST) and name.startswith(_WIDER)), 0)
    if not count:
        raise ArtifactError("the adapter has no score head", file=folder / WEIGHTS, expected=f"a tensor …{' or …'.join(_LAST)}")
    names = own.get("outputs") or [f"LABEL_{i}" for i in range(count)]
    problem = own.get("problem") or ("regression" if count == 1 else PROBLEM[False])
    if is_encoder(whole_of(base)):
        task: Any = "token" if raw["task_type"] == "TOKEN_CLS" else "class"
        return load_classifier(base, task, names, many=problem == PROBLEM[True], sep_id=sep_id, device=device)[0]
    if scores(read_model(whole_of(base))):
        return load_scorer(base, device=device, dtype=dtype)
    return build_scorer(load(base, device=device, dtype=dtype), names, 0, problem)


def _body(part: Scorer | ClassScorer) -> Any:
    """The model under the heads."""
    return part.__dict__.get("backbone", part)


def _modules(part: Scorer | ClassScorer) -> tuple[str, ...]:
    return getattr(part, "heads", ("score",))


def _shortened(part: Scorer | ClassScorer) -> list[str]:
    """The modules with something to save, as `peft` looks for them: by the ends of their names."""
    held = {name for name in _modules(part) if any(True for _ in part.get_submodule(name).parameters())}
    return [name.rpartition(".")[2] for name in _modules(part) if name in held]


def _heads(part: Scorer | ClassScorer) -> dict[str, nn.Parameter]:
    """The parameters of the heads, by name."""
    under = tuple(f"{name}." for name in _modules(part))
    return {name: p for name, p in part.named_parameters() if name.startswith(under)}


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
