"""Opens a folder of any language model that `transformers` knows: a causal one or an encoder-decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tutelage.errors import ArtifactError, MissingExtra
from tutelage.log import say
from tutelage.models.hf.causal import Adapter, quiet
from tutelage.models.hf.seq2seq import Seq2Seq


def load_hf(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Adapter | Seq2Seq:
    """The adapter around the model of `folder`, from local safetensors files only.

    Raises MissingExtra without `transformers`, ArtifactError for a folder that it can't load as a language model.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "a model that is not of our own families") from error
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with quiet():
            hf = kind.from_pretrained(
                folder, config=config, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
    except (ValueError, OSError, KeyError) as error:
        raise ArtifactError(
            f"transformers can't load this as a language model ({error})", file=folder,
            fix="use a decoder-only or encoder-decoder text model that the installed transformers knows",
        ) from error  # fmt: skip
    moved: Any = hf.to(device).eval()
    if not config.is_encoder_decoder:
        return Adapter(moved)
    model = Seq2Seq(moved)
    if note := model.generation.note():
        say(note)
    return model
