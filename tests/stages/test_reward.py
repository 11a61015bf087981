"""The stage `reward`: it learns a rule that it was not told, says what length alone would give, and its model opens elsewhere."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.guarantees import tiny
from tests.models.shapes import CASES
from tests.pipeline import tutelage
from tutelage import api
from tutelage.chat.render import Renderer
from tutelage.config.stages import Reward
from tutelage.errors import DataError
from tutelage.files import read_json
from tutelage.models.config import DecoderConfig
from tutelage.models.init import build
from tutelage.models.open_scorer import load_scorer
from tutelage.models.scorer import build_scorer, score_answers
from tutelage.records import Message, Preference, Rating
from tutelage.setup import answers

ANIMALS, OTHERS = ("cat", "dog"), ("mat", "door", "red", "old", "one", "two")
HOW = {"threads": 1, "kernels": False, "optimizer": {"lr": 3e-3}}


def said(rng: random.Random, animals: int) -> list[Message]:
    """Eight words, so many of them animals."""
    words = [rng.choice(ANIMALS) for _ in range(animals)] + [rng.choice(OTHERS) for _ in range(8 - animals)]
    rng.shuffle(words)
    return [Message(role="assistant", content=" ".join(words))]


def asked(i: int) -> list[Message]:
    return [Message(role="user", content=f"{i}?")]


def preferences(count: int) -> list[Preference]:
    """The answer with more animals is the better one; all are equally long."""
    rng, rows = random.Random(0), []
    for i in range(count):
        few, many = sorted(rng.sample(range(9), 2))
        rows.append(Preference.make(asked(i), said(rng, many), said(rng, few), source="rule"))
    return rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    records = tiny.records_folder(folder / "records", preferences(700), 200)
    return api.reward(model=str(tiny.checkpoint()), data=str(records), epochs=2.0, runs=str(folder / "runs"), **HOW).path


def test_a_known_rule_is_learned(trained: Path) -> None:
    """More than 95% of held-out pairs by a rule that length says nothing of; the length baseline is told beside it, always."""
    facts = read_json(trained / "run.json")
    found = facts["held_out"]
    assert found["pairs"] == 200 and found["accuracy"]["value"] > 0.95, found["accuracy"]
    assert found["longer_wins"]["low"] < 0.5 < found["longer_wins"]["high"] and abs(found["correlation_with_length"]) < 0.2
    assert facts["validation_accuracy"] == pytest.approx(found["accuracy"]["value"], abs=1e-6)
    assert abs(found["rewards"]["mean"]) < 0.5  # centred
    log = (trained / "logs" / "attempt_1.log").read_text(encoding="utf-8")
    assert "held out: accuracy" in log and "always choosing the longer answer" in log


def test_its_model_opens_in_transformers(trained: Path) -> None:
    """The very score, for a rendered conversation: a reward model that only we can ask is half of one."""
    import torch
    from transformers import AutoModelForSequenceClassification

    theirs = AutoModelForSequenceClassification.from_pretrained(trained / "model").eval()
    rng = random.Random(1)
    words = Renderer(trained / "model")
    texts = [
        words.prompt(asked(i)) + words.tokenizer.encode_text(said(rng, i)[0].content) + [words.end_of_turn_id] for i in (0, 8)
    ]
    ours = score_answers(load_scorer(trained / "model"), texts)
    with torch.no_grad():
        expected = [theirs(input_ids=torch.tensor([t])).logits[0].tolist() for t in texts]
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert ours[1, 0] > ours[0, 0] + 2


def test_other_commands_refuse_it(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reward model that is generated from, tuned or served writes with a head that is not there."""
    (tmp_path / "in.txt").write_text("cat\n", encoding="utf-8")
    records = tiny.records("conversations")
    for line in (
        ["generate", trained, tmp_path / "in.txt", "--output", tmp_path / "out.jsonl"],
        ["sft", "--model", trained, "--data", records, "--runs", tmp_path],
        ["evaluate", "--model", trained, "--documents", tiny.records("documents"), "--runs", tmp_path],
        ["chat", trained],
    ):
        done = tutelage(capsys, *line)
        assert done.code == 2 and "gives scores" in done.err, done.err


def test_a_reward_model_goes_on(trained: Path, tmp_path: Path) -> None:
    """Newer preferences refine a reward model; its head must not be made anew."""
    records = tiny.records_folder(tmp_path / "records", preferences(60)[:40], 20)
    how = {**HOW, "optimizer": {"lr": 1e-6}}
    again = api.reward(model=str(trained), data=str(records), steps=1, runs=str(tmp_path / "runs"), **how).path
    assert read_json(again / "run.json")["held_out"]["accuracy"]["value"] > 0.85


@pytest.mark.parametrize(("length", "layout"), [(16, "tree"), (17, "rows")])
def test_texts_whose_angles_follow_their_row_have_one_each(length: int, layout: str) -> None:
    """LongRoPE turns a whole row at the factors of its longest text: packed beside a long one, a short text has another score."""
    model = build(DecoderConfig.from_hf(CASES["phi3-longrope"]), 0)
    config = Reward(model="m", data="d", max_length=length)
    assert answers.layout_for(config, model) == answers.layout_for(config, build_scorer(model)) == layout


