"""Rows about answers as they come -> `Preference`, `Rating`, `Prompt`.

| record | keys | becomes |
| --- | --- | --- |
| preference | prompt, chosen, rejected: three strings | completion: no chat template |
| | question, chosen, rejected (system): strings | chat |
| | chosen, rejected: lists of messages, with or without the prompt before them (prompt: a list, or a user's words) | chat |
| | chosen, rejected: transcripts of "Human: … Assistant: …" | chat |
| | conversations, chosen, rejected: ShareGPT turns | chat |
| rating | any conversation row, with label or kto_tag (true, false), or score, or scores {aspect: number} | chat or completion |
| | prompt, completions [steps], labels [one a step] | completion |
| prompt | messages; or prompt; or question; with answer where there is one | chat; completion; chat |

An answer that is a list of texts or numbers: any of them is right (the first is `answer`, the others `meta.accepted`).

`margin`, or score_chosen and score_rejected, say by how much the chosen answer is better. Numbers and labels may be text, as all
of CSV is; an empty text says nothing. A row that cannot be trusted is a `DataError` with file, line and field; nothing is
guessed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tutelage.chat.message_keys import text_content
from tutelage.data.sources import answers, conversations
from tutelage.data.sources.conversations import Row, to_messages
from tutelage.data.sources.mapping import mapped
from tutelage.data.sources.row_keys import behind_system, licence_of, meta_of, system_of, with_beside, with_system, without_system
from tutelage.errors import DataError, Setting
from tutelage.records import Message, Preference, Prompt, Rating

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
VERDICTS = ("label", "kto_tag", "score", "rating", "scores")
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
LABELS = {"true": 1.0, "yes": 1.0, "1": 1.0, "false": 0.0, "no": 0.0, "0": 0.0}
ANSWERS = ("answer", "solution", "ground_truth", "completion", "canonical_solution")


def read(kind: str, row: Row, *, file: str | Path | None, line: int | None, source: str, fields: Mapping[str, str] | None) -> Any:
    """The record of one row. Raises `DataError` (file, line, field, found, expected, fix)."""
    try:
        if not isinstance(row, Mapping):
            raise DataError("a row must be a JSON object", found=row, expected="{...}")
        renamed = mapped(row, fields)
        beside = {k: row[k] for k in renamed if k in row and k not in (fields or {}).values()}
        row = {k: v for k, v in row.items() if k not in set((fields or {}).values())} | renamed
        made = READERS[kind](row, source)
        return replace(made, meta=with_beside(made.meta, beside)) if beside else made
    except DataError as error:
        raise error.but(file=file, line=line) from error


def _preference(row: Row, source: str) -> Preference:
    for key in ("chosen", "rejected"):
        if key not in row:
            raise DataError(
                "a preference needs two answers", field=key, found=", ".join(row), expected="chosen and rejected",
                fix=f"map the names of your fields: {Setting('fields', '{chosen: YOUR_KEY, rejected: YOUR_KEY}')}",
            )  # fmt: skip
    before, style = _before(row)
    if style == "completion":
        conversations.refuse_tools(row)
    prompts, answers = [], []
    for key, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if not isinstance(row[key], str | list | tuple | Mapping):
            raise DataError(
                f"the {key} answer is missing" if row[key] is None else f"the {key} answer is no text", field=key,
                found="null" if row[key] is None else row[key],
                expected="a string" if isinstance(row[other], str) else "a string, or a list of {role, content}",
                fix="fill it in",
            )  # fmt: skip
        turns = _turns(row[key], key, style)
        turns = turns if style == "completion" else without_system(row, turns)
        _follows(before, turns, _asked_in(row), f"{key}[0]" if isinstance(row[key], list) else key)
        prompt, answer = _split(before, turns, key)
        prompt = prompt if style == "completion" else with_system(row, prompt)
        prompts.append(prompt)
        answers.append(answer)
    if prompts[0] != prompts[1]:
        raise DataError(
            "chosen and rejected have different prompts", field="rejected", found=_short(prompts[1]), expected=_short(prompts[0]),
            fix="give rows whose conversations differ in the last answer only",
        )  # fmt: skip
    if answers[0] == answers[1]:
        raise DataError(
            "chosen and rejected are the same answer", field="rejected", found=_short(answers[1]), expected="another answer",
            fix="remove the row: it has nothing to teach",
        )  # fmt: skip
    for key, prompt, answer in zip(("chosen", "rejected"), prompts, answers, strict=True):
        conversations.check_order([*prompt, *answer], _places(row, key, len(before), len(prompt) + len(answer), style))
    meta = meta_of(row, _read_of_preference(row), [*prompts[0], *answers[0], *answers[1]])
    return Preference.make(
        prompts[0], answers[0], answers[1], source=source, style=style, margin=_margin(row), tools=conversations.read_tools(row),
        licence=licence_of(row), meta=meta,
    )  # fmt: skip


def _read_of_preference(row: Row) -> set[str]:
    """The keys that a preference is made of."""
    asked = _asked_in(row)
    margin = {"margin"} if _said(row.get("margin")) else {"score_chosen", "score_rejected"}
    more = {"input"} if asked in ("question", "instruction") or isinstance(row.get(asked), str) else set()
    return {"chosen", "rejected", asked, *margin, *more}


def _before(row: Row) -> tuple[list[Message], str]:
    """What both answers follow, as far as the row says it apart, and the style."""
    if isinstance(row.get("conversations"), list):
        return without_system(row, conversations.sharegpt_turns(row)), "chat"
    given = row.get("prompt")
    if isinstance(given, list):
        return without_system(row, to_messages(given, "prompt")), "chat"
    texts = isinstance(row["chosen"], str)
    if given is not None and not isinstance(given, str):
        raise DataError("the prompt is not text", field="prompt", found=given, expected="a string, or a list of messages")
    if given is not None and texts:
        return [_completed(row, given)], "completion"
    asked = row.get("question", row.get("instruction", given))
    if asked is None:
        return [], "chat"
    more = text_content(row.get("input"), "input")
    whole = f"{text_content(asked, 'question')}\n\n{more}" if more.strip() else asked
    return [conversations.turn("user", whole, "question")], "chat"


def _completed(row: Row, prompt: Any) -> Message:
    """A prompt that no chat template is put around."""
    said = conversations.turn("user", prompt, "prompt")  # an empty one is refused with a system prompt too
    return Message(role="user", content=behind_system(row, said.content))


def _asked_in(row: Row) -> str:
    """The key that `_before` reads."""
    if isinstance(row.get("conversations"), list):
        return "conversations"
    return (
        "prompt" if isinstance(row.get("prompt"), list) else next((k for k in ("question", "instruction") if k in row), "prompt")
    )


def _follows(before: list[Message], turns: list[Message], asked: str, field: str) -> None:
    """Raises `DataError` for a conversation of its own where the row has a prompt that it does not begin with."""
    if not before or turns[: len(before)] == before or not turns:
        return
    if turns[0].role == "system" or (turns[0].role == "user" and before[-1].role == "user"):
        raise DataError(
            f"this conversation does not begin with the row's `{asked}`", field=field, found=_short(turns[:1]),
            expected=f"the turns of `{asked}` ({_short(before)}), or the assistant's answer to them",
            fix=f"leave `{asked}` out where the conversations hold what was asked, or make the two agree",
        )  # fmt: skip


def _places(row: Row, key: str, before: int, count: int, style: str) -> list[str]:
    """Where in its row each of `count` turns stands, of which the first `before` were given apart from the answers, and the very
    first as `system` where the row has one."""
    if style == "chat" and system_of(row).strip():
        return ["system", *_places(row, key, before, count - 1, "completion")]
    asked = _asked_in(row)
    apart = [f"{asked}[{i}]" if isinstance(row.get(asked), list) else asked for i in range(before)]
    whole = isinstance(row[key], list)
    skipped = len(row[key]) - (count - before) if whole else 0  # the prompt again
    return apart + [f"{key}[{skipped + i}]" if whole else key for i in range(count - before)]


def _turns(value: Any, field: str, style: str) -> list[Message]:
    if isinstance(value, str):
        if style == "chat" and TURN.match(value):
            return transcript(value, field)
        return [conversations.turn("assistant", value.removesuffix(conversations.END_MARK), field)]
    if isinstance(value, Mapping):
        return list(conversations.sharegpt_turns({"conversations": [value]})) if "from" in value else to_messages([value], field)
    return to_messages(value, field)


def _split(before: list[Message], turns: list[Message], field: str) -> tuple[list[Message], list[Message]]:
    """The prompt and the answer: a prompt that the row gives apart may be repeated before the answer."""
    if before and turns[: len(before)] == before:
        turns = turns[len(before) :]
    start = next((i for i in range(len(turns), 0, -1) if turns[i - 1].role == "user"), 0)
    prompt, answer = [*before, *turns[:start]], turns[start:]
    if not prompt or not answer or answer[-1].role != "assistant":
        raise DataError(
            "this is not a prompt with an answer", field=field, found=" ".join(m.role for m in [*before, *turns]),
            expected="turns that end with the assistant's, after at least one of the user",
        )  # fmt: skip
    return prompt, answer


def transcript(text: str, field: str) -> list[Message]:
    """Turns of a text like "Human: … Assistant: …"."""
    parts = TURN.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise DataError("not a transcript", field=field, found=text[:80], expected="Human: … Assistant: …")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [conversations.turn(roles[who], said.strip(), field) for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def _rating(row: Row, source: str) -> Rating:
    if isinstance(_parsed(row.get("completions")), list):
        return _steps(row, source)
    scores = _scores(row)
    verdict = _verdict(row)
    if isinstance(row.get("messages"), list) and "completion" not in row:
        turns, style = with_system(row, to_messages(row["messages"])), "chat"
        places = conversations.places_of(row, "messages", len(turns))
        tools, meta = conversations.read_tools(row), meta_of(row, {"messages", verdict}, turns)
    else:
        made = conversations.to_conversation({k: v for k, v in row.items() if k != verdict})
        places = None
        turns, style, tools, meta = list(made.messages), made.style, list(made.tools), made.meta
    prompt, answer = _split([], turns, "messages" if isinstance(row.get("messages"), list) else "completion")
    conversations.check_order(turns, places)
    return Rating.make(
        prompt, answer, source=source, style=style, scores=scores, tools=tools, licence=licence_of(row), meta=meta
    )  # fmt: skip


def _verdict(row: Row) -> str:
    """The key that `_scores` reads; others are kept in `meta`."""
    return next((key for key in ("label", "kto_tag", "scores", "score", "rating") if _said(row.get(key)) and row[key] != {}), "")


def _scores(row: Row) -> dict[str, float]:
    """By aspect. A verdict that is null or an empty text is none."""
    given = {key: row[key] for key in VERDICTS if _said(row.get(key))}
    for key in ("label", "kto_tag"):
        if key in given:
            return {"desirable": _label(given[key], key)}
    scores = _parsed(given.get("scores"))
    if scores and not isinstance(scores, Mapping):
        raise DataError(
            "scores are numbers by aspect", field="scores", found=scores, expected="{aspect: number}",
            fix="give one number as `score`, or an object of several, in CSV as JSON",
        )  # fmt: skip
    if scores:
        return {str(k): _number(v, f"scores.{k}") for k, v in scores.items()}
    for key in ("score", "rating"):
        if key in given:
            return {"score": _number(given[key], key)}
    empty = next((key for key in VERDICTS if key in row), None)
    raise DataError(
        "the rating has no score or label", field=empty, found=f"keys {', '.join(row)}" if empty is None else "nothing",
        expected=f"one of: {', '.join(VERDICTS)}", fix=f"map the name of your field: {Setting('fields', '{label: YOUR_KEY}')}",
    )  # fmt: skip


def _steps(row: Row, source: str) -> Rating:
    steps, labels = _parsed(row["completions"]), _parsed(row.get("labels"))
    if not isinstance(labels, list) or len(labels) != len(steps) or not steps:
        raise DataError("each step needs a label", field="labels", found=labels, expected=f"a list of {len(steps)}")
    texts = [text_content(step, f"completions[{i}]") for i, step in enumerate(steps)]
    prompt = row.get("prompt")
    chat = isinstance(prompt, list)
    before = with_system(row, to_messages(prompt, "prompt")) if chat else [_completed(row, prompt)]
    if not chat:
        conversations.refuse_tools(row)
    joined = [text if i == 0 or text.startswith(("\n", " ")) else f"\n{text}" for i, text in enumerate(texts)]
    answer = conversations.turn("assistant", "".join(joined), "completions")
    return Rating.make(
        before, [answer], source=source, steps=tuple(joined), tools=conversations.read_tools(row),
        step_scores=tuple(_number(_word(label), f"labels[{i}]") for i, label in enumerate(labels)),
        style="chat" if chat else "completion", licence=licence_of(row),
        meta=meta_of(row, {"prompt", "completions", "labels"}, [*before, answer]),
    )  # fmt: skip


def _prompt(row: Row, source: str) -> Prompt:
    key = next((k for k in ANSWERS if row.get(k) is not None), None)
    answer, accepted = (None, []) if key is None else answers.read(row[key], key)
    asked, turns = _asked(row)
    style = "completion" if isinstance(turns, str) else "chat"
    if isinstance(turns, str):
        conversations.refuse_tools(row)
        said = [_completed(row, turns)]
    else:
        said = with_system(row, turns)
    if said[-1].role == "assistant":
        answer = said[-1].content if answer is None else answer
        said = said[:-1]
    if not said or said[-1].role not in ("user", "tool"):
        raise DataError("a prompt ends with the user's words", field="messages", found=" ".join(m.role for m in said))
    # What verifiers, tests and environments need stands in the row, so that no key is refused for what it resembles.
    meta = meta_of(row, {asked, key or asked}, [*said, *(turns if isinstance(turns, list) else [])], reserved=None)
    return Prompt.make(
        said, source=source, answer=answer, style=style, tools=conversations.read_tools(row), licence=licence_of(row),
        meta=answers.with_accepted(meta, accepted),
    )  # fmt: skip


def _asked(row: Row) -> tuple[str, list[Message] | str]:
    """The key that asks, and its turns, or the text of a prompt that no chat template is put around."""
    for key in ("messages", "prompt"):
        if isinstance(row.get(key), list):
            return key, to_messages(row[key], key)
    if "question" in row:
        return "question", [conversations.turn("user", row["question"], "question")]
    if "prompt" in row:
        return "prompt", conversations.turn("user", row["prompt"], "prompt").content
    raise DataError("a prompt row asks nothing", found=", ".join(row), expected="messages, prompt or question")


def _margin(row: Row) -> float | None:
    if _said(row.get("margin")):
        return _number(row["margin"], "margin")
    keys = ("score_chosen", "score_rejected")
    if all(_said(row.get(key)) for key in keys):
        better, worse = (_number(row[key], key) for key in keys)
        return better - worse
    return None


def _said(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and not value.strip())


def _parsed(value: Any) -> Any:
    """A list or an object, or the JSON of one, as CSV has it."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _word(value: Any) -> Any:
    """A number or a truth value, where text says one."""
    return LABELS.get(value.strip().lower(), value) if isinstance(value, str) else value


def _number(value: Any, field: str) -> float:
    read = float(value) if isinstance(value, str) and NUMBER.fullmatch(value.strip()) else value
    if isinstance(read, bool | int | float) and math.isfinite(read):
        return float(read)
    raise DataError(
        "not a number",
        field=field,
        found="null" if value is None else value,
        expected="a finite number",
        fix="write it in figures",
    )


def _label(value: Any, field: str) -> float:
    read = _word(value)
    if isinstance(read, bool | int | float) and read in (0, 1):
        return float(read)
    raise DataError(
        "a label is true or false", field=field, found=value, expected="true (desirable) or false; as text also yes, no, 1 or 0",
        fix="write one of these",
    )  # fmt: skip


def _short(turns: list[Message]) -> str:
    return " / ".join(f"{m.role}: {m.content[:60]}" for m in turns)[-200:]


READERS: dict[str, Callable[[Row, str], Any]] = {"preferences": _preference, "ratings": _rating, "prompts": _prompt}
