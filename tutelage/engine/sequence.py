"""One sequence being generated: what was asked, what came so far, why it ended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tutelage.engine.drafts import Drafts
from tutelage.errors import ConfigError, Setting
from tutelage.models.adapters.lora import Lora
from tutelage.models.generation import GenerationSettings
from tutelage.structured.grammar import Constraint, Grammar
from tutelage.tokenizer.detokenize import TextStream

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(slots=True, frozen=True)
class Sampling:
    """How to continue a prompt. Log-probabilities are always those of the model itself: before temperature, bias and penalties.

    Example:
        >>> Sampling(64, temperature=0.7, top_p=0.9, seed=1, stop=("\\n\\n",)).greedy
        False
    """

    max_tokens: int | None = None  # tokens to make at most; None: as many as the context has room for
    temperature: float = 1.0  # 0 takes the most likely token
    top_p: float = 1.0  # keep the most likely tokens that together reach this probability
    top_k: int = 0  # keep this many; 0 keeps all
    min_p: float = 0.0  # keep tokens at least this likely relative to the most likely one
    seed: int | None = None  # equal seed, prompt and settings give equal tokens; None: drawn from the engine's own seed
    stop: tuple[str, ...] = ()  # texts that end the answer; never part of it
    stop_ids: tuple[int, ...] = ()  # tokens that end the answer, beside the model's own
    include_stop: bool = False  # what ended the answer is part of its text
    min_tokens: int = 0  # none of the first so many tokens ends the answer
    n: int = 1  # answers per prompt, sample i of which is keyed by (seed, i)
    logprobs: int | None = None  # None: none; k: of the sampled token and of the k most likely ones
    presence_penalty: float = 0.0  # taken off the logit of a token that the answer already has
    frequency_penalty: float = 0.0  # the same, times how often
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens in prompt or answer (CTRL, 2019)
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these tokens
    ignore_eos: bool = False  # go on after the model's own end tokens
    grammar: Grammar | None = None  # what the answer must be; it ends when it is
    shown_ids: tuple[int, ...] = ()  # control tokens whose names are part of the text: the marks of tool calls
    no_repeat_ngram: int = 0  # no so many tokens in a row come twice, in prompt or answer; 0: they may
    beams: int = 1  # beginnings of an answer that are searched together (`Engine.generate` only); 1: no search
    length_penalty: float = 1.0  # an answer's log-probability is divided by its length to this power; of beams
    early_stopping: bool | Literal["never"] = False  # True: as many answers as beams end the search; "never": only certainty does

    def __post_init__(self) -> None:
        """Raises `ConfigError` naming the field."""
        for name, value, least, most in (
            ("max_tokens", self.max_tokens, 1, None), ("n", self.n, 1, 1024), ("top_k", self.top_k, 0, None),
            ("logprobs", self.logprobs, 0, 100), ("min_tokens", self.min_tokens, 0, self.max_tokens),
            ("no_repeat_ngram", self.no_repeat_ngram, 0, None), ("beams", self.beams, 1, 64),
        ):  # fmt: skip
            if value is not None:
                _within(name, value, least, most, int)
        for name, low, high in (
            ("temperature", 0.0, None), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0), ("frequency_penalty", -2.0, 2.0), ("repetition_penalty", 0.0, None),
        ):  # fmt: skip
            _within(name, getattr(self, name), low, high, float)
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise ConfigError("out of range", field=name, found=0, expected="more than 0")
        if any(not s for s in self.stop):
            raise ConfigError("an empty stop text would end every answer", field="stop", found=list(self.stop))
        for token, bias in self.logit_bias.items():
            if not isinstance(bias, int | float) or not -100 <= bias <= 100:
                raise ConfigError("out of range", field="logit_bias", found={token: bias}, expected="from -100 to 100")
        for name in ("min_tokens", "no_repeat_ngram"):
            if getattr(self, name) and self.grammar is not None:
                raise ConfigError("a grammar alone says what may come", field=name, found=getattr(self, name), expected="0")
        self._check_beams()

    def _check_beams(self) -> None:
        if self.early_stopping not in (True, False, "never"):
            raise ConfigError("no such way", field="early_stopping", found=self.early_stopping, expected="true, false or never")
        _within("length_penalty", self.length_penalty, -100.0, 100.0, float)
        if self.beams == 1:
            if self.length_penalty != 1 or self.early_stopping:
                name = "length_penalty" if self.length_penalty != 1 else "early_stopping"
                fix = f"set beams, such as {Setting('beams', '4')}"
                raise ConfigError("this is about beams", field=name, found=getattr(self, name), fix=fix)
            return
        if self.n > self.beams:
            raise ConfigError("more answers than beams", field="n", found=self.n, expected=f"at most {self.beams}")
        apart = {
            "temperature": self.temperature not in (0, 1), "top_p": self.top_p < 1, "top_k": self.top_k > 0,
            "min_p": self.min_p > 0, "stop": bool(self.stop), "grammar": self.grammar is not None,
            "logprobs": self.logprobs is not None,
        }  # fmt: skip
        if wrong := [name for name, given in apart.items() if given]:
            raise ConfigError("beam search and this exclude each other", field=wrong[0], found=getattr(self, wrong[0]))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def plain(self) -> bool:
        """True when the next token is the largest logit and nothing else is wanted."""
        return self.temperature == 0 and self.logprobs is None and not self.adjusts

    @property
    def adjusts(self) -> bool:
        """True when logits change before sampling, whatever the temperature."""
        return (
            bool(self.logit_bias) or self.penalises or self.grammar is not None or self.min_tokens > 0 or self.no_repeat_ngram > 0
        )

    @property
    def penalises(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def filters(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def _within(name: str, value: float, low: float, high: float | None, kind: type) -> None:
    number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < low or (high is not None and value > high):
        noun = "a whole number" if kind is int else "a number"
        limits = f"{noun} from {low} to {high}" if high is not None else f"{noun} of at least {low}"
        raise ConfigError("out of range", field=name, found=value, expected=limits)


@dataclass(slots=True, frozen=True)
class TokenScore:
    """A token with the log-probability the model gave it."""

    id: int
    logprob: float  # natural logarithm, temperature 1
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens at this place, best first


@dataclass(slots=True, frozen=True)
class Completion:
    """A finished answer.

    Example:
        Completion(prompt=(5, 9), ids=(7, 2), text="Hi", finish_reason="stop", index=0, scores=())
    """

    prompt: tuple[int, ...]  # token ids; of an encoder-decoder those of the source
    ids: tuple[int, ...]  # the tokens made, the one that ended it included
    text: str  # without special tokens and without the stop text
    finish_reason: FinishReason  # stop: an end token or stop text; length: max_tokens; cancelled
    index: int = 0  # which of the n answers to the prompt
    scores: tuple[TokenScore, ...] = ()  # one a token, where `Sampling.logprobs` was set
    shared: int = 0  # tokens of the prompt that were in the cache already


@dataclass(slots=True, frozen=True)
class Event:
    """What one step gave one sequence."""

    sequence: Sequence
    text: str  # to show now: text that may still become a stop text or half a character is held back
    ids: tuple[int, ...]  # new tokens
    scores: tuple[TokenScore, ...]  # of the new tokens, where asked for
    finish_reason: FinishReason | None  # set on the last event of a sequence

    def __add__(self, later: Event) -> Event:
        """Both as one."""
        return Event(
            self.sequence, self.text + later.text, self.ids + later.ids, self.scores + later.scores, later.finish_reason
        )  # fmt: skip


@dataclass(slots=True, frozen=True)
class Rules:
    """What a model's own settings say of every answer."""

    never: tuple[int, ...] = ()  # tokens that are not made
    last: int | None = None  # the token in the last place that an answer may have

    @classmethod
    def of(cls, own: GenerationSettings, sampling: Sampling) -> Rules | None:
        """None where nothing follows for this answer. Beside a grammar there are none: it alone says what may come."""
        out = cls(own.never, None if sampling.ignore_eos else own.last)
        return None if sampling.grammar is not None or out == cls() else out


