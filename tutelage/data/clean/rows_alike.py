"""Which rows say nearly the same: compared by what is asked and what is answered, without the instruction, passage or system
prompt that many rows share. Two questions about one passage are two rows, however long the passage is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tutelage.data.clean import dedup
from tutelage.data.clean.dedup import U64

MANY = 3  # rows that share a stretch of text make it context
LEAST_WORDS = 64  # shorter rows differ by one number or name and mean something else
OTHER_WORDS = 3  # a stretch of so many words that only one of two rows has is another question, not an edit


@dataclass(slots=True, frozen=True)
class _Row:
    asked: U64  # shingles of all that stands before the answer
    own: U64  # the same without what many rows share
    answer: U64
    asked_text: str
    long_answer: bool


def parts_of(row: dict[str, Any]) -> tuple[str, str]:
    """(what is asked, what is answered) of a row of a records file. Labels, scores and tool calls are answers."""
    extra = {k: row[k] for k in ("label", "labels", "spans", "scores", "step_scores") if k in row}
    said = [json.dumps(extra, ensure_ascii=False)] if extra else []
    if "text" in row:
        return "\n".join(str(row[k]) for k in ("text", "pair") if row.get(k)), "\n".join(said)
    asked: list[dict[str, Any]] = list(row.get("prompt") or ())
    answers = [row[k] for k in ("chosen", "rejected", "answer") if isinstance(row.get(k), list)]
    if "messages" in row:
        asked = list(row["messages"])
        if asked[-1]["role"] == "assistant":
            answers = [[asked.pop()]]
    if isinstance(row.get("answer"), str):
        said.append(row["answer"])
    said += [_text(message) for turns in answers for message in turns]
    tools = [json.dumps(row["tools"], ensure_ascii=False)] if row.get("tools") else []
    return "\n".join([*tools, *map(_text, asked)]), "\n".join(said)


def _text(message: dict[str, Any]) -> str:
    calls = message.get("tool_calls")
    return str(message["content"]) + (json.dumps(calls, ensure_ascii=False) if calls else "")


def long_enough(row: dict[str, Any]) -> bool:
    return dedup.word_count("\n".join(parts_of(row))) >= LEAST_WORDS


def near_rows(numbers: Sequence[int], fetch: Callable[[int], dict[str, Any]], threshold: float) -> dict[int, int]:
    """{row: an earlier kept row that it nearly equals}, of the rows `numbers`; `fetch` reads one of them."""
    shared = dedup.common_shingles((parts_of(fetch(i))[0] for i in numbers), MANY)

    def own_text(i: int) -> str:
        asked, answer = parts_of(fetch(i))
        return "\n".join([*dedup.runs_without(asked, shared), answer])

    @lru_cache(maxsize=512)
    def row(i: int) -> _Row:
        asked, answer = parts_of(fetch(i))
        own = "\n".join(dedup.runs_without(asked, shared))
        of_asked, of_own, of_answer = dedup.shingles([asked, own, answer])
        return _Row(of_asked, of_own, of_answer, asked, dedup.word_count(answer) >= LEAST_WORDS)

    def alike(a: int, b: int) -> bool:
        return _alike(row(numbers[a]), row(numbers[b]), threshold)

    found = dedup.twins(dedup.band_keys(map(own_text, numbers)), alike)
    return {numbers[a]: numbers[b] for a, b in found.items()}


def _alike(a: _Row, b: _Row, threshold: float) -> bool:
    if dedup.jaccard(a.answer, b.answer) < threshold or dedup.jaccard(a.asked, b.asked) < threshold:
        return False
    if a.long_answer and b.long_answer:
        return True
    if dedup.jaccard(a.own, b.own) < threshold:
        return False
    return not (_asks_more(a, b) and _asks_more(b, a))


def _asks_more(a: _Row, b: _Row) -> bool:
    """Whether `a` has a stretch of several words that `b` lacks."""
    runs = dedup.runs_without(a.asked_text, b.asked)
    return max(map(dedup.word_count, runs), default=0.0) >= OTHER_WORDS
