"""Scorers: a decoder whose language head is replaced by a score head. Reward models, value functions, judges of steps.

Folders are those of `AutoModelForSequenceClassification`, which reads the score at a text's last token.
Shapes: B rows, T tokens, K outputs, H hidden width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from tutelage.models.adapters.virtual_tokens import VirtualTokens
from tutelage.models.decoder import Decoder
from tutelage.models.hf.scorer import body_of
from tutelage.models.interface import Batch, Traits

HEAD = ("score.weight", "score.bias")
SHARED_TOKENS = 16
"""Tokens from which a beginning that several texts have is read once."""


class Scorer(nn.Module):
    """`scorer(batch) -> [B*T,K]`: the scores of the text so far at every place of a batch, in float32.

    Parameters have the names of Hugging Face: those of the model without its language head, and `score.weight` [K,H].
    """

    heads = ("score",)
    backbone: Any  # a Decoder, or what is under the head of a `transformers` classifier

    def __init__(self, backbone: Any, score: nn.Linear, outputs: Sequence[str], problem: str = "regression") -> None:
        super().__init__()
        # Its modules are registered, the model itself is not: a name would otherwise begin with its attribute.
        self.__dict__["backbone"] = backbone
        for name, module in backbone.named_children():
            if name not in ("lm_head", "score", "virtual"):
                self.add_module(name, module)
        self.virtual: VirtualTokens | None = backbone.virtual
        self.score = score
        self.outputs, self.problem = tuple(outputs), problem

    @property
    def config(self) -> Any:
        """The model's configuration, whose `to_hf()` names the outputs."""
        return replace(self.backbone.config, source=self.backbone.config.source | labels(self.outputs, self.problem))

    @property
    def traits(self) -> Traits:
        """Those of the model under the head."""
        found: Traits = self.backbone.traits
        return found

    @property
    def body(self) -> Any:
        """The model under the head: what adapters change."""
        return self.backbone

    @property
    def device(self) -> torch.device:
        return self.score.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of all weights but the score head's, which are float32 at least."""
        return next(p.dtype for n, p in self.named_parameters() if n not in HEAD)

    @property
    def checkpointing(self) -> str:
        return str(self.backbone.checkpointing)

    @checkpointing.setter
    def checkpointing(self, value: str) -> None:
        self.backbone.checkpointing = value

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.backbone.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.backbone._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.backbone(batch).hidden.flatten(0, 1)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(hidden.to(self.score.weight.dtype))  # type: ignore[no-any-return]


def labels(outputs: Sequence[str], problem: str = "regression") -> dict[str, Any]:
    """What a config.json says of a score head; `problem` in the words of `transformers`."""
    return {
        "num_labels": len(outputs),
        "id2label": {str(i): name for i, name in enumerate(outputs)},
        "label2id": {name: i for i, name in enumerate(outputs)},
        "problem_type": problem,
    }


def build_scorer(model: Any, outputs: int | Sequence[str] = 1, seed: int = 0, problem: str = "regression") -> Scorer:
    """A scorer with the layers of a language model, which it takes over: their language head is dropped. The new head is small
    (a score's standard deviation is about 1/sqrt(H)) and each of its rows has mean 0.

    `outputs`: their names, or how many there are. Raises `ArtifactError` for a family without such a class in `transformers`.
    """
    names = _names(outputs)
    if isinstance(model, Decoder):
        del model.lm_head
        score = nn.Linear(model.config.hidden_size, len(names), bias=False, device=model.device)
        backbone: Any = model
    else:
        backbone = body_of(model, names)
        score = backbone.hf.score
    stream = int.from_bytes(hashlib.sha256(f"{seed}:{HEAD[0]}".encode()).digest()[:8], "big") >> 1
    values = torch.randn(score.weight.shape, generator=torch.Generator().manual_seed(stream)) / score.weight.shape[1]
    with torch.no_grad():
        score.weight.copy_(values - values.mean(1, keepdim=True))
    return Scorer(backbone, score, names, problem).train(model.training)


def _names(outputs: int | Sequence[str]) -> tuple[str, ...]:
    if isinstance(outputs, int):
        return ("reward",) if outputs == 1 else tuple(f"output_{i}" for i in range(outputs))
    return tuple(outputs)


def score_answers(scorer: Scorer, texts: Sequence[Sequence[int]], tokens: int = 4096) -> np.ndarray:
    """The scores [n,K] float32 of whole texts, each at its last token. About `tokens` tokens are read at a time, packed without
    padding; a beginning that several texts share is read once where the model can."""
    out = np.zeros((len(texts), len(scorer.outputs)), np.float32)
    was = scorer.training
    scorer.eval()
    for pack in _packs(scorer, texts, tokens):
        rows = [(texts[m[0]][:shared], [texts[i][shared:] for i in m]) for m, shared in pack]
        with torch.no_grad():
            found = scorer(Batch.of_groups(rows, scorer.device))[_last(rows)]
        out[[i for m, _ in pack for i in m]] = found.float().cpu().numpy()
    scorer.train(was)
    return out


_Group = tuple[list[int], int]  # texts by number, and the length of the beginning that they share


def _packs(scorer: Scorer, texts: Sequence[Sequence[int]], tokens: int) -> list[list[_Group]]:
    """All texts in groups, packed up to `tokens` tokens a pack."""
    steady = scorer.traits.cache_limit is None  # else angles follow the length of a row: each has its own
    packs: list[list[_Group]] = []
    room = 0
    for members, shared in _groups(texts, steady and scorer.traits.cache):
        size = shared + sum(len(texts[i]) - shared for i in members)
        if size > room or not steady:
            packs.append([])
            room = tokens
        packs[-1].append((members, shared))
        room -= size
    return packs


def _groups(texts: Sequence[Sequence[int]], shared: bool) -> list[_Group]:
    """Each text is put to the one before it in alphabetical order where that leaves fewer tokens to read."""
    out: list[_Group] = []
    for i in sorted(range(len(texts)), key=lambda i: list(texts[i])):
        if out and shared:
            members, length = out[-1]
            common = min(length, _common(texts[members[-1]], texts[i]))
            if common >= SHARED_TOKENS and len(members) * common > (len(members) - 1) * length:
                out[-1] = [*members, i], common
                continue
        out.append(([i], len(texts[i])))
    return out


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _last(prompt_groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> Tensor:
    """The place of each text's last token in `Batch.of_groups`."""
    out, at = [], 0
    for beginning, completions in prompt_groups:
        at += len(beginning)
        before = at - 1
        for completion in completions:
            at += len(completion)
            out.append(at - 1 if len(completion) else before)
    return torch.tensor(out)
