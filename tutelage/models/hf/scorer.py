"""The score head of any causal model of `transformers` that has a class for it, such as `OPTForSequenceClassification`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.errors import ArtifactError, MissingExtra
from tutelage.models.adapters.hf_virtual_tokens import prepend_virtual
from tutelage.models.hf.causal import Adapter, Wrapped, run_pieces
from tutelage.models.interface import Batch, Output


class Body(Wrapped):
    """What is under the score head of a `transformers` classifier, as `model(batch) -> Output`."""

    def __init__(self, hf: Any) -> None:
        super().__init__(hf)
        if not _score_is_linear(hf):
            raise _unknown(hf.config.model_type)
        hf.score.float()

    def forward(self, batch: Batch) -> Output:
        """Hidden states after the last norm [B,T,H]; those of padding are 0."""
        return Output(hidden=run_pieces(self, batch, self.config.hidden_size))

    def run(self, ids: Tensor, real: Tensor) -> Tensor:
        how: dict[str, Any] = {"input_ids": ids, "attention_mask": real.long()}
        tokens = self.active_virtual
        if tokens is not None:
            how = prepend_virtual(self.hf, tokens, how)
        got = self.hf.base_model(use_cache=tokens is not None and tokens.is_prefix, **how)
        return got.last_hidden_state[:, -ids.shape[1] :]  # type: ignore[no-any-return]


def body_of(model: Adapter, outputs: Sequence[str]) -> Body:
    """A classifier with the layers of a language model and a new score head. The layers are the model's own."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.hf.config)
    config.id2label = dict(enumerate(outputs))
    config.label2id = {name: i for i, name in enumerate(outputs)}
    try:
        with torch.device("meta"):
            hf = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise _unknown(config.model_type) from error
    own: Any = model.hf.base_model
    if type(hf.base_model) is not type(own) or not isinstance(getattr(hf, "score", None), nn.Linear):
        raise _unknown(config.model_type)
    setattr(hf, hf.base_model_prefix, own)
    like = next(own.parameters())
    hf.score = nn.Linear(model.config.hidden_size, len(outputs), bias=False, device=like.device, dtype=like.dtype)
    return Body(hf.train(model.hf.training))


def load_body(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Body:
    """The classifier in `folder`, from local safetensors files only."""
    try:
        from transformers import AutoModelForSequenceClassification
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "a reward model that is not of our own families") from error
    try:
        hf: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (ValueError, OSError, KeyError) as error:
        raise ArtifactError(f"transformers can't load this as a reward model ({error})", file=folder) from error
    return Body(hf.to(device).eval())


@torch.no_grad()
def _score_is_linear(hf: Any) -> bool:
    """Whether scores are the head's matrix times the last hidden state of the last token, tried on three tokens."""
    if not isinstance(getattr(hf, "score", None), nn.Linear) or hf.base_model is hf:
        return False
    ids = torch.arange(3, 6, device=hf.score.weight.device)[None]
    was, _ = hf.training, hf.eval()
    hidden = getattr(hf.base_model(input_ids=ids), "last_hidden_state", None)
    expected = hf(input_ids=ids).logits
    hf.train(was)
    if hidden is None or hidden.shape[-1] != hf.score.weight.shape[1]:
        return False
    got = F.linear(hidden[:, -1].to(hf.score.weight.dtype), hf.score.weight, hf.score.bias)
    return torch.allclose(got.float(), expected.float(), rtol=1e-3, atol=1e-3)


def _unknown(family: str) -> ArtifactError:
    return ArtifactError(
        "the installed transformers has no plain score head for this family", field="model_type", found=family,
        expected="a causal family with a …ForSequenceClassification class whose scores are a product with the last hidden state",
        fix="start from a model of another family, such as llama, qwen3, gemma2 or gpt2",
    )  # fmt: skip
