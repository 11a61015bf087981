"""Rows for new tokens in a model's embedding and head, initialized from those of the old tokens that they replace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.errors import ArtifactError, Setting
from tutelage.models.decoder import Decoder
from tutelage.models.hf.causal import Adapter
from tutelage.models.unfilled import unfilled

Pieces = Sequence[Sequence[int]]
Start = Callable[[Tensor, Pieces, bool, bool], Tensor]


def extend(model: Any, first: int, pieces: Pieces, start: str = "mean") -> Any:
    """The model with rows for new tokens, in place of `model`: `first + k` stands for the old tokens `pieces[k]`.

    Rows of old tokens keep their bits, and so do the logits of old tokens after texts without new ones. Where the model has more
    rows than its tokenizer had tokens, new tokens take these first. `start` names one of `STARTS`.
    Raises ArtifactError for a model that is not a causal one.
    """
    size = max(model.config.vocab_size, first + len(pieces))
    grown = _decoder(model, size) if isinstance(model, Decoder) else _of_transformers(model, size)
    read, *written = tables(grown)
    with torch.no_grad():
        for table in (read, *written):
            rows = STARTS[start](table[:first].float(), pieces, table is read, table is not read or not written)
            table[first : first + len(pieces)] = rows.to(table.dtype)
    return grown


def _mean(table: Tensor, pieces: Pieces, read: bool, written: bool) -> Tensor:
    return torch.stack([table[list(p)].mean(0) for p in pieces])


def _ends(table: Tensor, pieces: Pieces, read: bool, written: bool) -> Tensor:
    """A token is predicted where its first piece was, and read where its last one was."""
    ends = [[p[0]] * written + [p[-1]] * read for p in pieces]
    return torch.stack([table[e].mean(0) for e in ends])


def _random(table: Tensor, pieces: Pieces, read: bool, written: bool) -> Tensor:
    noise = torch.randn(len(pieces), *table.shape[1:], generator=torch.Generator().manual_seed(0)).to(table.device)
    return table.mean(0) + noise * table.std(0)


STARTS: dict[str, Start] = {"mean": _mean, "ends": _ends, "random": _random}
"""What new rows begin with, from (old rows, pieces of each new token, whether ids are read by it, whether logits come from it):
the mean of the pieces' rows; the rows of the first or last piece; noise of the spread of all rows."""


def tables(model: Any) -> list[nn.Parameter]:
    """What has a row for each token: the embedding, then the head's weight where it is another one, and its bias."""
    found: list[Any]
    if isinstance(model, Decoder):
        found = [model.model.embed_tokens.weight, model.lm_head.weight, model.lm_head.bias]
    else:
        head = model.hf.get_output_embeddings()
        found = [model.hf.get_input_embeddings().weight, getattr(head, "weight", None), getattr(head, "bias", None)]
    return list({id(p): p for p in found if p is not None}.values())


def _decoder(model: Decoder, size: int) -> Decoder:
    state: dict[str, Tensor] = dict(model.named_parameters())
    old = [id(p) for p in tables(model)]
    for name, p in state.items():
        if id(p) in old:
            state[name] = p.new_empty(size, *p.shape[1:])
            state[name][: len(p)] = p.detach()
    with unfilled():
        grown = Decoder(model.config.with_vocabulary(size))
    grown.load_state_dict(state, strict=False, assign=True)
    grown.tie()
    return grown.train(model.training)


def _of_transformers(model: Any, size: int) -> Any:
    if not isinstance(model, Adapter):
        raise ArtifactError(
            "only causal language models can be given new tokens",
            found=model.config.model_type,
            fix=f"set {Setting('vocab_add', '0')}",
        )
    model.hf.resize_token_embeddings(size, mean_resizing=False)
    return Adapter(model.hf)