def ratings(count: int) -> list[Rating]:
    """Two aspects: the share of animals, and whether the first word is one; the second is missing for every third answer."""
    rng, rows = random.Random(2), []
    for i in range(count):
        answer = said(rng, rng.randrange(9))
        animals = [word in ANIMALS for word in answer[0].content.split()]
        scores = {"animals": 3 * sum(animals) / 8, **({"first": float(animals[0])} if i % 3 else {})}
        rows.append(Rating.make(asked(i), answer, source="rule", scores=scores))
    return rows


def test_ratings_by_aspect_are_learned(tmp_path: Path) -> None:
    """A score for each aspect, from ratings that lack some; the second aspect is asked for alone, too."""
    records = tiny.records_folder(tmp_path / "records", ratings(400), 100)
    made = api.reward(model=str(tiny.checkpoint()), data=str(records), epochs=4.0, runs=str(tmp_path / "runs"), **HOW).path
    facts = read_json(made / "run.json")
    assert facts["method"] == "rating" and facts["outputs"] == ["animals", "first"]
    assert facts["held_out"]["animals"]["explained"]["value"] > 0.8, facts["held_out"]
    assert facts["held_out"]["first"]["ratings"] < 100
    assert read_json(made / "model" / "config.json")["id2label"] == {"0": "animals", "1": "first"}
    one = api.reward(
        model=str(tiny.checkpoint()), data=str(records), steps=1, aspects=["first"], loss="huber", delta=0.5,
        runs=str(tmp_path / "runs"), **HOW,
    ).path  # fmt: skip
    assert load_scorer(one / "model").outputs == ("first",)


@pytest.mark.parametrize("steps", [False, True])
def test_ratings_that_are_all_the_same_teach_nothing(tmp_path: Path, steps: bool) -> None:
    """A reward model that was trained on nothing but a mean, and says that it succeeded."""
    rows = []
    for i in range(20):
        answer = [Message(role="assistant", content=f"a cat {i}.")]
        how: dict[str, Any] = {"steps": (answer[0].content,), "step_scores": (1.0,)} if steps else {"scores": {"good": 3.0}}
        rows.append(Rating.make(asked(i), answer, source="rule", **how))
    records = tiny.records_folder(tmp_path / "records", rows, 4)
    with pytest.raises(DataError, match="all ratings are the same"):
        api.reward(model=str(tiny.checkpoint()), data=str(records), steps=1, runs=str(tmp_path / "runs"), **HOW)


def test_steps_are_judged(tmp_path: Path) -> None:
    """A step is right when it names an animal: to be read at its own end, whatever the steps around it say."""
    rng, rows = random.Random(3), []
    for i in range(300):
        right = [rng.random() < 0.6 for _ in range(3)]
        steps = [f"{'' if j == 0 else chr(10)}a {rng.choice(ANIMALS if ok else OTHERS)}." for j, ok in enumerate(right)]
        answer = [Message(role="assistant", content="".join(steps))]
        rows.append(Rating.make(asked(i), answer, source="rule", steps=tuple(steps), step_scores=tuple(map(float, right))))
    records = tiny.records_folder(tmp_path / "records", rows, 80)
    made = api.reward(model=str(tiny.checkpoint()), data=str(records), epochs=4.0, runs=str(tmp_path / "runs"), **HOW).path
    found = read_json(made / "run.json")
    assert found["method"] == "process" and found["held_out"]["steps"] == 240
    assert found["held_out"]["accuracy"]["value"] > 0.95 > 0.75 > found["held_out"]["usual"]["value"], found["held_out"]


@pytest.mark.parametrize(
    ("kind", "settings", "about"),
    [
        ("preferences", {"method": "process"}, "no method of this name learns from preferences"),
        ("preferences", {"loss": "huber"}, "reward has no setting `loss`"),
        ("preferences", {"aspects": "animals"}, "`aspects` means nothing"),
        ("ratings", {"centring": "0.1"}, "rating has no setting `centring`"),
        ("ratings", {"aspects": "beauty"}, "no rating has this aspect"),
        ("ratings", {"method": "reward"}, "no method of this name learns from ratings"),
        ("conversations", {}, "other records than this stage reads"),
    ],
)
def test_what_means_nothing_is_refused(
    kind: str, settings: dict[str, Any], about: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting that is accepted and ignored, or data of another kind that is learned from as if it were preferences."""
    made = {"preferences": preferences, "ratings": ratings}
    records = tiny.records_folder(tmp_path / "r", made[kind](30), 6) if kind in made else tiny.records(kind)
    options = [x for key, value in settings.items() for x in (f"--{key}", value)]
    done = tutelage(
        capsys, "reward", "--model", tiny.checkpoint(), "--data", records, "--runs", tmp_path, "--kernels", "false", *options
    )
    assert done.code == 2 and about in done.err, done.err


def test_plain_texts_for_a_chat_model_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reward model of plain texts that is asked in chats: right in its own held-out part, and wrong wherever it is used."""
    rows = [{"prompt": f"{i}?", "chosen": f"cat dog {i}", "rejected": f"mat hat {i}"} for i in range(60)]
    for key, told in (("prompt", True), ("question", False)):
        lines = [json.dumps({key: row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]}) for row in rows]
        (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
        data = api.data(sources=[tmp_path / "pairs.jsonl"], kind="preferences", validation_share=0.2, runs=tmp_path)
        capsys.readouterr()
        api.reward(model=str(tiny.checkpoint()), data=data, runs=tmp_path, **{**HOW, "steps": 1, "batch": 4})
        said = capsys.readouterr().err
        assert ("these are plain texts" in said) == told and "tokens supervised" in said
