"""Training data from scored answers: good answers become conversations, best and worst ones become preferences.

Best-of-n and rejection sampling (Nakano et al. 2021, arXiv:2112.09332; Touvron et al. 2023, arXiv:2307.09288, section 3.2.3);
done again with the model that came out of it, expert iteration (Anthony et al. 2017, arXiv:1705.08439; STaR, Zelikman et al.
2022, arXiv:2203.14465).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from tutelage.records import Conversation, Message, Preference, Prompt, Rollout

Keep = Literal["best", "all"]
SOURCE = "sample"


def conversations(
    prompt: Prompt, group: Sequence[Rollout], threshold: float, keep: Keep, counts: Counter[str]
) -> list[Conversation]:
    """The answers worth at least `threshold`: the best of them (the first of several), or all that differ.

    Answers that were cut are not to be imitated, whatever they are worth. What was left out is added to `counts`.
    """
    ended = _counted(group, counts)
    good = [r for r in ended if _reward(r) >= threshold]
    counts["prompts"] += 1
    counts["prompts without a good answer"] += not good
    counts["good answers"] += len(good)
    if keep == "best":
        good = sorted(good, key=lambda r: -_reward(r))[:1]
    different: dict[str, Rollout] = {}
    for rollout in good:
        different.setdefault(rollout.text, rollout)
    counts["answers given twice"] += len(good) - len(different)
    return [
        Conversation.make(
            (*_asked(prompt), *r.messages), source=f"{SOURCE}#{r.id}", tools=prompt.tools, style=prompt.style,
            parents=(prompt.id,), licence=prompt.licence, meta=_meta(prompt, reward=r.reward),
        )
        for r in different.values()
    ]  # fmt: skip


def preferences(prompt: Prompt, group: Sequence[Rollout], margin: float, counts: Counter[str]) -> list[Preference]:
    """The best and the worst answer, if their rewards differ by at least `margin`."""
    ended = _counted(group, counts)
    counts["prompts"] += 1
    ranked = sorted(ended, key=lambda r: -_reward(r))
    if not ranked or ranked[0].text == ranked[-1].text or _reward(ranked[0]) - _reward(ranked[-1]) < max(margin, 1e-9):
        counts["prompts whose answers are worth the same"] += 1
        return []
    best, worst = ranked[0], ranked[-1]
    return [
        Preference.make(
            _asked(prompt), best.messages, worst.messages, source=f"{SOURCE}#{best.id}", tools=prompt.tools, style=prompt.style,
            margin=_reward(best) - _reward(worst), parents=(prompt.id,), licence=prompt.licence,
            meta=_meta(prompt, chosen_reward=best.reward, rejected_reward=worst.reward),
        )
    ]  # fmt: skip


def grouped(rollouts: Iterable[Rollout]) -> dict[str, list[Rollout]]:
    """The answers to each prompt, in their order."""
    out: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        out.setdefault(rollout.prompt, []).append(rollout)
    return out


def whole(group: Sequence[Rollout]) -> list[Rollout]:
    """The answers that ended by themselves and were scored."""
    return [r for r in group if r.finish_reason != "length" and r.reward is not None]


def _counted(group: Sequence[Rollout], counts: Counter[str]) -> list[Rollout]:
    found = whole(group)
    counts["answers"] += len(group)
    counts["answers cut or not judged"] += len(group) - len(found)
    return found


def _reward(rollout: Rollout) -> float:
    assert rollout.reward is not None
    return rollout.reward


def _asked(prompt: Prompt) -> tuple[Message, ...]:
    """The prompt's turns. Assistant turns among them were not chosen here, so they are not trained."""
    return tuple(replace(m, train=False) if m.role == "assistant" else m for m in prompt.messages)


def _meta(prompt: Prompt, **rewards: float | None) -> dict[str, object]:
    own = {"answer": prompt.answer} if prompt.answer is not None else {}
    return {**prompt.meta, **own, **rewards}
