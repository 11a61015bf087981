"""Pairs that are longer than a model reads."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tutelage.data.groups.pairs import PreferencePairs
from tutelage.data.tokens.shards import Segments, tokenize
from tutelage.files import write_json
from tutelage.records import Message, Preference, dump_line
from tutelage.tokenizer.train import train


@pytest.fixture(scope="module")
def segments(tmp_path_factory: pytest.TempPathFactory) -> Segments:
    folder = tmp_path_factory.mktemp("pairs")
    train(["one two three four five six seven"], vocab_size=280, template="default", out=folder / "words")
    rows = []
    for prompt, good, bad in ((10, 5, 8), (300, 20, 40), (10, 400, 30)):
        turns = (
            [Message(role="user", content="one " * prompt)],
            *([Message(role="assistant", content=f"{w} " * n)] for w, n in (("two", good), ("six", bad))),
        )
        rows.append(dump_line(Preference.make(*turns, source="test")) + "\n")
    (folder / "records").mkdir()
    for part in ("train", "validation"):
        (folder / "records" / f"{part}.jsonl").write_text("".join(rows), encoding="utf-8")
    write_json(folder / "records" / "schema.json", {"type": "Preference", "version": 1})
    assert json.loads(rows[0])["prompt"]
    tokenize(folder / "records", folder / "words", folder / "tokens", workers=1)
    return Segments.open(folder / "tokens" / "train")


@pytest.mark.parametrize("too_long", ["drop", "left", "right"])
@pytest.mark.parametrize("most", [128, 256, 100_000])
def test_nothing_is_longer_and_sizes_are_true(segments: Segments, too_long: str, most: int) -> None:
    """Guards against answers that are cut away whole (a loss over nothing), prompts beyond the context, and sizes of which
    micro-batches are made that are not those of the texts."""
    prompt_groups = PreferencePairs(segments, most, too_long)
    counted = prompt_groups.report["left out, too long"] + len(prompt_groups)
    assert counted == 3
    for layout in ("tree", "packed"):
        assert prompt_groups.sizes(layout).tolist() == [prompt_groups[i].size(layout) for i in range(len(prompt_groups))]
    for i in range(len(prompt_groups)):
        group = prompt_groups[i]
        assert all(e.supervised and len(group.prompt) + len(e.ids) <= most for e in group.completions)
        if too_long == "left":  # what is said last stays
            whole = segments.ids(2 * int(prompt_groups.kept[i]))
            text = np.concatenate([group.prompt, group.completions[0].ids])
            assert (
                len(text) == len(whole)
                or len(group.prompt) == 1
                or whole[-len(group.completions[0].ids) :].tolist() == group.completions[0].ids.tolist()
            )
