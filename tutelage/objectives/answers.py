"""Helpers of objectives that score whole completions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from tutelage.models.interface import Answers, Batch
from tutelage.objectives import Term


def answers_of(batch: Batch) -> Answers:
    assert batch.answers is not None, "this objective needs a batch of answers"
    return batch.answers


def every(batch: Batch, first: int, of: int) -> Batch:
    """Every `of`th answer, from number `first` on, each the only one of its group: the model reads their texts and no other."""
    answers = answers_of(batch)
    kept = answers.completion_of % of == first
    tokens = _texts(batch, first, of)
    rows = tokens.any(1)
    new = tokens.flatten().cumsum(0) - 1  # places among the tokens that are left

    def cut(x: Tensor) -> Tensor:
        return x[rows] if batch.shape[0] > 1 else x[tokens][None]

    segments = (batch.segments - 1) // of + 1 if batch.shape[0] == 1 and batch.tree is None else batch.segments
    return replace(
        batch,
        ids=cut(batch.ids),
        segments=cut(segments),
        positions=cut(batch.positions),
        targets=cut(batch.targets),
        weights=cut(batch.weights),
        source_ids=None if batch.source_ids is None else batch.source_ids[rows],
        source_segments=None if batch.source_segments is None else batch.source_segments[rows],
        rows=None if batch.rows is None else batch.rows[first::of] if batch.shape[0] > 1 else batch.rows,
        tree=None,
        answers=replace(
            answers,
            positions=new[answers.positions[kept]],
            targets=answers.targets[kept],
            completion_of=answers.completion_of[kept] // of,
            last_position=new[answers.last_position[first::of]],
            tokens={name: stream[kept] for name, stream in answers.tokens.items()},
            per_completion={name: stream[first::of] for name, stream in answers.per_completion.items()},
        ),
    )


def _texts(batch: Batch, first: int, of: int) -> Tensor:
    """[B,T]: the tokens of every `of`th text, with its prompt; of texts in rows of their own the whole row."""
    if batch.shape[0] > 1:
        numbers = torch.arange(batch.shape[0], device=batch.ids.device)
        return (numbers % of == first)[:, None].expand(batch.shape)
    if batch.tree is None:
        return (batch.segments - 1) % of == first
    chosen = torch.zeros(batch.shape, dtype=torch.bool, device=batch.ids.device)
    chosen[0, batch.tree.index[(batch.tree.segments[0] - 1) % of == first]] = True
    return chosen


def token_logprobs(policy: nn.Module, batch: Batch) -> Tensor:
    """Log-probabilities [N] of all supervised tokens, in their order."""
    answers = answers_of(batch)
    hidden = policy(batch).hidden.flatten(0, 1).index_select(0, answers.positions)
    return policy.lm_head.logprobs(hidden, answers.targets)  # type: ignore[operator, no-any-return, union-attr]


def token_scores(policy: nn.Module, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] of all supervised tokens, and the entropies [N] of the distributions that they come from."""
    answers = answers_of(batch)
    hidden = policy(batch).hidden.flatten(0, 1).index_select(0, answers.positions)
    return policy.lm_head.logprobs_and_entropy(hidden, answers.targets, temperature)  # type: ignore[operator, no-any-return, union-attr]


def answer_logprobs(policy: nn.Module, batch: Batch) -> Tensor:
    """Log-probabilities [S] of whole answers: sums over their supervised tokens."""
    return answers_of(batch).sums(token_logprobs(policy, batch))


def paired(values: Tensor) -> tuple[Tensor, Tensor]:
    """[S] -> of the chosen answers [S/2], of the rejected ones [S/2]."""
    return values[0::2], values[1::2]


def pair_terms(loss: Tensor, chosen: Tensor, rejected: Tensor, name: str = "loss") -> dict[str, Term]:
    """The loss [P] of each pair; and, measured only, the rewards [P] that it compares and how often they are in order: before the
    first step both are 0 where they are compared with the start itself, and that is half right."""
    chosen, rejected = chosen.detach(), rejected.detach()
    measured = {
        "_accuracy": (chosen > rejected).to(loss.dtype) + (chosen == rejected).to(loss.dtype) / 2,
        "_chosen": chosen,
        "_rejected": rejected,
        "_margin": chosen - rejected,
    }
    return {name: Term(loss.sum(), "pairs")} | {n: Term(torch.sum(v), "pairs") for n, v in measured.items()}


def chosen_loss(logprobs: Tensor, answers: Answers, weight: float = 1.0) -> dict[str, Term]:
    """`weight` times the cross-entropy of the chosen answers' tokens, as the term "sft"; nothing where the weight is 0."""
    return {"sft": Term(-weight * logprobs[answers.completion_of % 2 == 0].sum(), "chosen_tokens")} if weight else {}


def own_places(batch: Batch) -> Tensor:
    """[N]: the places of the supervised tokens themselves, where `places` are those that predict them. An answer's tokens lie
    side by side in every layout, but the first one may lie far from the end of its prompt."""
    answers, positions = answers_of(batch), batch.positions.flatten()
    ends = answers.last_position[answers.completion_of]
    return ends - (positions[ends] - positions[answers.positions] - 1)
