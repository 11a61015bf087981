"""Samples to look at: continuations of opening words and of held-out documents, and questions with the model's answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from tutelage.evaluate.questions import Generate, Prediction

SAMPLED = {"temperature": 0.8, "top_p": 0.95}
Encode = Callable[[str], Sequence[int]]


def continuations(
    generate: Generate,
    encode: Encode,
    begin: Sequence[int],
    *,
    documents: Sequence[str] = (),
    openings_used: int = 6,
    documents_used: int = 4,
    max_tokens: int = 96,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows `{"kind", "prompt", "continuation", "truth", "sampling"}`.

    The first words of some held-out `documents` are continued once by sampling (temperature 0.8, top-p 0.95, the given seed).
    The beginnings (about a fifth, at most 160 characters, cut at a space) of others are continued greedily, next to the real
    continuation (`truth`). Both are evenly spread.
    """
    sampling = {**SAMPLED, "max_tokens": max_tokens, "seed": seed}
    prompts = openings(documents, openings_used)
    texts = generate([[*begin, *encode(p)] for p in prompts], sampling) if prompts else []
    rows = [_row("prompt", p, text, None, sampling) for p, text in zip(prompts, texts, strict=True)]
    long = [d for d in documents if len(d) >= 160]
    chosen = [long[i * len(long) // documents_used] for i in range(min(documents_used, len(long)))]
    cuts = [_beginning(d) for d in chosen]
    greedy: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_tokens}
    texts = generate([[*begin, *encode(d[:cut])] for d, cut in zip(chosen, cuts, strict=True)], greedy) if chosen else []
    for document, cut, text in zip(chosen, cuts, texts, strict=True):
        rows.append(_row("held-out document", document[:cut], text, document[cut : cut + max(80, len(text))], greedy))
    return rows


def openings(documents: Sequence[str], most: int, words: int = 3) -> list[str]:
    """The first words of up to `most` documents, evenly spread, each opening once."""
    every = list(dict.fromkeys(m[0] for d in documents if (m := re.match(rf"\s*\S+(?:[^\S\n]+\S+){{0,{words - 1}}}", d))))
    return [every[i * len(every) // min(most, len(every))] for i in range(min(most, len(every)))]


def answers(predictions: Sequence[Prediction], most: int = 24) -> list[dict[str, Any]]:
    """About `most` predictions, 2 to 6 a task, evenly spread over it: right and wrong as they come, not picked."""
    tasks: dict[str, list[Prediction]] = {}
    for p in predictions:
        tasks.setdefault(p.task, []).append(p)
    each = max(2, min(6, most // max(1, len(tasks))))
    rows = []
    for group in tasks.values():
        rows += [group[i * len(group) // min(each, len(group))].to_json() for i in range(min(each, len(group)))]
    return rows


def _beginning(document: str) -> int:
    """Where to cut: before a space, so that the continuation begins as its tokens do."""
    limit = min(160, max(40, len(document) // 5))
    return max(document.rfind(" ", 20, limit), 0) or limit


def _row(kind: str, prompt: str, text: str, truth: str | None, sampling: dict[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "prompt": prompt, "continuation": text, "truth": truth, "sampling": sampling}
