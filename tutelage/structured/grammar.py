"""Structured output: which tokens may come next, so that an answer fits a JSON schema, a pattern, a choice or a grammar.

compiler = GrammarCompiler(vocabulary, ends, vocab_size, tokenizer.encode_text)   # once a tokenizer
constraint = compiler.compile(Grammar.of_schema({"type": "object", ...}))         # once an answer
constraint.apply(logits_V)                                                        # before each token is chosen
constraint.accept(token)                                                          # after it; then see constraint.finished
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from tutelage.errors import ConfigError, MissingExtra
from tutelage.structured.json_schema import MAX_VALUES, Bounds, prepare
from tutelage.structured.patterns import check_pattern
from tutelage.structured.trial import GrammarProbe
from tutelage.tokenizer.detokenize import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

Kind = Literal["json_schema", "json_object", "regex", "choice", "lark"]

MAX_SOURCE = 65_536  # characters
WHITESPACE = {"whitespace_pattern": r"[ ]|\n[ ]{0,16}"}
"""Between the parts of JSON, at most once at a place: otherwise it need never end."""
FIXED_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""The same for llguidance before 1.9, where a pattern may repeat. vLLM asks for such a version."""
MASK_SECONDS = 1.0  # of processor time for one token; an answer that takes longer ends there
LIMITS: dict[str, Any] = {"max_grammar_size": 100_000, "max_lexer_states": 50_000, "verbose_errors": False}


class GrammarsBusy(ConfigError):
    """Other grammars are being compiled; this one may be right."""


