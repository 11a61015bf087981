"""Stages `sample` and `select`: answers are judged once, chosen from twice, and what was interrupted goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.guarantees.tiny import records_folder
from tests.pipeline import TRAIN, World, tutelage, world  # noqa: F401 (a fixture)
from tutelage import api
from tutelage.errors import DataError
from tutelage.records import Message, Prompt, Rollout, read_records
from tutelage.rollout.sampler import Sampler
from tutelage.rundir import RunDir
from tutelage.stages import sample as stage

LETTERS = {"short": {"kind": "length", "target": 6}}


def sampled(world: World, runs: Path, **settings: object) -> RunDir:  # noqa: F811
    how = {"rewards": LETTERS, "samples": 4, "max_tokens": 24, "max_prompts": 10, "threads": 1, **settings}
    return api.sample(runs=runs, model=world.made["chat"], data=world.made["chats"], **how)


def test_from_prompts_to_a_trained_model(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Records that the next stage does not read, and answers that are made again for the second kind of them."""
    made = sampled(world, tmp_path)
    rows = list(read_records(made.path / "records" / "train.jsonl", Rollout))
    assert len(rows) == 40 and len({r.prompt for r in rows}) == 10
    assert all(r.reward is not None and r.terms.keys() == {"short"} for r in rows)
    assert made.facts["best_reward"] > made.facts["reward"] == pytest.approx(sum(r.reward or 0 for r in rows) / 40)
    ended = records_folder(tmp_path / "ended", [replace(r, finish_reason="stop") for r in rows], 0)  # it has hardly learnt to end
    threshold = sorted(r.reward or 0 for r in rows)[20]
    chosen = api.select(runs=tmp_path, answers=ended, data=world.made["chats"], threshold=threshold, validation_share=0.2)
    pairs = api.select(runs=tmp_path, answers=ended, data=world.made["chats"], make="preferences")
    assert chosen.facts["prompts"] == 10 and chosen.facts["records"] <= 10 and pairs.facts["records"] > 0
    learnt = api.sft(runs=tmp_path, model=world.made["chat"], data=chosen, **TRAIN)
    preferred = api.preference(runs=tmp_path, model=world.made["chat"], data=pairs, steps=1, batch=2, threads=1)
    assert (learnt.path / "model").is_dir() and (preferred.path / "model").is_dir()
    with pytest.raises(DataError, match="no answer is good enough"):
        api.select(runs=tmp_path, answers=ended, data=world.made["chats"], threshold=1e9)
    with pytest.raises(DataError, match="other prompts"):
        api.select(runs=tmp_path, answers=made, data=other(world, tmp_path))


def test_nobody_is_asked_nothing(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Guards against a run that ends well with 0 answers to 0 prompts, and against a model that is loaded for that."""
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({"question": f"Why {i}?"}) + "\n" for i in range(4)))
    data = api.data(runs=tmp_path, kind="prompts", sources=[str(file)], validation_share=0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(DataError, match="no prompts in the validation part") as caught:
        api.sample(runs=tmp_path, model=tmp_path / "model", data=data, rewards=LETTERS, part="validation")
    assert caught.value.file == data.path / "records" / "validation.jsonl" and "part=train" in str(caught.value.fix)


def judged(number: int, reward: float, reason: str = "stop") -> Rollout:
    prompt = Prompt.make([Message(role="user", content="Why?")], source="t")
    return Rollout(
        id=f"0/{prompt.id}/{number}", prompt=prompt.id, step=0, sample=number, version=0, prompt_ids=(1,), ids=(2,), mask=(1,),
        logprobs=(0.0,), text=f"{number}", finish_reason=reason, messages=(Message(role="assistant", content=f"{number}"),),
        reward=reward,
    )  # fmt: skip


CUT = [judged(0, 1.0, "length"), judged(1, 0.0, "length")]
ALIKE, APART = [judged(0, 1.0), judged(1, 1.0)], [judged(0, 0.0), judged(1, 0.5)]
NOTHING: list[tuple[list[Rollout], dict[str, Any], str, str]] = [  # answers, settings, message, words
    ([], {}, "no answers to choose from", "tutelage sample"),
    (CUT, {"threshold": -1.0}, "no answer came to its end", "max_tokens"),
    (CUT, {"make": "preferences"}, "no answer came to its end", "max_tokens"),
    (APART, {}, "no answer is good enough", "at most 0.5, the best reward of 2 whole answers"),
    (ALIKE, {"make": "preferences"}, "all worth the same", "higher temperature"),
    (APART, {"make": "preferences", "margin": 0.75}, "far enough apart", "at most 0.5, the largest difference"),
]


@pytest.mark.parametrize(("answers", "settings", "message", "words"), NOTHING)
def test_what_would_help_is_said(
    tmp_path: Path, answers: list[Rollout], settings: dict[str, Any], message: str, words: str
) -> None:
    """Guards against "lower it" where no threshold lets an answer in."""
    made = records_folder(tmp_path / "answers", answers or CUT, 0 if answers else 2)
    prompt = Prompt.make([Message(role="user", content="Why?")], source="t")
    with pytest.raises(DataError, match=message) as caught:
        api.select(runs=tmp_path, answers=made, data=records_folder(tmp_path / "asked", [prompt], 0), **settings)
    assert words in str(caught.value) and caught.value.fix and (caught.value.field == "margin") == ("margin" in settings)


def other(world: World, runs: Path) -> RunDir:  # noqa: F811
    file = runs / "others.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Other {i}?", "completion": "Yes."}) + "\n" for i in range(4)))
    return api.data(runs=runs, kind="conversations", sources=[str(file)])


def test_an_interrupted_run_goes_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Answers that are made again, or made otherwise, after an interruption."""
    monkeypatch.setattr(stage, "TOGETHER", 4)
    straight, whole, asked = sampled(world, tmp_path / "straight"), Sampler.answer, []

    def broken(self: Sampler, prompts, samples, **rest):
        asked.append(len(prompts))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(self, prompts, samples, **rest)

    monkeypatch.setattr(Sampler, "answer", broken)
    with pytest.raises(KeyboardInterrupt):
        sampled(world, tmp_path / "broken")
    resumed = sampled(world, tmp_path / "broken")
    assert asked == [4, 4, 4, 2]
    one, two = ((p.path / "records" / "train.jsonl").read_text() for p in (straight, resumed))
    assert one == two
