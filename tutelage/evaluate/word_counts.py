"""The baseline for classifiers: TF-IDF of words and word pairs, and logistic regression (scikit-learn)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tutelage.errors import DataError, MissingExtra

TUNED_TEXTS = 5000  # most texts for which the regression is tuned: six settings, three folds


class WordCounts:
    """Fitted on texts; gives probabilities in the order of `classes`. Raises `MissingExtra` without scikit-learn, `DataError`
    for texts without a word.

    `targets`: class numbers [n], or where a text may have several 0 and 1 [n,K]. Where texts have one class each and are few,
    regularisation and class weights are chosen for macro-F1 by cross-validation on these texts, because a weak baseline proves
    nothing.
    """

    def __init__(self, texts: Sequence[str], targets: np.ndarray, classes: int) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
            from sklearn.model_selection import GridSearchCV
            from sklearn.multiclass import OneVsRestClassifier
            from sklearn.pipeline import make_pipeline
        except ImportError as error:
            raise MissingExtra("scikit-learn", "eval", "the baseline of word counts") from error
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, strip_accents="unicode", token_pattern=r"(?u)\b\w+\b")
        with_words = sum(map(bool, map(words.build_analyzer(), texts)))
        if not with_words:
            raise DataError("no training text contains a word", found=texts[0], expected="letters or digits")
        regression: Any = LogisticRegression(C=10.0, max_iter=2000)
        self.several, self.classes = targets.ndim == 2, classes
        model: Any = make_pipeline(words, OneVsRestClassifier(regression) if self.several else regression)
        parts = 0 if self.several or len(texts) > TUNED_TEXTS else min(3, int(np.unique(targets, return_counts=True)[1].min()))
        if with_words <= len(texts) / max(parts, 1) + classes:
            parts = 0  # one fold might hold all the words, and leave none to fit on
        if parts > 1:
            grid = {"logisticregression__C": [1.0, 10.0, 100.0], "logisticregression__class_weight": [None, "balanced"]}
            model = GridSearchCV(model, grid, scoring="f1_macro", cv=parts)
        model.fit(list(texts), targets)
        self.pipeline = model.best_estimator_ if parts > 1 else model
        self.chosen = model.best_params_ if parts > 1 else {}

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """[n,K]; 0 for a class that was not in the training texts."""
        found = self.pipeline.predict_proba(list(texts))
        if self.several:
            return np.asarray(found)
        out = np.zeros((len(texts), self.classes))
        out[:, self.pipeline.classes_] = found
        return out
