"""Log-probabilities of the tokens that an answer's text is made of, found by their place in it."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable
from typing import Any

from tutelage.engine import TokenScore
from tutelage.serve.replies import chat_logprobs
from tutelage.tokenizer.detokenize import Vocabulary


class PlacedScores:
    """Scores of generated tokens, waiting for their text to be given out. Places count characters of the generated text.

    vocabulary: the one the text is read with, in which the marks of tool calls may be shown.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0
        self._waiting: deque[tuple[int, TokenScore]] = deque()

    def add(self, scores: Iterable[TokenScore]) -> None:
        """The next tokens. One that ends an answer is part of no text."""
        for score in scores:
            self._waiting.append((self._length, score))
            self._length += len(self._decoder.decode(self._vocabulary.of(score.id)))

    def take(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Of the tokens that begin in this part of the text; those before it belong to no text that is given out."""
        taken = []
        while self._waiting and self._waiting[0][0] < stop:
            at, score = self._waiting.popleft()
            if at >= start:
                taken.append(score)
        found: list[dict[str, Any]] = chat_logprobs(self._vocabulary, taken)["content"]
        return found
