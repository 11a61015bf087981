"""Ratings as prompt groups: every rating once, prompts shared, steps found in the tokens or refused by line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.guarantees import tiny
from tutelage.chat.templates import styles
from tutelage.data.groups.groups import collate
from tutelage.data.groups.pairs import PreferencePairs
from tutelage.data.groups.ratings import MOST, RatedGroups, aspects_of, ratings_of, step_ends, steps_of
from tutelage.data.groups.source import count
from tutelage.data.tokens.shards import Segments, tokenize
from tutelage.errors import DataError
from tutelage.records import Message, Preference, Rating, to_json
from tutelage.tokenizer.load import TokenizerFolder

STEPS = ("two and two: 4.", "\nthen 🙂 café: 5!\n", "\n  so the door is red")


def said(text: str) -> list[Message]:
    return [Message(role="assistant", content=text)]


def asked(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def judged(number: int, prompt: str = "how many?", style: str = "chat") -> Rating:
    steps = tuple(s.replace("two", "two " * number) for s in STEPS)
    return Rating.make(asked(prompt), said("".join(steps)), source="t", steps=steps, step_scores=(1.0, 0.0, 0.5), style=style)


def segments(rows: list[Rating] | list[Preference], folder: Path, template: str = "default") -> Segments:
    records = tiny.records_folder(folder / "records", [*rows, rows[0]], 1)
    tokenize(records, tiny.tokenizer(template), folder / "tokens", workers=1)
    return Segments.open(folder / "tokens" / "train")


def decoded(template: str = "default"):
    return TokenizerFolder.open(tiny.tokenizer(template)).decode


@pytest.mark.parametrize("template", sorted(styles()))
@pytest.mark.parametrize("style", ["chat", "completion"])
def test_steps_are_found_in_every_template(template: str, style: str, tmp_path: Path) -> None:
    """A label on the token before or after a step's end teaches another place than the one that is asked later: what is decoded
    up to each place has to end with its step, whatever the template does with white space at an answer's ends."""
    rows = [judged(i, style=style) for i in (1, 2)]
    found = segments(rows, tmp_path, template)
    streams = steps_of([to_json(r) for r in rows], found, decoded(template), tmp_path / "train.jsonl")
    for i, (row, stream) in enumerate(zip(rows, streams, strict=True)):
        places = np.flatnonzero(np.isfinite(stream))
        assert stream[places].tolist() == [1.0, 0.0, 0.5]
        for place, step in zip(places, row.steps, strict=True):
            assert found.mask(i)[place] == 1
            text = decoded(template)(found.ids(i)[: place + 1])
            assert text.rstrip().endswith(step.strip()), (text, step)
            assert not decoded(template)(found.ids(i)[:place]).rstrip().endswith(step.strip())


