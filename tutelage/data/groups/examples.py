"""Examples as prompt groups: a text's tokens with what it is. Texts keep their tokenizer's own convention ([CLS] … [SEP])."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tutelage.config.base import nearest
from tutelage.data.groups.groups import Completion, Layout, PromptGroup
from tutelage.errors import ConfigError, DataError, Setting
from tutelage.records import Example, Span
from tutelage.tokenizer.load import TokenizerFolder

Task = Literal["class", "many", "tag"]
TooLong = Literal["right", "left", "drop"]
OUTSIDE = "O"


@dataclass(slots=True, frozen=True)
class Encoded:
    """The tokens of one text or pair, control tokens included."""

    ids: tuple[int, ...]
    words: tuple[tuple[int, int, int], ...]  # of the first text: (token that begins a word, the word's first character, its end)
    cut: bool  # whether the text was too long


class TextEncoder:
    """Texts and pairs -> ids, at most `max_length` of them. Content never becomes a control token."""

    def __init__(self, words: TokenizerFolder, max_length: int, too_long: TooLong = "right") -> None:
        self.folder, self.max_length, self.too_long = words, max_length, too_long
        self._tokenizer = words.plain
        least = self._tokenizer.num_special_tokens_to_add(True) + 2
        if max_length < least:
            raise ConfigError("too short for a pair of texts", field="max_length", found=max_length, expected=f"{least} or more")

    def __call__(self, text: str, pair: str | None = None) -> Encoded | None:
        """None for a text that is dropped because it is too long. Raises `DataError` for a text without tokens."""
        tokenizer = self._tokenizer
        parts = [tokenizer.encode(t, add_special_tokens=False) for t in (text, pair) if t is not None]
        if not all(len(p) for p in parts):
            raise DataError("an empty text can't be classified", found=text, expected="text", fix="leave the row out")
        room = self.max_length - tokenizer.num_special_tokens_to_add(pair is not None)
        over = sum(len(p) for p in parts) > room
        if over and self.too_long == "drop":
            return None
        if over:
            for part, size in zip(parts, _shares([len(p) for p in parts], room), strict=True):
                part.truncate(size, direction=self.too_long)
        whole = tokenizer.post_process(parts[0], parts[1] if pair is not None else None, True)
        return Encoded(tuple(whole.ids), _words(whole, text), over)


def _shares(lengths: list[int], room: int) -> list[int]:
    """How many tokens each of one or two texts keeps: the longer one is cut first."""
    if len(lengths) == 1:
        return [room]
    a, b = lengths
    small = min(a, b, room // 2)
    return [small, min(b, room - small)] if a <= b else [min(a, room - small), small]


def _words(encoding: Any, text: str) -> tuple[tuple[int, int, int], ...]:
    """The words of the first text as the tokenizer splits it, without surrounding spaces."""
    found: list[tuple[int, int, int]] = []
    before = None
    for token, (word, sequence, (start, end)) in enumerate(
        zip(encoding.word_ids, encoding.sequence_ids, encoding.offsets, strict=True)
    ):
        if word is None or sequence != 0:
            continue
        if word == before:
            found[-1] = (found[-1][0], found[-1][1], max(end, found[-1][2]))
        else:
            found.append((token, start, end))
        before = word
    trimmed = []
    for token, start, end in found:
        inside = text[start:end]
        if inside.strip():
            trimmed.append((token, start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip())))
    return tuple(trimmed)


@dataclass(slots=True, frozen=True)
class Labels:
    """The classes of a classifier, or the tags of a tagger."""

    task: Task
    names: tuple[str, ...]  # the K classes; of a tagger: O, then B- and I- of each kind of span
    weights: Mapping[str, float] = field(default_factory=dict)  # of `kinds` in the loss; 1 where absent

    @property
    def kinds(self) -> tuple[str, ...]:
        """What users name and weigh: the classes; of a tagger O and the kinds of spans, each of which is two tags."""
        return self.names if self.task != "tag" else tuple(dict.fromkeys(kind_of(tag) for tag in self.names))

    def check(self, names: Sequence[str]) -> None:
        """Raises `ConfigError` for names that are not classes."""
        for name in names:
            if name not in self.kinds:
                near = nearest(name, list(self.kinds))
                raise ConfigError(
                    "no such class", field="class_weights", found=name, expected=", ".join(self.kinds),
                    fix=f"did you mean `{near}`?" if near else None,
                )  # fmt: skip


def kind_of(tag: str) -> str:
    """The kind of span that a tag is of; O of one that is of none."""
    return tag.partition("-")[2] or OUTSIDE


def task_of(examples: Sequence[Example]) -> Task:
    """The task that the labels define. Raises `DataError` if there are no labels or several kinds of them."""
    has = {"tag": sum(bool(e.spans) for e in examples), "many": sum(bool(e.labels) for e in examples),
           "class": sum(e.label is not None for e in examples)}  # fmt: skip
    present: list[Any] = [name for name, count in has.items() if count]
    if len(present) != 1:
        raise DataError(
            "the examples have no labels" if not present else "the examples have several kinds of labels",
            found=", ".join(f"{has[n]} {n}" for n in present) or None, expected="label, labels or spans, the same in every row",
            fix="name the field with `fields: {label: …}` in the data stage",
        )  # fmt: skip
    if present[0] == "class" and has["class"] < len(examples):
        raise DataError(
            "some examples have no label", found=f"{len(examples) - has['class']} of {len(examples)}", expected="a label each"
        )
    return present[0]  # type: ignore[no-any-return]


def labels_of(train: Sequence[Example], validation: Sequence[Example]) -> Labels:
    """The classes of the training part, in alphabetical order. Raises `DataError` for a single class, and for classes that only
    the validation part has: nothing could learn them."""
    task = task_of(train)
    names, held = (sorted({name for e in part for name in named(e, task)}) for part in (train, validation))
    if len(names) < (1 if task != "class" else 2):
        raise DataError(
            "there is a single class, and a classifier needs two", found=", ".join(names) or "none",
            expected="two classes or more", fix="check `fields`, or give examples of another class",
        )  # fmt: skip
    if unseen := sorted(set(held) - set(names)):
        raise DataError(
            f"{len(unseen)} classes are in the validation part alone, so they can't be learned",
            found=", ".join(unseen[:5]), expected=", ".join(names[:12]),
            fix="give more examples of these, leave them out, or hold out a smaller share",
        )  # fmt: skip
    if task == "tag":
        names = [OUTSIDE, *(f"{part}-{name}" for name in names for part in "BI")]
    return Labels(task, tuple(names))


def named(example: Example, task: Task) -> tuple[str, ...]:
    """The classes that an example names; of a tagger the kinds of its spans."""
    if task == "class":
        return () if example.label is None else (example.label,)
    return example.labels if task == "many" else tuple(s.label for s in example.spans)


class ExampleGroups:
    """One prompt group per example. `report` counts the texts that were cut or dropped."""

    def __init__(self, examples: Sequence[Example], encode: TextEncoder, labels: Labels) -> None:
        self.labels, self.number = labels, {name: i for i, name in enumerate(labels.names)}
        self.examples: list[Example] = []
        self.encoded: list[Encoded] = []
        self.report = Counter(texts=len(examples))
        for example in examples:
            found = encode(example.text, example.pair)
            if found is None:
                self.report["too long, left out"] += 1
                continue
            self.report[f"too long, cut at the {encode.too_long}"] += found.cut
            self.examples.append(example)
            self.encoded.append(found)
        if not self.examples:
            raise DataError(
                "no example fits max_length", found=f"{len(examples)} examples", expected=f"{encode.max_length} tokens",
                fix=f"raise max_length, or set {Setting('too_long', 'right')}",
            )  # fmt: skip
        seen = hashlib.sha256()
        for example, found in zip(self.examples, self.encoded, strict=True):
            seen.update(f"{example.id} {found.ids} {self._answer(example, found)}\n".encode())
        seen.update(repr((labels.names, sorted(labels.weights.items()))).encode())
        self.digest = seen.hexdigest()

    def __len__(self) -> int:
        return len(self.examples)

    def sizes(self, layout: Layout) -> np.ndarray:
        return np.array([len(e.ids) for e in self.encoded])

    def __getitem__(self, i: int) -> PromptGroup:
        example, found = self.examples[i], self.encoded[i]
        answer = self._answer(example, found)
        if self.labels.task != "tag":
            ids, weights = np.array(found.ids), self.labels.weights
            whole = {"labels" if self.labels.task == "many" else "label": answer, "weight": 1.0}
            if self.labels.task == "class":
                whole["weight"] = weights.get(str(example.label), 1.0)
            return PromptGroup(example.id, ids, (Completion(ids[:0], per_completion=whole),))
        return self._tagged(example.id, np.array(found.ids), answer)

    def _tagged(self, name: str, ids: np.ndarray, tags: dict[int, int]) -> PromptGroup:
        """The first token, a control token, is the prompt; all others may be tagged."""
        mask = np.zeros(len(ids) - 1, np.uint8)
        label, weight = np.zeros(len(ids) - 1, np.float32), np.ones(len(ids) - 1, np.float32)
        for token, tag in tags.items():
            kind = kind_of(self.labels.names[tag])
            mask[token - 1], label[token - 1], weight[token - 1] = 1, tag, self.labels.weights.get(kind, 1.0)
        return PromptGroup(name, ids[:1], (Completion(ids[1:], mask, {"label": label, "weight": weight}),))

    def balanced(self) -> dict[str, float]:
        """Weights that give every class the same share of the loss, of a tagger every kind of span and O; their mean over the
        texts, or a tagger's words, is 1."""
        if self.labels.task == "tag":
            every = [kind_of(tag) for e, f in zip(self.examples, self.encoded, strict=True) for tag in tags(f, e.spans)]
        else:
            every = [name for e in self.examples for name in named(e, self.labels.task)]
        counts = Counter(every)
        return {name: len(every) / (len(counts) * n) for name, n in counts.items()}

    def _answer(self, example: Example, found: Encoded) -> Any:
        if self.labels.task == "class":
            return self.number[str(example.label)]
        if self.labels.task == "many":
            return [float(name in example.labels) for name in self.labels.names]
        return {
            token: self.number[tag] for token, tag in zip([w[0] for w in found.words], tags(found, example.spans), strict=True)
        }


def tags(found: Encoded, spans: Sequence[Span]) -> list[str]:
    """A tag for each word: B- where it is the first that a span touches, I- for the others of it, else O."""
    out, begun = [], set()
    for _, start, end in found.words:
        inside = next((s for s in spans if s.start < end and start < s.end), None)
        out.append(OUTSIDE if inside is None else f"{'I' if inside in begun else 'B'}-{inside.label}")
        if inside is not None:
            begun.add(inside)
    return out


def spans_of(found: Encoded, tagged: Sequence[str]) -> tuple[Span, ...]:
    """The spans that the tags of the words describe; an I- tag without a B- tag before it begins a span."""
    spans: list[Span] = []
    before = OUTSIDE
    for (_, start, end), tag in zip(found.words, tagged, strict=True):
        part, _, label = tag.partition("-")
        if part == "I" and before.partition("-")[2] == label:
            spans[-1] = Span(start=spans[-1].start, end=end, label=label)
        elif label:
            spans.append(Span(start=start, end=end, label=label))
        before = tag
    return tuple(spans)
