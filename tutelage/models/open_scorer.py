"""Opens whatever scorer is in a folder: a model with a score head, an encoder with classes, or an adapter under either."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.artifacts import SCORED, base_of, is_adapter, is_scored, whole_of
from tutelage.errors import ArtifactError
from tutelage.models.adapters.attach import attach_heads
from tutelage.models.adapters.folder import check_base, kind_of, ours, put_adapter, quantized_as
from tutelage.models.adapters.folder import read_config as read_adapter
from tutelage.models.adapters.lora import WEIGHTS, read_tensors
from tutelage.models.adapters.merge import merge
from tutelage.models.adapters.score_heads import PEFT_PREFIX, VIRTUAL, head_endings, put_heads
from tutelage.models.config import DecoderConfig, unsupported
from tutelage.models.decoder import Decoder
from tutelage.models.folder import DTYPES, check_folder, read_config, refuse_quantized, scores, stored_shapes
from tutelage.models.hf.encoder import PROBLEM, ClassScorer, is_encoder, load_classifier
from tutelage.models.hf.scorer import load_body
from tutelage.models.load import fill
from tutelage.models.open import load
from tutelage.models.scorer import HEAD, Scorer, build_scorer
from tutelage.models.unfilled import unfilled

LAST = ("score.weight", "classifier.weight", "out_proj.weight")  # the matrices whose rows are the outputs


def load_scorer(folder: Path | str, *, device: str | torch.device = "cpu", dtype: str | torch.dtype = "float32") -> Scorer:
    """The scorer in `folder`, in evaluation mode: ours, or what transformers or TRL wrote; or an adapter under a score head.

    Raises `ArtifactError` for a folder that is not a model, for a language model, and for a head of another kind.
    """
    folder, device = Path(folder), torch.device(device)
    kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if is_adapter(folder):
        found = load_scored(folder, device=device, dtype=kind)
        if not isinstance(found, Scorer):
            raise ArtifactError(
                "this is a classifier of an encoder, which judges no answers", file=folder, found=found.config.model_type,
                expected="a decoder with a score head", fix="train a reward model: tutelage reward",
            )  # fmt: skip
        return found
    raw = read_config(folder)
    if not scores(raw):
        raise ArtifactError(
            "this is not a reward model: it has no score head", file=folder / "config.json", field="architectures",
            found=raw.get("architectures"), expected="…ForSequenceClassification",
            fix="train one from it with `tutelage reward --model FOLDER`",
        )  # fmt: skip
    refuse_quantized(folder, check_folder(folder))
    if unsupported(raw) is not None:
        body = load_body(folder, device=device, dtype=kind)
        return Scorer(body, body.hf.score, _outputs(raw, body.hf.score.out_features), _problem(raw)).eval()
    shapes = stored_shapes(folder, list(HEAD))
    if HEAD[0] not in shapes:
        raise ArtifactError("the score head is missing from the model's weights", file=folder, expected=f"a tensor {HEAD[0]}")
    config = DecoderConfig.from_hf(raw, folder / "config.json")
    with unfilled():
        decoder = Decoder(config).to(kind)
        del decoder.lm_head
        head = nn.Linear(config.hidden_size, shapes[HEAD[0]][0], bias=HEAD[1] in shapes, dtype=kind)
    scorer = Scorer(decoder, head, _outputs(raw, head.out_features), _problem(raw))
    fill(scorer, folder, config, device, kind)
    head.float()
    return scorer.eval()


def load_scored(
    folder: Path, *, device: str | torch.device = "cpu", dtype: str | torch.dtype = "float32", sep_id: int | None = None
) -> Scorer | ClassScorer:
    """The scorer of an adapter's folder, in evaluation mode: its base with the adapter and the heads.

    Raises `ArtifactError` for an adapter of a language model, for another base, and for heads that do not fit.
    """
    raw, tensors = read_adapter(folder), read_tensors(folder)
    if not is_scored(folder):
        raise ArtifactError(
            "this adapter is of a language model: it has no score head", file=folder, field="task_type",
            found=raw.get("task_type"), expected=" or ".join(SCORED), fix="train a reward model on it: tutelage reward --model",
        )  # fmt: skip
    base = base_of(folder)
    check_base(folder, base)
    kind = kind_of(folder)
    part = _on_base(base, raw, ours(folder), tensors, folder, device=device, dtype=dtype, sep_id=sep_id)
    put_heads(part, folder, kind, tensors)
    saved = [name for name in raw.get("modules_to_save") or () if name not in (*head_endings(part), "classifier", "score")]
    put_adapter(folder, part.body, raw | {"modules_to_save": saved}, tensors, quantized_as(folder))
    attach_heads(part)
    return part.eval() if kind in VIRTUAL else merge(part, quiet=True)  # type: ignore[no-any-return]


def _on_base(
    base: Path, raw: Mapping[str, Any], own: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path, *,
    device: str | torch.device, dtype: str | torch.dtype, sep_id: int | None,
) -> Scorer | ClassScorer:  # fmt: skip
    """The base with heads of as many outputs."""
    count = next((len(x) for name, x in tensors.items() if name.endswith(LAST) and name.startswith(PEFT_PREFIX)), 0)
    if not count:
        raise ArtifactError("the adapter has no score head", file=folder / WEIGHTS, expected=f"a tensor …{' or …'.join(LAST)}")
    names = own.get("outputs") or [f"LABEL_{i}" for i in range(count)]
    problem = own.get("problem") or ("regression" if count == 1 else PROBLEM[False])
    if is_encoder(whole_of(base)):
        task: Any = "token" if raw["task_type"] == "TOKEN_CLS" else "class"
        return load_classifier(base, task, names, many=problem == PROBLEM[True], sep_id=sep_id, device=device)[0]
    if scores(read_config(whole_of(base))):
        return load_scorer(base, device=device, dtype=dtype)
    return build_scorer(load(base, device=device, dtype=dtype), names, 0, problem)


def _problem(raw: dict[str, Any]) -> str:
    return str(raw.get("problem_type") or "regression")


def _outputs(raw: dict[str, Any], count: int) -> tuple[str, ...]:
    """The names of the outputs; those that nobody named are numbered."""
    named = raw.get("id2label") or {}
    return tuple(str(named.get(str(i), f"LABEL_{i}")) for i in range(count))
