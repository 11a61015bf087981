"""The baseline that every classifier has to beat: TF-IDF of words and word pairs, and logistic regression (scikit-learn)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tutelage.errors import MissingExtra


class WordCounts:
    """Fitted on texts; gives probabilities in the order of `classes`. Raises `MissingExtra` without scikit-learn.

    `targets`: class numbers [n], or where a text may have several 0 and 1 [n,K].
    """

    def __init__(self, texts: Sequence[str], targets: np.ndarray, classes: int, *, balanced: bool = False) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
            from sklearn.multiclass import OneVsRestClassifier
            from sklearn.pipeline import make_pipeline
        except ImportError as error:
            raise MissingExtra("scikit-learn", "eval", "the baseline of word counts") from error
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, strip_accents="unicode", token_pattern=r"(?u)\b\w+\b")
        regression: Any = LogisticRegression(C=10.0, max_iter=2000, class_weight="balanced" if balanced else None)
        self.several, self.classes = targets.ndim == 2, classes
        self.pipeline = make_pipeline(words, OneVsRestClassifier(regression) if self.several else regression)
        self.pipeline.fit(list(texts), targets)

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """[n,K]; 0 for a class that was not in the training texts."""
        found = self.pipeline.predict_proba(list(texts))
        if self.several:
            return np.asarray(found)
        out = np.zeros((len(texts), self.classes))
        out[:, self.pipeline.classes_] = found
        return out
