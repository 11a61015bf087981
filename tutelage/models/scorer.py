"""Scorers: a decoder whose language head is replaced by a score head. Reward models, value functions, judges of steps.

Folders are those of `AutoModelForSequenceClassification`, which reads the score at a text's last token.
Shapes: B rows, T tokens, K outputs, H hidden width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from tutelage.artifacts import is_adapter
from tutelage.errors import ArtifactError
from tutelage.models.config import DecoderConfig, unsupported
from tutelage.models.decoder import Decoder
from tutelage.models.interface import Batch
from tutelage.models.load import DTYPES, check_folder, fill, read_config, scores, stored_shapes

HEAD = ("score.weight", "score.bias")
SHARED_TOKENS = 16
"""Tokens from which a beginning that several texts have is read once."""


class Scorer(nn.Module):
    """`scorer(batch) -> [B*T,K]`: the scores of the text so far at every place of a batch, in float32.

    Parameters have the names of Hugging Face: those of the model without its language head, and `score.weight` [K,H].
    """

    backbone: Any  # a Decoder, or what stands under the head of a `transformers` classifier

    def __init__(self, backbone: Any, score: nn.Linear, outputs: Sequence[str], problem: str = "regression") -> None:
        super().__init__()
        # Its modules are registered, the model itself is not: a name would otherwise begin with its attribute.
        self.__dict__["backbone"] = backbone
        for name, module in backbone.named_children():
            if name not in ("lm_head", "score"):
                self.add_module(name, module)
        self.score = score
        self.outputs, self.problem = tuple(outputs), problem

    @property
    def config(self) -> Any:
        """The model's configuration, whose `to_hf()` names the outputs."""
        return replace(self.backbone.config, source=self.backbone.config.source | labels(self.outputs, self.problem))

    @property
    def supports_cache(self) -> bool:
        return bool(self.backbone.supports_cache)

    @property
    def supports_trees(self) -> bool:
        """Whether batches may hold texts that share a beginning."""
        return bool(getattr(self.backbone, "supports_trees", False))

    @property
    def cacheable(self) -> int | None:
        """As of a decoder: tokens up to which a text's angles do not follow the length of its row; None for any number."""
        found: int | None = getattr(self.backbone, "cacheable", None)
        return found

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
        from tutelage.models.hf.scorer import body_of

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


def _problem(raw: dict[str, Any]) -> str:
    return str(raw.get("problem_type") or "regression")


def load_scorer(folder: Path | str, *, device: str | torch.device = "cpu", dtype: str | torch.dtype = "float32") -> Scorer:
    """The scorer in `folder`, in evaluation mode: ours, or what transformers or TRL wrote; or of an adapter under a score head.

    Raises `ArtifactError` for a folder that is not a model, for a language model, and for a head of another kind.
    """
    folder, device = Path(folder), torch.device(device)
    kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if is_adapter(folder):
        from tutelage.models.adapters.score_heads import load_scored

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
    check_folder(folder)
    if unsupported(raw) is not None:
        from tutelage.models.hf.scorer import load_body

        body = load_body(folder, device=device, dtype=kind)
        return Scorer(body, body.hf.score, _outputs(raw, body.hf.score.out_features), _problem(raw)).eval()
    shapes = stored_shapes(folder, list(HEAD))
    if HEAD[0] not in shapes:
        raise ArtifactError("the score head is missing from the model's weights", file=folder, expected=f"a tensor {HEAD[0]}")
    config = DecoderConfig.from_hf(raw, folder / "config.json")
    with torch.device("meta"):
        decoder = Decoder(config).to(kind)
        del decoder.lm_head
        head = nn.Linear(config.hidden_size, shapes[HEAD[0]][0], bias=HEAD[1] in shapes, dtype=kind)
    scorer = Scorer(decoder, head, _outputs(raw, head.out_features), _problem(raw))
    fill(scorer, folder, config, device, kind)
    head.float()
    return scorer.eval()


def _outputs(raw: dict[str, Any], count: int) -> tuple[str, ...]:
    """The names of the outputs; those that nobody named are numbered."""
    named = raw.get("id2label") or {}
    return tuple(str(named.get(str(i), f"LABEL_{i}")) for i in range(count))


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
    """All texts in groups, and as many groups together as have so many tokens."""
    steady = scorer.cacheable is None  # else angles follow the length of a row: each has its own
    packs: list[list[_Group]] = []
    room = 0
    for members, shared in _groups(texts, steady and scorer.supports_cache):
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
