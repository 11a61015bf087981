"""Encoders of `transformers` (BERT and its family): hidden states of every token, or the scores of classes.

An encoder reads a text in both directions. Pieces of packed rows run as rows of their own, as in `causal.py`.
Shapes: B rows, T tokens, H hidden width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tutelage.errors import ArtifactError, ConfigError, MissingExtra
from tutelage.models.adapters.hf_virtual_tokens import encoder_prefix, prepend_virtual
from tutelage.models.config import unsupported
from tutelage.models.folder import check_folder, read_config, refuse_quantized
from tutelage.models.hf.causal import Wrapped, quiet
from tutelage.models.hf.config import new_config, new_weights
from tutelage.models.interface import Batch, Output

Task = Literal["class", "token"]
CLASSES = {"class": "AutoModelForSequenceClassification", "token": "AutoModelForTokenClassification"}

POSITIONS = "max_position_embeddings"
PROBLEM = {False: "single_label_classification", True: "multi_label_classification"}  # whether a text may have several classes


class Encoder(Wrapped):
    """An encoder as `model(batch) -> Output`: hidden states [B,T,H] of the last layer, 0 at padding."""

    def __init__(self, hf: Any, sep_id: int | None = None) -> None:
        super().__init__(hf)
        self.sep_id = sep_id

    def forward(self, batch: Batch) -> Output:
        assert batch.attention == "bidirectional", "an encoder reads in both directions"
        flat = batch.ids.flatten()
        out = torch.zeros(flat.numel(), self.config.hidden_size, device=flat.device)
        for index, real, wanted in self.groups(batch.segments):
            got = self.hf(**inputs(self, flat[index], real)).last_hidden_state
            out = out.to(got.dtype).index_put((index[wanted],), got[wanted])
        return Output(hidden=out.unflatten(0, batch.shape))


class ClassScorer(Wrapped):
    """A classification model of `transformers` as a part that scores: `part(batch)` -> [B*T,K] float32.

    `class`: the scores of a text are at its last token, whatever token its head reads (BERT: the first one). `token`: each
    token has its own. All other places are 0.
    """

    def __init__(self, hf: Any, task: Task, sep_id: int | None = None) -> None:
        super().__init__(hf)
        self.task, self.sep_id = task, sep_id

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the K classes."""
        named = self.hf.config.id2label
        return tuple(named[i] for i in range(len(named)))

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the modules that are of its classes, and trained in full with an adapter. A pooler is one of them: that of an
        encoder which has never judged texts is new."""
        inner = self.hf.base_model_prefix
        pooler = (f"{inner}.pooler",) if getattr(self.hf.base_model, "pooler", None) is not None else ()
        return (*(name for name, _ in self.hf.named_children() if name != inner), *pooler)

    def forward(self, batch: Batch) -> Tensor:
        flat = batch.ids.flatten()
        out = torch.zeros(flat.numel(), self.hf.config.num_labels, device=flat.device)
        for index, real, wanted in self.groups(batch.segments):
            scores = self._scores(flat[index], real)
            if self.task == "token":
                out = out.index_put((index[wanted],), scores[wanted])
                continue
            rows = wanted.any(1)
            last = index.gather(1, real.sum(1, keepdim=True) - 1).squeeze(1)
            out = out.index_put((last[rows],), scores[rows])
        return out

    def _scores(self, ids: Tensor, real: Tensor) -> Tensor:
        """[n,K] of texts [n,L], each a row; of a tagger [n,L,K]."""
        how, tokens = inputs(self, ids, real), self.active_virtual
        if tokens is None:
            return self.hf(**how).logits.float()  # type: ignore[no-any-return]
        if tokens.is_prefix:
            with encoder_prefix(self.hf, tokens, len(ids), how["attention_mask"]):
                return self.hf(**how).logits.float()  # type: ignore[no-any-return]
        logits = self.hf(**prepend_virtual(self.hf, tokens, how)).logits.float()
        return logits[:, len(tokens) :] if self.task == "token" else logits  # type: ignore[no-any-return]


def inputs(model: Encoder | ClassScorer, ids: Tensor, real: Tensor) -> dict[str, Tensor]:
    """The arguments of a forward pass over texts [n,L], each a row. The second text of a pair begins after the first separator;
    no content makes one, so its places say which text a token belongs to."""
    pad = model.config.pad_token_id
    out = {"input_ids": ids if pad is None else ids.masked_fill(~real, pad), "attention_mask": real.long()}
    if model.sep_id is not None and getattr(model.hf.config, "type_vocab_size", 0) > 1:
        ends = ids == model.sep_id
        ends[:, 0] = False  # what begins a text may be the same token
        out["token_type_ids"] = ((ends.cumsum(1) - ends.long()) > 0).long() * real
    return out


def context(hf: Any) -> int:
    """Tokens that a text may have, its control tokens included."""
    longest = getattr(hf.config, POSITIONS, None) or 1 << 20
    tables = [m for name, m in hf.named_modules() if name.endswith("position_embeddings")]
    offsets = [t.padding_idx + 1 for t in tables if getattr(t, "padding_idx", None) is not None]  # RoBERTa counts from there
    return int(longest - max(offsets, default=0))


def is_encoder(folder: Path) -> bool:
    """Whether a model folder holds a model that reads in both directions and writes nothing."""
    return unsupported(read_config(folder)) is not None and _encodes(_read(folder))


def _encodes(config: Any) -> bool:
    from transformers import AutoModelForMaskedLM

    return type(config) in AutoModelForMaskedLM._model_mapping and not config.is_encoder_decoder


def load_encoder(folder: Path, *, device: str | torch.device = "cpu", sep_id: int | None = None) -> Encoder:
    """The encoder of a model folder, without any head. Raises `ArtifactError`, `MissingExtra`."""
    hf, _ = _opened(folder, "AutoModel", _config_of(folder))
    return Encoder(hf.to(device).eval(), sep_id)


def load_classifier(
    folder: Path, task: Task, labels: Sequence[str] | None = None, *, many: bool = False, sep_id: int | None = None,
    device: str | torch.device = "cpu",
) -> tuple[ClassScorer, bool]:  # fmt: skip
    """The classifier of a folder, and whether its head is new: that of an encoder without one, or of other classes.

    `labels`: the classes it is to have; without them those that the folder was saved with. `many`: a text may have several.
    Raises `ArtifactError` for a folder that is no encoder, or that has no classes where none are given; `MissingExtra`.
    """
    config = _config_of(folder)
    kept = config.id2label == dict(enumerate(labels)) if labels is not None else True
    if labels is not None:
        name_classes(config, labels, task, many)
    hf, found = _opened(folder, CLASSES[task], config)
    missing, changed = ({k if isinstance(k, str) else k[0] for k in found[name]} for name in ("missing_keys", "mismatched_keys"))
    inner = f"{hf.base_model_prefix}."
    outside = sorted(k for k in missing | changed if k.startswith(inner) and ".pooler." not in k)
    if outside:
        raise ArtifactError(
            f"{len(outside)} of the encoder's tensors are missing or of another shape", file=folder, found=", ".join(outside[:3]),
            fix="config.json and the weights have to be of the same model",
        )  # fmt: skip
    if labels is None and (missing or changed):
        raise ArtifactError(
            "this model was not trained to classify", file=folder, found=f"no {', '.join(sorted(missing)[:2])}",
            expected=f"a folder that {CLASSES[task]} saved", fix="train it first with `tutelage classify --encoder`",
        )  # fmt: skip
    new = bool(missing or changed or not kept)
    if new and not missing:
        _renew(hf)
    return ClassScorer(hf.to(device).eval(), task, sep_id), new


def new_classifier(
    shape: Mapping[str, Any], task: Task, labels: Sequence[str], *, base: Mapping[str, Any] | None = None, many: bool = False,
    sep_id: int | None = None,
) -> ClassScorer:  # fmt: skip
    """A classifier from scratch: random weights in the shape of a config.json, BERT where it names no `model_type`. `base`: the
    defaults for keys that `shape` leaves out. Its number of positions is what a text needs; a family that counts positions from
    its padding token gets that many more.

    Raises `ConfigError` for keys that the family does not have, and for one that does not encode; `MissingExtra`.
    """
    transformers = _library()
    config = new_config(shape, base or {}, "bert")
    if not _encodes(config):
        raise ConfigError("not an encoder", field="architecture.model_type", found=config.model_type,
                          expected="bert, roberta, modernbert, …")  # fmt: skip
    name_classes(config, labels, task, many)
    auto = getattr(transformers, CLASSES[task])
    hf = new_weights(auto, config)
    offset = getattr(config, POSITIONS, 0) - context(hf)
    if POSITIONS in (base or {}) and POSITIONS not in shape and 0 < offset < getattr(config, POSITIONS):
        setattr(config, POSITIONS, getattr(config, POSITIONS) + offset)
        hf = new_weights(auto, config)
    return ClassScorer(hf.eval(), task, sep_id)


def name_classes(config: Any, labels: Sequence[str], task: Task, many: bool) -> None:
    """Writes the classes into a configuration, so that every tool knows them."""
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}
    if task == "class":
        config.problem_type = PROBLEM[many]


def _config_of(folder: Path) -> Any:
    refuse_quantized(folder, check_folder(folder))
    config = _read(folder)
    if not _encodes(config):
        raise ArtifactError(
            "not an encoder", file=folder / "config.json", field="model_type", found=config.model_type,
            expected="a model of the BERT family (bert, roberta, distilbert, electra, deberta-v2, modernbert, …)",
            fix="give a decoder as `model`, not as `encoder`",
        )  # fmt: skip
    return config


def _read(folder: Path) -> Any:
    try:
        return _library().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise ArtifactError(f"transformers does not know this model ({error})", file=folder / "config.json") from error


def _opened(folder: Path, kind: str, config: Any) -> tuple[Any, dict[str, Any]]:
    try:
        with quiet():  # the caller reports a new head
            return getattr(_library(), kind).from_pretrained(  # type: ignore[no-any-return]
                folder, config=config, dtype=torch.float32, local_files_only=True, trust_remote_code=False,
                use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except (ValueError, OSError, KeyError) as error:
        raise ArtifactError(
            f"transformers can't load this as an encoder ({error})", file=folder, fix="export or download the model again"
        ) from error


@torch.no_grad()
def _renew(hf: Any) -> None:
    """Makes the last layer new where it was trained for as many, but other, classes."""
    width = hf.config.num_labels
    last = [m for m in hf.modules() if isinstance(m, torch.nn.Linear) and m.out_features == width][-1]
    last.weight.normal_(0.0, getattr(hf.config, "initializer_range", 0.02))
    if last.bias is not None:
        last.bias.zero_()


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "an encoder") from error
    return transformers