class Sequence:
    """A prompt and its continuation. Made by `Engine.submit`. An encoder-decoder has its prompt as `source`, and continues what
    every target begins with."""

    __slots__ = (
        "cached", "constraint", "drafts", "ends", "finish_reason", "ids", "index", "key", "limit", "lora", "owner",
        "prompt_length", "rules", "sampling", "scores", "shared", "slot", "source", "stream", "target",
    )  # fmt: skip

    def __init__(
        self,
        prompt: list[int],
        sampling: Sampling,
        stream: TextStream,
        *,
        seed: int,
        index: int,
        limit: int,
        ends: frozenset[int],
        constraint: Constraint | None = None,
        source: list[int] | None = None,
        lora: Lora | None = None,
        rules: Rules | None = None,
    ) -> None:
        self.source = source  # what the encoder reads, of an encoder-decoder
        self.lora = lora  # the adapter that the model wears for it
        self.owner = ""  # whose text it is: the prefix cache shares nothing between owners
        self.ids = list(prompt)  # prompt, then what was made
        self.prompt_length = len(prompt)
        self.sampling = sampling
        self.key = (seed, index)  # of the noise: nothing else in the batch has a say
        self.index = index
        self.limit = limit  # tokens to make at most
        self.ends = ends
        self.stream = stream
        self.slot = -1  # place in the cache; -1 while waiting and when done
        self.cached = 0  # tokens whose keys and values are in the slot
        self.target = len(prompt)  # tokens to read before the next one can be chosen: more than the prompt after a preemption
        self.shared = 0  # tokens of the prompt that were in the cache already
        self.drafts = Drafts()
        self.constraint = constraint  # of its grammar
        self.rules = rules
        self.scores: list[TokenScore] = []
        self.finish_reason: FinishReason | None = None

    @property
    def prompt(self) -> list[int]:
        """The tokens that were asked about."""
        return self.ids[: self.prompt_length] if self.source is None else self.source

    @property
    def plain(self) -> bool:
        """True when the next token is the largest logit and nothing else is wanted."""
        return self.sampling.plain and self.rules is None

    @property
    def adjusts(self) -> bool:
        """True when logits change before the next token is chosen."""
        return self.sampling.adjusts or self.rules is not None

    @property
    def made(self) -> int:
        return len(self.ids) - self.prompt_length

    def append(self, score: TokenScore) -> Event:
        """Takes the next token, and finds out whether it is the last."""
        self.ids.append(score.id)
        scores = () if self.sampling.logprobs is None else (score,)
        self.scores.extend(scores)
        if score.id in self.ends:
            text = self.stream.add(score.id, stops=False) if self.sampling.include_stop else ""
            forced = self.rules is not None and score.id == self.rules.last and self.made >= self.limit
            self.finish_reason, text = "length" if forced else "stop", text + self.stream.flush()
        else:
            text = self.stream.add(score.id, stops=self.made > self.sampling.min_tokens)
            if self.stream.stopped:
                self.finish_reason = "stop"
            elif self._satisfied(score.id):
                self.finish_reason, text = "stop", text + self.stream.flush()
            elif self.made >= self.limit:
                self.finish_reason, text = "length", text + self.stream.flush()
        return Event(self, text, (score.id,), scores, self.finish_reason)

    def _satisfied(self, token: int) -> bool:
        """Tells the grammar of the token; True when nothing can follow. Past its limits the answer is cut here."""
        if self.constraint is None:
            return False
        try:
            self.constraint.accept(token)
            return self.constraint.finished
        except ConfigError:
            self.constraint, self.limit = None, self.made
            return False

    def give_up(self) -> None:
        """The grammar is past its limits: the answer ends after the next token, as one that was cut."""
        self.constraint = None
        self.limit = self.made + 1

    def cut(self) -> Event:
        """Ends it where it is, as an answer that ran into its limit."""
        self.finish_reason = "length"
        return Event(self, self.stream.flush(), (), (), "length")

    def cancel(self) -> None:
        self.finish_reason = "cancelled"
        self.stream.flush()

    def completion(self) -> Completion:
        assert self.finish_reason is not None, "the sequence is still running"
        return Completion(
            prompt=tuple(self.prompt), ids=tuple(self.ids[self.prompt_length :]), text=self.stream.text,
            finish_reason=self.finish_reason, index=self.index, scores=tuple(self.scores), shared=self.shared,
        )  # fmt: skip
