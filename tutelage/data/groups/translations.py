"""Source and target texts as prompt groups for encoder-decoders: translation, summarisation and similar tasks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tutelage.data.groups.dropped import NothingLeft
from tutelage.data.groups.groups import Completion, Layout, PromptGroup
from tutelage.errors import DataError, Setting
from tutelage.records import Conversation
from tutelage.tokenizer.load import TokenizerFolder


@dataclass(slots=True, frozen=True)
class Marks:
    """The tokens that a model's targets begin and end with."""

    start: tuple[int, ...]  # the decoder's first token, and one that is forced after it
    ends: tuple[int, ...]


def pair_of(conversation: Conversation) -> tuple[str, str]:
    """Source and target. Raises `DataError` for a dialogue of several turns."""
    roles = [m.role for m in conversation.messages]
    if roles != ["user", "assistant"]:
        raise DataError(
            "an encoder-decoder needs one source and one target, not a dialogue", file=conversation.source, found=" ".join(roles),
            expected="a prompt and its completion", fix="give prompt/completion rows, or train a decoder with `tutelage sft`",
        )  # fmt: skip
    return conversation.messages[0].content, conversation.messages[1].content


class PairEncoder:
    """Texts -> ids as the tokenizer writes a source, and a target between the model's marks. Content never becomes control."""

    def __init__(self, words: TokenizerFolder, marks: Marks) -> None:
        self.tokenizer, self.marks = words.plain, marks

    def source(self, text: str, most: int) -> tuple[list[int], bool]:
        """At most `most` ids, and whether the end of the text was cut. Control tokens are never cut."""
        found = self.tokenizer.encode(text, add_special_tokens=False)
        room = most - self.tokenizer.num_special_tokens_to_add(False)
        cut = len(found) > room
        if cut:
            found.truncate(max(room, 0))
        return list(self.tokenizer.post_process(found, None, True).ids), cut

    def target(self, text: str) -> tuple[list[int], list[int]]:
        """Ids and their mask: all are learned but those that the model starts with by itself."""
        start, ends = self.marks.start, self.marks.ends
        ids = list(self.tokenizer.encode(text, add_special_tokens=True).ids)
        begin = list(start[:1]) if ids[: len(start) - 1] == list(start[1:]) else list(start)
        if not ids or ids[-1] not in ends:
            ids.append(ends[0])
        return [*begin, *ids], [*[0] * len(begin), *[1] * len(ids)]


class PairedTexts:
    """One prompt group per pair: source as prompt, target as its only completion. `report` counts cut and dropped pairs."""

    def __init__(
        self, records: Sequence[Conversation], encode: PairEncoder, max_source: int, max_target: int, *, cut: bool = True
    ) -> None:
        self.report = Counter(pairs=len(records))
        self.records: list[Conversation] = []
        self.prompt_groups: list[PromptGroup] = []
        seen, lengths = hashlib.sha256(), []
        for record in records:
            source, target = pair_of(record)
            ids, over = encode.source(source, max_source)
            made, mask = encode.target(target)
            lengths.append(len(made))
            if over and not cut:
                self.report["source too long, left out"] += 1
                continue
            if len(made) > max_target:  # a target without its end would teach not to end
                self.report["target too long, left out"] += 1
                continue
            self.report["source too long, cut at the right"] += over
            self.records.append(record)
            self.prompt_groups.append(
                PromptGroup(record.id, np.array(ids), (Completion(np.array(made), np.array(mask, np.uint8)),))
            )
            seen.update(f"{record.id} {ids} {made}\n".encode())
        if not self.prompt_groups:
            why = [f"{count:,} {what}" for what, count in self.report.items() if count]
            fixes = ["raise max_target"] * bool(self.report["target too long, left out"])
            fixes += [f"raise max_length, or set {Setting('too_long', 'right')}"] * bool(self.report["source too long, left out"])
            raise NothingLeft(
                "no pair is short enough", found=", ".join(why), fix="; ".join([*fixes, "or give shorter texts"]),
                expected=f"at most {max_source} tokens of a source and {max_target} of a target; the shortest has {min(lengths)}",
            )  # fmt: skip
        self.digest = seen.hexdigest()

    def __len__(self) -> int:
        return len(self.prompt_groups)

    def __getitem__(self, i: int) -> PromptGroup:
        return self.prompt_groups[i]

    def sizes(self, layout: Layout) -> np.ndarray:
        return np.array([f.size(layout) for f in self.prompt_groups])
