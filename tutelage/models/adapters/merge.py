"""Adapters that become part of the weights, with a comparison of logits before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tutelage import log
from tutelage.errors import ArtifactError
from tutelage.models.adapters.linear import Adapted, adapted, put_in_place
from tutelage.models.adapters.virtual_tokens import max_text_tokens
from tutelage.models.interface import Batch

PROBE_TOKENS = 48


@torch.no_grad()
def merge(model: Any, dtype: torch.dtype | None = None, *, quiet: bool = False) -> Any:
    """Makes the adapter part of the weights, in place, compares logits before and after, and says by how much they differ unless
    `quiet`. A base in 4 bits is written out in full first. `dtype`: of the merged weights. Raises `ArtifactError` for what can't
    be merged, and where logits differ."""
    if model.virtual is not None:
        raise ArtifactError(
            "virtual tokens do not change weights, so they can't be merged",
            found="a prefix" if model.virtual.is_prefix else "a prompt",
            expected="lora, dora or ia3", fix="use the adapter with its base",
        )  # fmt: skip
    model.eval()
    before = probe(model)
    for name, own in adapted(model):
        kind = dtype or (own.packed.dtype if own.packed is not None else own.weight.dtype)
        put_in_place(model, name, _plain_like(own, own.merged_weight().to(kind), own.merged_bias()))
    model.body.__dict__.pop("attached_adapter", None)
    model.requires_grad_(True)
    if dtype is not None:
        model.to(dtype)
    check_logits(before, probe(model), "the merged model", quiet)
    return model


def _plain_like(own: Adapted, weight: Tensor, bias: Tensor | None) -> nn.Module:
    if own.transposed:
        from transformers.pytorch_utils import Conv1D

        plain: nn.Module = Conv1D(own.out_features, own.in_features)
        weight = weight.t().contiguous()
    else:
        plain = nn.Linear(own.in_features, own.out_features, bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(weight.dtype).clone())
    return plain


@torch.no_grad()
def probe(model: Any) -> Tensor:
    """Logits [1,T,V] float32 of some tokens, the same for every model of one vocabulary; of a scorer its scores [T,K].
    An encoder-decoder writes what it has read."""
    length = min(PROBE_TOKENS, max_text_tokens(model))
    ids = torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(7)).tolist()
    if model.traits.encoder_decoder:
        return model.read([ids], [[*model.start, *ids]]).float().cpu()  # type: ignore[no-any-return]
    batch = Batch.of([ids], device=next(model.parameters()).device)
    out: Tensor = model(batch) if model.heads else model.logits(batch)
    return out.float().cpu()


def check_logits(before: Tensor, after: Tensor, what: str, quiet: bool = False) -> float:
    """Says by how much logits differ, and returns it. Raises `ArtifactError` where that is more than rounding does even in 16
    bits: a tenth of their standard deviation."""
    difference = float((after - before).abs().max())
    spread = float(before.std())
    if not quiet:
        log.say(f"{what} against the adapted one: logits differ by at most {difference:.2g} (spread {spread:.2g})")
    if not difference <= 0.1 * spread:
        raise ArtifactError(
            f"the logits of {what} differ from those of the adapted model", found=f"up to {difference:.3g}",
            expected=f"at most {0.1 * spread:.3g}", fix="keep the adapter apart from its base, and report this as a bug",
        )  # fmt: skip
    return difference
