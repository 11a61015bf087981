"""What objectives about whole answers have in common."""

from __future__ import annotations

from torch import Tensor, nn

from tutelage.models.interface import Answers, Batch


def answers_of(batch: Batch) -> Answers:
    assert batch.answers is not None, "this objective needs a batch of answers"
    return batch.answers


def token_logprobs(policy: nn.Module, batch: Batch) -> Tensor:
    """Log-probabilities [N] of all supervised tokens, in their order."""
    answers = answers_of(batch)
    hidden = policy(batch).hidden.flatten(0, 1)[answers.places]
    return policy.lm_head.logprobs(hidden, answers.targets)  # type: ignore[operator, no-any-return, union-attr]


def token_scores(policy: nn.Module, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] of all supervised tokens, and the entropies [N] of the distributions that they come from."""
    answers = answers_of(batch)
    hidden = policy(batch).hidden.flatten(0, 1)[answers.places]
    return policy.lm_head.logprobs_and_entropy(hidden, answers.targets, temperature)  # type: ignore[operator, no-any-return, union-attr]


def answer_logprobs(policy: nn.Module, batch: Batch) -> Tensor:
    """Log-probabilities [S] of whole answers: sums over their supervised tokens."""
    return answers_of(batch).sums(token_logprobs(policy, batch))


def own_places(batch: Batch) -> Tensor:
    """[N]: the places of the supervised tokens themselves, where `places` are those that predict them. An answer's tokens lie
    side by side in every layout, but the first one may lie far from the end of its prompt."""
    answers, positions = answers_of(batch), batch.positions.flatten()
    ends = answers.last[answers.owner]
    return ends - (positions[ends] - positions[answers.places] - 1)
