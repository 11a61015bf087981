"""What is learned from judged answers: never a cut one, never one twice, and every prompt without a good answer is counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from tutelage.records import Message, Prompt, Rollout, dump_line
from tutelage.rollout.choose import conversations, grouped, preferences
from tutelage.rollout.source import read_rollouts

ASKED = (
    Message(role="user", content="1+1?"), Message(role="assistant", content="2"), Message(role="user", content="2+2?"),
)  # fmt: skip
PROMPT = Prompt.make(ASKED, source="sums.jsonl", answer="4", meta={"task": "sums"}, licence="CC0-1.0")


def rollout(sample: int, text: str, reward: float | None, finish_reason: str = "stop", prompt: Prompt = PROMPT) -> Rollout:
    values: dict[str, Any] = {"prompt_ids": (1,), "ids": (2,), "mask": (1,), "logprobs": (0.0,), "version": 0, "step": 0}
    return Rollout(
        id=f"0/{prompt.id}/{sample}", prompt=prompt.id, sample=sample, text=text, finish_reason=finish_reason, reward=reward,
        messages=(Message(role="assistant", content=text),), **values,
    )  # fmt: skip


GROUP = [
    rollout(0, "5", 0.0), rollout(1, "4", 1.0), rollout(2, "four", 1.5), rollout(3, "4", 1.0),
    rollout(4, "4 because", 9.0, "length"), rollout(5, "?", None),
]  # fmt: skip


def test_the_best_whole_answer_is_kept() -> None:
    """Guards against imitating an answer that was cut, which never ends, and against training on words of the prompt."""
    counts: Counter[str] = Counter()
    (best,) = conversations(PROMPT, GROUP, 1.0, "best", counts)
    assert [m.content for m in best.messages] == ["1+1?", "2", "2+2?", "four"]
    assert [m.train for m in best.messages] == [None, False, None, None]
    assert best.parents == (PROMPT.id,) and best.meta == {"task": "sums", "answer": "4", "reward": 1.5}
    assert (best.licence, best.source) == ("CC0-1.0", f"sample#0/{PROMPT.id}/2")
    assert counts == {
        "answers": 6, "answers cut or not judged": 2, "prompts": 1, "prompts without a good answer": 0, "good answers": 3,
        "answers given twice": 0,
    }  # fmt: skip


def test_all_good_answers_are_kept_once() -> None:
    """Guards against a popular answer that is trained on as often as it was given."""
    counts: Counter[str] = Counter()
    found = conversations(PROMPT, GROUP, 1.0, "all", counts)
    assert [c.messages[-1].content for c in found] == ["4", "four"]
    assert counts["answers given twice"] == 1


def test_prompts_without_a_good_answer_are_counted() -> None:
    """Guards against a set of easy prompts that looks like all of them."""
    counts: Counter[str] = Counter()
    assert conversations(PROMPT, GROUP[:1], 1.0, "best", counts) == []
    assert (counts["prompts"], counts["prompts without a good answer"]) == (1, 1)


def test_best_beside_worst() -> None:
    """Guards against pairs the wrong way round, and against pairs of two answers that are worth the same."""
    counts: Counter[str] = Counter()
    (pair,) = preferences(PROMPT, GROUP, 0.0, counts)
    assert (pair.chosen[0].content, pair.rejected[0].content, pair.margin) == ("four", "5", 1.5)
    assert preferences(PROMPT, GROUP, 2.0, counts) == []
    assert preferences(PROMPT, [GROUP[1], rollout(7, "2*2", 1.0)], 0.0, counts) == []
    assert preferences(PROMPT, GROUP[4:], 0.0, counts) == []
    assert counts["prompts whose answers are worth the same"] == 3


def test_any_answer_is_read_back(tmp_path: Path) -> None:
    """Guards against lines that end in the middle of an answer: a model says U+2028 and U+0085 too."""
    said = [rollout(0, "one\u2028two\u0085three\r\x0c\x1cfour", 1.0), GROUP[0]]
    (tmp_path / "step_000000.jsonl").write_text("".join(dump_line(r) + "\n" for r in said), encoding="utf-8")
    assert read_rollouts(tmp_path / "step_000000.jsonl") == said


def test_answers_come_together_by_prompt() -> None:
    """Guards files that hold the answers of several prompts."""
    other = Prompt.make(ASKED[:1], source="sums.jsonl")
    mixed = [GROUP[0], rollout(0, "2", 1.0, prompt=other), GROUP[1]]
    assert grouped(mixed) == {PROMPT.id: [GROUP[0], GROUP[1]], other.id: [mixed[1]]}
