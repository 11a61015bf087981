"""Writes a scorer's folder, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

import torch

from tutelage import log
from tutelage.files import whole_folder
from tutelage.models import families
from tutelage.models.export import SHARD_BYTES, tensors, write_folder
from tutelage.models.folder import DTYPES, tokenizer_files
from tutelage.models.hf.causal import Wrapped, quiet
from tutelage.models.hf.padding import choose_padding, write_padding
from tutelage.models.scorer import Scorer
from tutelage.models.shard import collected, is_sharded


def save_scorer(
    scorer: Scorer,
    folder: Path | str,
    tokenizer_folder: Path | str | None = None,
    *,
    stop_ids: Collection[int] = (),
    dtype: str | torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `folder` so that `AutoModelForSequenceClassification.from_pretrained(folder)` gives the same score of a text.

    The other arguments are those of `export.save`. `transformers` looks for the last token that is not padding: where the model
    pads with a token that ends texts (`stop_ids` do, too), model and tokenizer get another one.
    """
    folder, source = Path(folder), None if tokenizer_folder is None else Path(tokenizer_folder)
    copied = () if source is None else tokenizer_files(source)
    inner = scorer.backbone.hf if isinstance(scorer.backbone, Wrapped) else None
    held = collected(tensors(scorer if inner is None else scorer.backbone))
    if is_sharded(scorer) and log.rank() != 0:
        return
    kind = (DTYPES[dtype] if isinstance(dtype, str) else dtype) or scorer.dtype
    padding = choose_padding(scorer.config, stop_ids, source)
    if not padding.known:
        log.say(f"padding: token {padding.id}, since every special token ends texts; one that ends in it is scored a token early")
    with whole_folder(folder) as partial:
        if inner is None:
            config = scorer.config.to_hf() | {"architectures": [architecture(scorer)], "pad_token_id": padding.id}
            write_folder(config, held, partial, kind, shard_bytes)
        else:
            inner.config.pad_token_id, inner.config.problem_type = padding.id, scorer.problem
            state = {name: x.to(kind) for name, x in held.items()}
            with quiet():
                inner.save_pretrained(partial, state_dict=state, max_shard_size=shard_bytes)
        for file in copied:
            shutil.copyfile(file, partial / file.name)
        write_padding(partial, padding)


def architecture(scorer: Scorer) -> str:
    """The class of `transformers` that opens the scorer's folder with all of its weights."""
    name = families.family(scorer.backbone.config.model_type).scorer
    return name if scorer.score.bias is None else name.replace("Sequence", "Token")
