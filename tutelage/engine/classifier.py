"""A trained classifier, in use: texts in, labels and probabilities out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tutelage.data.examples import Encoded, Task, TextEncoder, spans_of
from tutelage.errors import ArtifactError, DataError
from tutelage.models.encoder import PROBLEM, ClassScorer, context, is_encoder, load_classifier
from tutelage.models.interface import Batch
from tutelage.models.load import read_config
from tutelage.models.scorer import Scorer, load_scorer
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

    def __init__(self, folder: Path | str, *, device: str = "cpu") -> None:
        folder = Path(folder)
        raw = read_config(folder)
        tagger = any(str(a).endswith("ForTokenClassification") for a in raw.get("architectures") or ())
        if not tagger and not any(str(a).endswith("ForSequenceClassification") for a in raw.get("architectures") or ()):
            raise ArtifactError(
                "this model does not classify", file=folder / "config.json", field="architectures",
                found=raw.get("architectures"), expected="a folder that `tutelage classify` wrote",
                fix="train one: tutelage classify --encoder FOLDER --data RUN",
            )  # fmt: skip
        words = TokenizerFolder.open(folder)
        if raw.get("problem_type") == "regression":
            raise ArtifactError(
                "this model scores, it does not classify", file=folder / "config.json", field="problem_type", found="regression",
                expected=" or ".join(PROBLEM.values()), fix="use it as a reward model",
            )  # fmt: skip
        self.part = open_part(folder, tagger, words, device)
        self.task: Task = "tag" if tagger else "many" if raw.get("problem_type") == PROBLEM[True] else "class"
        self.labels = names_of(self.part)
        self.encode = TextEncoder(words, longest(words, self.part))

    def predict(self, texts: Iterable[Text]) -> Predicted:
        """Labels and probabilities. Raises `DataError` for an empty text."""
        found = []
        for number, text in enumerate(texts, 1):
            try:
                encoded = self.encode(*((text,) if isinstance(text, str) else text))
            except DataError as error:
                raise DataError(f"text {number}: {error.message}", found=text, expected=error.expected) from None
            assert encoded is not None
            found.append(encoded)
        if not found:
            return Predicted([], np.zeros((0, len(self.labels)), np.float32), 0)
        each = probabilities(self.part, found, self.task)
        if self.task != "tag":
            rows = np.stack(each)
            return Predicted(chosen(rows, self.labels, self.task), rows, sum(e.cut for e in found))
        spans = [tagged(e, p, self.labels) for e, p in zip(found, each, strict=True)]
        means = np.stack([p.mean(0) if len(p) else np.zeros(len(self.labels), np.float32) for p in each])
        return Predicted(spans, means, sum(e.cut for e in found))


def open_part(folder: Path, tagger: bool, words: TokenizerFolder, device: str) -> ClassScorer | Scorer:
    """An encoder's classifier, or a decoder's."""
    if not tagger and not is_encoder(folder):
        return load_scorer(folder, device=device)
    return load_classifier(folder, "token" if tagger else "class", sep_id=separator(words), device=device)[0]


def names_of(part: ClassScorer | Scorer) -> tuple[str, ...]:
    """The K classes."""
    return part.labels if isinstance(part, ClassScorer) else part.outputs


def separator(words: TokenizerFolder) -> int | None:
    """The id between the texts of a pair, where the tokenizer has one."""
    token = words.special_tokens.get("sep_token")
    return None if token is None else words.tokenizer.token_to_id(token)


def longest(words: TokenizerFolder, part: ClassScorer | Scorer) -> int:
    """Tokens of a text: what the model reads, and what its tokenizer says where that is less."""
    most = context(part.hf) if isinstance(part, ClassScorer) else part.config.max_position_embeddings
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