@dataclass(slots=True, frozen=True)
class Grammar:
    """What an answer must be.

    json_schema: `source` is the schema, as JSON. json_object: any JSON object. regex: the whole answer matches (Rust's syntax,
    without look-around). choice: `source` is a JSON list of texts. lark: llguidance's dialect of Lark, with %json for schemas.

    Example:
        >>> Grammar.of_choices(["yes", "no"])
        Grammar(kind='choice', source='["yes", "no"]')
    """

    kind: Kind
    source: str = ""

    def __post_init__(self) -> None:
        """Raises `ConfigError` for an unknown kind and for a source that is no text, too long or not valid Unicode."""
        if self.kind not in get_args(Kind):
            raise ConfigError("unknown kind of grammar", field="kind", found=self.kind, expected=", ".join(get_args(Kind)))
        if not isinstance(self.source, str) or not _unicode(self.source):
            raise ConfigError("not a text in Unicode", field=self.kind, found=self.source)
        if len(self.source) > MAX_SOURCE:
            raise ConfigError(
                "too long", field=self.kind, found=f"{len(self.source):,} characters", expected=f"up to {MAX_SOURCE:,}"
            )

    @classmethod
    def of_schema(cls, schema: Any) -> Grammar:
        """The grammar of a JSON schema. Raises `ConfigError` for what JSON cannot say."""
        try:
            return cls("json_schema", json.dumps(schema, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"the schema is not JSON ({error})", field="json_schema") from error

    @classmethod
    def of_choices(cls, texts: Iterable[str]) -> Grammar:
        return cls("choice", json.dumps(list(texts)))


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Safe to use from several threads.

    vocabulary: the bytes of each token; control tokens are never text, a lark grammar names them as <name> or <[id]>.
    ends: tokens that end an answer, allowed once the grammar is satisfied. vocab_size: width of the logits.
    encode: ids of a text, for text that the grammar leaves no choice about. seconds: time for one grammar. kept: how many
    grammars, last used first, are not compiled again.
    Raises `MissingExtra` without `llguidance`.
    """

    def __init__(
        self, vocabulary: Vocabulary, ends: Iterable[int], vocab_size: int, encode: Callable[[str], list[int]],
        *, bounds: Bounds | None = None, seconds: float = 5.0, kept: int = 64,
    ) -> None:  # fmt: skip
        try:
            import llguidance
        except ImportError as error:
            raise MissingExtra("llguidance", "serve", "structured output") from error
        self._library: Any = llguidance
        self._tokens = _Tokens(vocabulary, sorted(ends), encode)
        wrapped = llguidance.TokenizerWrapper(self._tokens)
        self._tokenizer = llguidance.LLTokenizer(
            wrapped, n_vocab=max(vocab_size, len(self._tokens.tokens)), eos_token=self._tokens.ends
        )
        self._limits = llguidance.LLParserLimits(**LIMITS)
        self._trials = GrammarProbe(
            {
                "tokens": [token.decode("latin-1") for token in self._tokens.tokens],
                "special": self._tokens.special_token_ids, "ends": self._tokens.ends,
                "vocab_size": max(vocab_size, len(self._tokens.tokens)), "limits": LIMITS,
            },
            seconds,
        )  # fmt: skip
        self._bounds, self._seconds, self._kept = bounds, seconds, kept
        self._cache: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> Constraint:
        """A constraint for one answer. Raises `ConfigError` naming what is wrong, unsupported, too large or too slow."""
        with self._lock:
            known = self._cache.get(grammar)
            if known is not None:
                self._cache.move_to_end(grammar)
        if known is None:
            known = self._tried(grammar)
            with self._lock:
                self._cache[grammar] = known
                while len(self._cache) > self._kept:
                    self._cache.popitem(last=False)
        return Constraint(known.deep_copy(), grammar.kind)

    def _tried(self, grammar: Grammar) -> LLMatcher:
        """Compiles what a process of its own could compile in time. Raises `GrammarsBusy` when none was free."""
        text = self._text(grammar)
        try:
            wrong = self._trials.run(text)
        except BlockingIOError as error:
            raise GrammarsBusy("other grammars are still being compiled", field=grammar.kind, fix="try again later") from error
        except TimeoutError as error:
            expected = f"at most {self._seconds:g} seconds of compiling"
            raise ConfigError("the grammar is too large", field=grammar.kind, expected=expected, fix="simplify it") from error
        if wrong is not None:
            raise _unusable(wrong, grammar.kind)
        return self._build(grammar, text)

    def _build(self, grammar: Grammar, text: str) -> LLMatcher:
        matcher: LLMatcher = self._library.LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        _check(matcher, grammar.kind)
        matcher.compute_bitmask()  # the first mask takes the longest; what is worked out for it is copied along
        _check(matcher, grammar.kind)
        return matcher

    def _text(self, grammar: Grammar) -> str:
        """The grammar as the library compiles it."""
        form, text = written(grammar, self._bounds)
        library = self._library.LLMatcher
        make = {"json": library.grammar_from_json_schema, "regex": library.grammar_from_regex, "lark": library.grammar_from_lark}
        return str(make[form](text))


def written(grammar: Grammar, bounds: Bounds | None = None) -> tuple[Literal["json", "regex", "lark"], str]:
    """The grammar as a text that llguidance reads, and which of its languages that is. What is open has bounds.

    Raises `ConfigError` naming what is wrong or unsupported.
    """
    if grammar.kind == "regex":
        check_pattern(grammar.source, "regex")
        return "regex", grammar.source
    if grammar.kind == "lark":
        return "lark", grammar.source
    if grammar.kind == "choice":
        return "lark", _choices(grammar.source)
    schema = {"type": "object"} if grammar.kind == "json_object" else _loaded(grammar.source, grammar.kind)
    return "json", json_text(schema, bounds)


def json_text(schema: Any, bounds: Bounds | None = None) -> str:
    """A schema as the library reads it, here or behind %json in a lark grammar. Raises `ConfigError` like `prepare`,
    `MissingExtra`."""
    try:
        return json.dumps({"x-guidance": _spaces(), **prepare(schema, bounds)}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the schema is not JSON ({error})", field="#") from error


@functools.cache
def _spaces() -> Mapping[str, Any]:
    try:
        major, minor = metadata.version("llguidance").split(".")[:2]
    except metadata.PackageNotFoundError as error:
        raise MissingExtra("llguidance", "serve", "structured output") from error
    return WHITESPACE if (int(major), int(minor)) >= (1, 9) else FIXED_SPACES


class Constraint:
    """What may come next in one answer. Not to be shared between answers."""

    __slots__ = ("_field", "_matcher")

    def __init__(self, matcher: LLMatcher, field: str) -> None:
        self._matcher, self._field = matcher, field

    @property
    def finished(self) -> bool:
        """True when the answer is complete and nothing can follow but an end token. End the answer then, with reason "stop"."""
        return self._matcher.is_stopped()

    def mask(self, size: int) -> Tensor:
        """bool [size]: the tokens that may come next; ends only, where nothing else may, and where the answer may end here.

        Raises `ConfigError` when the grammar is past its limits: that answer cannot go on, others can.
        """
        began = time.thread_time()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        _check(self._matcher, self._field)
        if time.thread_time() - began > MASK_SECONDS:
            raise ConfigError("the grammar takes too long at every token", field=self._field)
        return torch.from_numpy(np.unpackbits(bits, count=size, bitorder="little").view(np.bool_))

    def apply(self, row: Tensor) -> None:
        """Sets the logits [V] of tokens that may not come next to -inf, in place. Raises like `mask`."""
        row.masked_fill_(~self.mask(row.shape[-1]).to(row.device), -torch.inf)

    def accept(self, token: int) -> None:
        """Takes the token that was chosen. Raises `ConfigError` for one that may not come here."""
        if not self._matcher.consume_token(token):
            _check(self._matcher, self._field)


class _Tokens:
    """A vocabulary as the library asks for it."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, ends: list[int], encode: Callable[[str], list[int]]) -> None:
        self.tokens = [vocabulary.raw(i) for i in range(len(vocabulary))]
        self.special_token_ids = [i for i in range(len(vocabulary)) if not vocabulary.of(i)]
        if not ends:  # the library needs one: a token that no model has
            ends = [len(self.tokens)]
            self.special_token_ids.append(len(self.tokens))
            self.tokens.append(b"<|no end|>")
        self.ends, self.eos_token_id = ends, ends[0]
        self._encode, self._vocabulary = encode, vocabulary
        self._ids = {text: i for i, text in reversed([*enumerate(vocabulary.bytes)]) if text}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: bytes) -> list[int]:
        """Ids that spell `text`: the tokenizer's own, or the longest tokens where it changes a text (adds a space before it)."""
        ids = self._encode(text.decode("utf-8", "replace"))
        return ids if b"".join(map(self._vocabulary.of, ids)) == text else self._longest_first(text)

    def _longest_first(self, text: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(text):
            size = next((n for n in range(self._longest, 0, -1) if text[at : at + n] in self._ids), 0)
            if not size:
                raise ConfigError("the tokenizer cannot write this", field="grammar", found=text[at : at + 20])
            ids.append(self._ids[text[at : at + size]])
            at += size
        return ids


def _check(matcher: LLMatcher, field: str) -> None:
    if matcher.is_error():
        raise _unusable(matcher.get_error(), field)


def _unusable(message: str, field: str) -> ConfigError:
    message = message.split("<state>")[0].strip()
    if message.startswith("NoExtension"):
        return ConfigError("no text fits the grammar", field=field)
    return ConfigError(f"the grammar cannot be used: {message[:500]}", field=field)


def _choices(source: str) -> str:
    texts = _loaded(source, "choice")
    if not isinstance(texts, list) or not texts or not all(isinstance(one, str) and _unicode(one) for one in texts):
        raise ConfigError("not a choice", field="choice", found=source, expected='a list of texts: ["yes", "no"]')
    if len(texts) > MAX_VALUES:
        raise ConfigError("too many choices", field="choice", found=len(texts), expected=f"at most {MAX_VALUES}")
    return "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in texts)


def _loaded(source: str, field: str) -> Any:
    try:
        return json.loads(source)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not valid JSON ({error})", field=field, found=source) from error


def _unicode(text: str) -> bool:
    """Whether it holds no half of a surrogate pair."""
    return not any("\ud800" <= c <= "\udfff" for c in text)