def test_steps_that_cannot_be_found_are_refused(tmp_path: Path) -> None:
    """Steps that are not the answer, that come twice, or that end inside a token: guessing a place would teach noise."""
    words = TokenizerFolder.open(tiny.tokenizer())
    ids = np.array(words.encode_text("the cat sat on the mat"))
    assert words.decode(ids[: step_ends(ids, ["the cat", " sat on", " the mat"], words.decode)[1] + 1]) == "the cat sat on"
    for steps, about in (
        (["the dog", " ran"], "not found"), (["the"], "not found"), (["", ""], "not found"),
        (["the cat sat o", "n the mat"], "no last token"), (["the cat", "  ", " sat on the mat"], "not found"),
        (["the cat", " ", "sat on the mat"], "no last token"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=about):
            step_ends(ids, steps, words.decode)
    rows = [judged(1), judged(2)]
    records = [to_json(r) for r in rows]
    records[1]["steps"] = ["something else"]
    with pytest.raises(DataError) as caught:
        steps_of(records, segments(rows, tmp_path), decoded(), tmp_path / "train.jsonl")
    assert caught.value.line == 2 and caught.value.field == "steps"


def test_ratings_of_one_prompt_are_a_family(tmp_path: Path) -> None:
    """Four answers to a prompt cost one prompt; a prompt with hundreds must not become one forward pass."""
    scores = [{"good": float(i), **({"kind": 1.0} if i % 2 else {})} for i in range(9)]
    rows = [Rating.make(asked(f"what is {i % 3}?"), said(f"it is {i} two"), source="t", scores=s) for i, s in enumerate(scores)]
    found = segments(rows, tmp_path)
    records = [to_json(r) for r in rows]
    aspects = aspects_of(records)
    ratings = ratings_of(records, aspects)
    assert aspects == ("good", "kind") and math.isnan(ratings[0, 1]) and ratings[1].tolist() == [1.0, 1.0]
    made = RatedGroups(found, 64, ratings=ratings)
    prompt_groups = [made[i] for i in range(len(made))]
    assert [len(f.completions) for f in prompt_groups] == [3, 3, 3] and made.members[0] == [0, 3, 6]
    assert sorted(e.per_completion["ratings"][0] for f in prompt_groups for e in f.completions) == list(range(9))
    for layout in ("tree", "packed"):
        assert (
            made.sizes(layout).tolist()
            == [f.size(layout) for f in prompt_groups]
            == [collate([f], layout).ids.numel() for f in prompt_groups]
        )  # type: ignore[arg-type]
    assert count(prompt_groups, "tree")["ratings"] == 9 + 4
    many = [Rating.make(asked("?"), said(f"it is {i}"), source="t", scores={"good": 1}) for i in range(MOST + 3)]
    split = RatedGroups(segments(many, tmp_path / "many"), 64, ratings=np.ones((MOST + 3, 1), np.float32))
    assert [len(m) for m in split.members] == [MOST, 3]


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    """Silence about ratings that were too long, or that say nothing of the aspects asked for."""
    rows = [
        Rating.make(asked(f"{i}?"), said("two " * (1 + 20 * (i == 1)) + f"{i}"), source="t", scores={"a": 1}) for i in range(4)
    ]
    found = segments(rows, tmp_path)
    ratings = np.array([[1.0], [2.0], [np.nan], [4.0]], np.float32)
    made = RatedGroups(found, 16, ratings=ratings)
    assert made.report == {
        "ratings": 4, "left out, too long": 1, "left out, without a supervised token": 0,
        "left out, without a score": 1,
    }  # fmt: skip
    assert [made[i].completions[0].per_completion["ratings"] for i in range(len(made))] == [[1.0], [4.0]]
    for policy in ("left", "right"):
        cut = RatedGroups(found, 16, policy, ratings=ratings)
        assert cut.report["left out, without a score"] == 1 and len(cut) == 3
        assert max(len(f.prompt) + len(e.ids) for f in (cut[i] for i in range(3)) for e in f.completions) <= 16
        assert cut.digest != made.digest
    assert made.digest != RatedGroups(found, 16, ratings=ratings + 1).digest
    with pytest.raises(DataError, match="no rating is left"):
        RatedGroups(found, 3, ratings=ratings)


@pytest.mark.parametrize("template", ["chatml", "llama3", "default"])
def test_answers_end_where_a_model_would_end_them(template: str, tmp_path: Path) -> None:
    """ChatML writes a new line behind each turn. A reward read there is asked for at another token when a model's own answer is
    scored, which ends with the end token: the reward model would never have been trained at that place."""
    words = TokenizerFolder.open(tiny.tokenizer(template))
    rows = [Rating.make(asked("?"), said(f"it is {i}"), source="t", scores={"a": 1}) for i in range(2)]
    made = RatedGroups(segments(rows, tmp_path, template), 64, ratings=np.ones((2, 1), np.float32))
    assert {int(e.ids[-1]) for e in made[0].completions} <= set(words.stop_ids)
    pairs = [Preference.make(asked("?"), said("two"), said("one"), source="t")]
    two = PreferencePairs(segments(pairs, tmp_path / "pairs", template), 64)
    assert {int(e.ids[-1]) for e in two[0].completions} <= set(words.stop_ids)
    assert two.sizes("tree")[0] == two[0].size("tree") and two.sizes("rows")[0] == two[0].size("rows")


def test_records_go_to_disk_and_back(tmp_path: Path) -> None:
    """Steps that lose their white space in JSON no longer join to the answer."""
    row = json.loads(json.dumps(to_json(judged(1))))
    assert "".join(row["steps"]) == row["answer"][0]["content"]
