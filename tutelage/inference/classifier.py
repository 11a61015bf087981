"""A trained classifier, in use: texts in, labels and probabilities out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tutelage.artifacts import ADAPTER, adapter_config, is_adapter, is_scored
from tutelage.data.groups.examples import Encoded, Task, TextEncoder, spans_of
from tutelage.errors import ArtifactError, DataError
from tutelage.models.adapters.score_heads import names_of
from tutelage.models.adapters.virtual_tokens import max_text_tokens
from tutelage.models.folder import read_config
from tutelage.models.hf.encoder import PROBLEM, ClassScorer, context, is_encoder, load_classifier
from tutelage.models.interface import Batch
from tutelage.models.open_scorer import load_scored, load_scorer
from tutelage.models.scorer import Scorer
from tutelage.records import Span
from tutelage.tokenizer.load import TokenizerFolder

BATCH_TOKENS = 4096
Text = str | tuple[str, str]


@dataclass(slots=True, frozen=True)
class Predicted:
    """What a classifier says of n texts."""

    labels: list[Any]  # a name each; a tuple of names where a text may have several; a tuple of spans from a tagger
    probabilities: np.ndarray  # [n,K] float32 in the order of `Classifier.labels`; of a tagger the mean over a text's words
    cut: int  # texts that were too long and lost their end


class Classifier:
    """The model of a folder that `tutelage classify`, or `transformers`, saved.

    Example:
        found = Classifier("runs/cli/classify-1f2e3d/model").predict(["Shares fell again."])
        found.labels[0], found.probabilities[0].max()
    """

    def __init__(self, folder: Path | str, *, device: str = "cpu", too_long: Literal["right", "left"] = "right") -> None:
        folder = Path(folder)
        self.part = open_part(folder, device)
        self.task: Task = task_of(self.part)
        self.labels = names_of(self.part)
        words = TokenizerFolder.open(folder)
        self.encode = TextEncoder(words, longest(words, self.part), too_long)

    def predict(self, texts: Iterable[Text]) -> Predicted:
        """Labels and probabilities. Raises `DataError` for an empty text."""
        found = []
        for number, text in enumerate(texts, 1):
            try:
                found.append(self.read(text))
            except DataError as error:
                raise DataError(f"text {number}: {error.message}", found=text, expected=error.expected) from None
        return self.judge(found)

    def read(self, text: Text) -> Encoded:
        """A text, or a pair of texts, as tokens. Raises `DataError` for an empty text, and for a pair before a decoder."""
        if isinstance(self.part, Scorer) and not isinstance(text, str):
            raise DataError("a decoder has no mark between the texts of a pair", found=text, expected="one text")
        encoded = self.encode(*((text,) if isinstance(text, str) else text))
        assert encoded is not None
        return encoded

    def judge(self, found: Sequence[Encoded]) -> Predicted:
        """What the model says of texts that were read."""
        if not found:
            return Predicted([], np.zeros((0, len(self.labels)), np.float32), 0)
        each = probabilities(self.part, found, self.task)
        if self.task != "tag":
            rows = np.stack(each)
            return Predicted(chosen(rows, self.labels, self.task), rows, sum(e.cut for e in found))
        spans = [tagged(e, p, self.labels) for e, p in zip(found, each, strict=True)]
        means = np.stack([p.mean(0) if len(p) else np.zeros(len(self.labels), np.float32) for p in each])
        return Predicted(spans, means, sum(e.cut for e in found))


def open_part(folder: Path, device: str) -> ClassScorer | Scorer:
    """An encoder's classifier, or a decoder's. Raises `ArtifactError` for a model of another kind."""
    if is_scored(folder):
        return _judges(load_scored(folder, device=device, sep_id=separator(TokenizerFolder.open(folder))), folder)
    if is_adapter(folder):
        raise _no_classes(folder / ADAPTER, "task_type", adapter_config(folder).get("task_type"))
    raw = read_config(folder)
    kinds = [str(a) for a in raw.get("architectures") or ()]
    tagger = any(a.endswith("ForTokenClassification") for a in kinds)
    if not tagger and not any(a.endswith("ForSequenceClassification") for a in kinds):
        raise _no_classes(folder / "config.json", "architectures", raw.get("architectures"))
    if not tagger and not is_encoder(folder):
        return _judges(load_scorer(folder, device=device), folder)
    sep_id = separator(TokenizerFolder.open(folder))
    return _judges(load_classifier(folder, "token" if tagger else "class", sep_id=sep_id, device=device)[0], folder)


def _judges(part: ClassScorer | Scorer, folder: Path) -> ClassScorer | Scorer:
    """Raises `ArtifactError` for a model whose outputs are no classes."""
    one = isinstance(part, ClassScorer) and part.task == "class" and len(part.labels) == 1 and problem_of(part) != PROBLEM[True]
    if one or problem_of(part) == "regression":  # which is how `transformers` reads a single output
        raise ArtifactError(
            "this model scores, it does not classify", file=folder, field="problem_type", found=problem_of(part),
            expected=" or ".join(PROBLEM.values()), fix="use it as a reward model",
        )  # fmt: skip
    return part


def _no_classes(file: Path, field: str, found: Any) -> ArtifactError:
    return ArtifactError(
        "this model does not classify", file=file, field=field, found=found, expected="a folder that `tutelage classify` wrote",
        fix="train one: tutelage classify --encoder FOLDER --data RUN",
    )  # fmt: skip


def problem_of(part: ClassScorer | Scorer) -> str | None:
    """What its outputs are, in the words of `transformers`."""
    found: str | None = part.problem if isinstance(part, Scorer) else part.hf.config.problem_type
    return found


def task_of(part: ClassScorer | Scorer) -> Task:
    if isinstance(part, ClassScorer) and part.task == "token":
        return "tag"
    return "many" if problem_of(part) == PROBLEM[True] else "class"


def separator(words: TokenizerFolder) -> int | None:
    """The id between the texts of a pair, where the tokenizer has one."""
    token = words.special_tokens.get("sep_token")
    return None if token is None else words.tokenizer.token_to_id(token)


def longest(words: TokenizerFolder, part: ClassScorer | Scorer) -> int:
    """Tokens of a text: what the model reads, and what its tokenizer says where that is less."""
    most = context(part.hf) - part.traits.virtual_tokens if isinstance(part, ClassScorer) else max_text_tokens(part)
    return min(most, words.max_length or 1 << 20)


def chosen(probabilities: np.ndarray, names: Sequence[str], task: Task) -> list[Any]:
    """The likeliest class of each row; where a text may have several, all that are likelier than not."""
    if task == "class":
        return [names[i] for i in probabilities.argmax(1)]
    return [tuple(name for name, p in zip(names, row, strict=True) if p > 0.5) for row in probabilities]


def tagged(found: Encoded, probabilities: np.ndarray, names: Sequence[str]) -> tuple[Span, ...]:
    """The spans of a text from the probabilities [words,K] of its words' tags."""
    return spans_of(found, [names[i] for i in probabilities.argmax(1)])


@torch.no_grad()
def probabilities(part: torch.nn.Module, texts: Sequence[Encoded], task: Task) -> list[np.ndarray]:
    """[K] of each text, or [words,K] of a tagger. Texts of like length run together; the order is theirs."""
    was, _ = part.training, part.eval()
    device = next(part.parameters()).device
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
    out: list[np.ndarray] = [np.empty(0)] * len(texts)
    while order:
        size = max(1, BATCH_TOKENS // len(texts[order[-1]].ids))
        group, order = order[-size:], order[:-size]
        batch = Batch.of([texts[i].ids for i in group]).to(device)
        scores = part(batch)
        odds = (scores.sigmoid() if task == "many" else scores.softmax(1)).unflatten(0, batch.shape).cpu().numpy()
        for row, i in enumerate(group):
            text = texts[i]
            out[i] = odds[row, [w[0] for w in text.words]] if task == "tag" else odds[row, len(text.ids) - 1]
    part.train(was)
    return out
