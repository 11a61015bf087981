"""Between text and token ids, for one engine: prompts on the way in, answers on the way out, grammars over both."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from tutelage.chat.tool_calls import showing
from tutelage.engine.sequence import Sampling
from tutelage.errors import ArtifactError, ConfigError
from tutelage.structured.grammar import Constraint, Grammar, GrammarCompiler
from tutelage.tokenizer.detokenize import TextStream, Vocabulary, drops_first_space

Prompt = str | Seq[int] | Seq[Mapping[str, Any]]
"""A text to continue, token ids, or a conversation to answer (OpenAI messages)."""


class Codec:
    """`renderer` may be None: then prompts are token ids, and answers have no text.

    vocab_size: width of the logits. ends: tokens that end an answer, beside the renderer's own. sources: prompts are what an
    encoder reads. Raises `ArtifactError` for a tokenizer with more tokens than the model.
    """

    def __init__(self, renderer: Any, vocab_size: int, ends: Iterable[int] = (), sources: bool = False) -> None:
        self.renderer, self.sources = renderer, sources
        self.ends = frozenset(ends)
        self.vocabulary: Vocabulary | None = None
        self.fresh = False  # answers are texts of their own, whose first word has no space before it
        self.grammars: Callable[[], GrammarCompiler] | None = None  # made when the first grammar comes
        self._showing: dict[tuple[int, ...], Vocabulary] = {}
        if renderer is not None:
            self._read_tokenizer(renderer, vocab_size)

    def _read_tokenizer(self, renderer: Any, vocab_size: int) -> None:
        tokenizer = renderer.tokenizer
        if tokenizer.vocab_size > vocab_size:
            raise ArtifactError(
                "the tokenizer does not fit the model", file=tokenizer.folder, found=f"{tokenizer.vocab_size} tokens",
                expected=f"at most the model's {vocab_size}", fix="use the tokenizer that the model was trained with",
            )  # fmt: skip
        self.vocabulary = vocabulary = Vocabulary(json.loads(tokenizer.tokenizer.to_str()), control=tokenizer.control_ids)
        self.ends |= frozenset(renderer.stop_ids)
        self.fresh = self.sources and drops_first_space(tokenizer, vocabulary)
        ends = self.ends
        self.grammars = functools.cache(lambda: GrammarCompiler(vocabulary, ends, vocab_size, tokenizer.encode_text))

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: a text as a document begins (for an encoder-decoder, as its tokenizer writes a source),
        messages as they were trained, ids as they are."""
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], Mapping)):
            if self.renderer is None:
                raise ConfigError("this engine has no tokenizer", field="prompt", expected="token ids")
            if isinstance(prompt, str):
                if self.sources:
                    return list(self.renderer.tokenizer.tokenizer.encode_batch_fast([prompt])[0].ids)
                return list(self.renderer.prompt_text(prompt))
            return list(self.renderer.prompt(list(prompt)))
        return [int(t) for t in prompt]  # type: ignore[arg-type]

    def stream(self, sampling: Sampling) -> TextStream:
        """The text of one answer. Raises `ConfigError` for stop texts without a tokenizer."""
        if sampling.stop and self.vocabulary is None:
            raise ConfigError("stop texts need a tokenizer", field="stop", expected="stop_ids")
        return TextStream(self._vocabulary_of(sampling), sampling.stop, self.fresh, sampling.include_stop)

    def ends_of(self, sampling: Sampling) -> frozenset[int]:
        """The tokens that end one answer."""
        return frozenset(sampling.stop_ids) | (frozenset() if sampling.ignore_eos else self.ends)

    def constrain(self, grammar: Grammar) -> Constraint:
        """The constraint of one answer. Raises `ConfigError` for a grammar that cannot be used, or without a tokenizer."""
        if self.grammars is None:
            raise ConfigError("structured output needs a tokenizer", field="grammar")
        return self.grammars().compile(grammar)

    def _vocabulary_of(self, sampling: Sampling) -> Vocabulary | None:
        """The vocabulary for an answer's text."""
        if not sampling.shown_ids or self.vocabulary is None:
            return self.vocabulary
        if sampling.shown_ids not in self._showing:
            self._showing[sampling.shown_ids] = showing(self.vocabulary, sampling.shown_ids)
        return self._showing[sampling.shown_ids]
