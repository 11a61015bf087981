"""Losses of preference methods, from tables that a person can check."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.objectives import formulas, small
from tutelage.data.groups.groups import Completion, PromptGroup
from tutelage.errors import ConfigError
from tutelage.objectives import TABLE, objective
from tutelage.train.step import StepConfig, StepResult, gradients, measure


def bigrams() -> small.Bigrams:
    n = small.VOCABULARY
    at = torch.arange(n * n, dtype=torch.float64).view(n, n)
    return small.Bigrams(torch.sin(at * 1.7) * 1.5 + torch.cos(at * 0.31))


def step(policy: torch.nn.Module, method: str, made: list[PromptGroup] | None = None, **settings: object) -> StepResult:
    recipe = StepConfig({"policy": policy}, objective(method, **settings))
    return gradients(recipe, small.source(method, made).next(0))


VARIANTS = {
    "dpo-offset": ("dpo", {"beta": 0.3, "offset": 0.8}),
    "ipo-sums": ("ipo", {"beta": 0.4, "average": False}),
    "orpo-answers": ("orpo", {"beta": 0.7}),
    "simpo-sft": ("simpo", {"beta": 1.5, "gamma": 0.4, "sft": 0.3}),
    **{name: (name, settings) for name, settings in small.METHODS.items()},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_loss_is_its_papers_formula(variant):
    """Guards against a sign, a normaliser or a setting that differs from the paper's: an independent calculation agrees."""
    method, settings = VARIANTS[variant]
    policy = bigrams()
    made = small.prompt_groups(method)
    logs = {(f.name, k): small.logprobs(policy, f, k) for f in made for k in (-1, 0, 1)}
    expected = formulas.loss(method, made, lambda f, k: logs[f.name, k], **settings)
    assert step(policy, method, **settings).loss == pytest.approx(expected, rel=1e-5, abs=1e-6)


def halves() -> small.Bigrams:
    """A policy of four tokens. After token 0: 1/2 token 1, 1/4 token 2, 1/8 tokens 0 and 3. After any other: 1/4 each."""
    return small.Bigrams(torch.tensor([[1 / 8, 1 / 2, 1 / 4, 1 / 8]] + [[1 / 4] * 4] * 3, dtype=torch.float64).log())


def one_pair() -> list[PromptGroup]:
    """Chosen "1 2": log-probability ln 1/8, twice what the reference gives it. Rejected "2": ln 1/4, half the reference's."""
    chosen = Completion(np.array([1, 2]), per_completion={"reference": math.log(1 / 16), "margin": 1.0})
    rejected = Completion(np.array([2]), per_completion={"reference": math.log(1 / 2), "margin": 1.0})
    return [PromptGroup("p", np.array([3, 0]), (chosen, rejected))]


BY_HAND = [  # log-ratios ln 2 and -ln 2; probabilities of the average token 8^(-1/2) and 1/4
    ("dpo", {"beta": 1.0}, math.log(1.25)),  # sigmoid(ln 4) = 4/5
    ("dpo", {"beta": 1.0, "offset": math.log(4)}, math.log(2)),
    ("cdpo", {"beta": 1.0, "label_smoothing": 0.25}, -0.75 * math.log(0.8) - 0.25 * math.log(0.2)),
    ("robust", {"beta": 1.0, "label_smoothing": 0.25}, (-0.75 * math.log(0.8) + 0.25 * math.log(0.2)) / 0.5),
    ("dpo_norm", {"beta": 2.0}, math.log(1.125)),  # sigmoid(2 (ln 2 / 2 + ln 2)) = 8/9
    ("ipo", {"beta": 0.5}, (1.5 * math.log(2) - 1) ** 2),
    ("ipo", {"beta": 0.5, "average": False}, (math.log(4) - 1) ** 2),
    ("hinge", {"beta": 0.5}, 1 - math.log(2)),
    ("exo_pair", {"beta": 1.0, "label_smoothing": 0.25}, 0.8 * math.log(0.8 / 0.75) + 0.2 * math.log(0.2 / 0.25)),
    ("discopop", {"beta": 1.0, "tau": 1.0}, 0.2 * math.log(1.25) + 0.8 * 0.25),
    ("nca_pair", {"beta": 1.0}, math.log(1.5) + math.log(3) / 2 + math.log(1.5) / 2),
    ("sppo_hard", {"beta": 0.5}, 2 * (math.log(2) - 1) ** 2),
    ("apo_zero", {"beta": 1.0}, 1 / 3 + 1 / 3),
    ("apo_down", {"beta": 1.0}, 2 / 3 + 1 / 5),
    ("orpo", {"beta": 1.0}, math.log(8) / 2 + math.log(1 + (math.sqrt(8) - 1) / 3)),
    ("orpo", {"beta": 1.0, "prompts": True}, math.log(32) / 3 + math.log(1 + (math.sqrt(8) - 1) / 3)),
    ("simpo", {"beta": 2.0, "gamma": math.log(2)}, math.log(2)),
    ("cpo", {"beta": 1.0, "sft": 2.0}, math.log(3) + math.log(8)),
    ("cpo_simpo", {"beta": 2.0, "gamma": math.log(2)}, math.log(2) + math.log(8) / 2),
]


@pytest.mark.parametrize(("method", "settings", "expected"), BY_HAND)
def test_one_pair_by_hand(method, settings, expected):
    """Guards against a mistake that code and formula share."""
    assert step(halves(), method, one_pair(), **settings).loss == pytest.approx(expected, abs=1e-6)


def test_measured_terms_by_hand():
    """Guards against rewards without beta, and an accuracy that counts the wrong order as right, or ties as more than half."""
    terms = step(halves(), "dpo", one_pair(), beta=0.5).terms
    half = math.log(2) / 2
    expected = {"_accuracy": 1, "_chosen": half, "_rejected": -half, "_margin": 2 * half}
    assert {k: v for k, v in terms.items() if k != "loss"} == pytest.approx(expected, abs=1e-6)
    (pair,) = one_pair()
    tied = PromptGroup("p", pair.prompt, (pair.completions[0], pair.completions[0]))
    assert step(halves(), "dpo", [tied]).terms["_accuracy"] == 0.5


def judged(good: int, other: float, name: str = "r") -> PromptGroup:
    """An answer whose log-ratio is ln 2, and another prompt's, whose log-ratio is `other`."""
    own = Completion(np.array([1, 2]), per_completion={"reference": math.log(1 / 16), "desirable": good})
    wrong = Completion(np.array([2]), per_completion={"reference": math.log(1 / 4) - other, "desirable": good})
    return PromptGroup(name, np.array([3, 0]), (own, wrong))


@pytest.mark.parametrize("layout", ["tree", "packed", "rows"])
def test_kto_reads_each_answer_once(layout):
    """Guards against passes that read both answers of a group to use one of them; and against an answer that stands elsewhere
    than its text does, once the other is cut out."""
    made, read = small.rated(5), []

    class Watched(small.Bigrams):
        def forward(self, batch):
            read.append(sorted(batch.ids[batch.segments > 0].tolist()))
            return super().forward(batch)

    policy = Watched(bigrams().table.detach())
    found = gradients(StepConfig({"policy": policy}, objective("kto")), small.source("kto", made, layout=layout).next(0))
    texts = [sorted(i for f in made for i in (*f.prompt.tolist(), *f.completions[k].ids.tolist())) for k in (1, 0)]
    assert read == texts
    logs = {(f.name, k): small.logprobs(policy, f, k) for f in made for k in (0, 1)}
    assert found.loss == pytest.approx(formulas.loss("kto", made, lambda f, k: logs[f.name, k]), rel=1e-5)


def test_kto_by_hand():
    """Guards against a reference point that has a gradient, forgets beta, is each answer's own or falls below 0."""
    two = math.log(2)
    settings = {"beta": 1.0, "desirable_weight": 3.0, "undesirable_weight": 2.0}
    made = [judged(1, 3 * two), judged(0, -two)]  # reference point ln 2: each value is 0, each sigmoid 1/2
    found = step(halves(), "kto", made, **settings)
    assert found.loss == pytest.approx((3 * 0.5 + 2 * 0.5) / 2, abs=1e-6)
    expected = {"_kl": two, "_desirable": two, "_undesirable": two}
    assert {k: found.terms[k] for k in expected} == pytest.approx(expected, abs=1e-6)
    far = step(halves(), "kto", [judged(1, 3 * two), judged(0, 3 * two)], **settings | {"beta": 0.5})  # values -ln 2 and ln 2
    assert far.loss == pytest.approx((3 * (2 / 3) + 2 * (1 / 3)) / 2, abs=1e-6)
    below = step(halves(), "kto", [judged(1, -two), judged(0, -two)], **settings)  # reference point 0
    assert below.terms["_kl"] == 0
    assert below.loss == pytest.approx((3 * (1 / 3) + 2 * (2 / 3)) / 2, abs=1e-6)
    assert below.terms["_accuracy"] == 0.5


def test_the_mismatched_answer_is_never_learned():
    """Guards against a gradient through the reference point: only the answer's own tokens move the table."""
    policy = halves()
    step(policy, "kto", [judged(1, 1.0)], beta=1.0)
    alone = policy.table.grad.clone()
    policy.zero_grad()
    step(policy, "kto", [judged(1, 1.0), judged(0, 1.0)], beta=1.0)
    assert alone[0].abs().sum() > 0 and alone[1].abs().sum() > 0
    value = 1 / (1 + 2 / math.e)  # sigmoid(1 - ln 2)
    row = torch.softmax(policy.table.detach()[0], 0) - torch.tensor([0, 1, 0, 0])  # gradient of -log p(1 | 0)
    torch.testing.assert_close(alone[0], (value * (1 - value) * row), atol=1e-6, rtol=1e-5)


def test_a_batch_of_good_answers_only_has_no_figure_for_bad_ones():
    """Guards against a division by the 0 undesirable answers of a batch, which an unlucky draw may bring."""
    policy, made = halves(), [judged(1, 0.5), judged(1, 0.1)]
    terms = step(policy, "kto", made).terms
    assert "_desirable" in terms and "_undesirable" not in terms
    batches, counts = small.source("kto", made).validation()
    assert measure(StepConfig({"policy": policy}, objective("kto")), batches, counts) == pytest.approx(terms)


def test_a_certain_answer_does_not_break_the_odds():
    """Guards against infinite odds, whose gradient is not a number, once a model is sure of an answer's every token."""
    policy = small.Bigrams(torch.full((4, 4), -200.0).fill_diagonal_(200.0))
    sure = Completion(np.array([3, 3, 3]), per_completion={"reference": 0.0})
    doubtful = Completion(np.array([3, 1]), per_completion={"reference": 0.0})
    for completions in ((sure, doubtful), (doubtful, sure)):
        found = step(policy, "orpo", [PromptGroup("p", np.array([3]), completions)])
        assert math.isfinite(found.loss) and torch.isfinite(policy.table.grad).all()


@pytest.mark.parametrize(
    ("method", "settings"),
    [("cdpo", {"label_smoothing": 0.5}), ("robust", {"label_smoothing": -0.1}), ("exo_pair", {"label_smoothing": 0.0})],
)
def test_shares_of_wrong_preferences_that_mean_nothing_are_refused(method, settings):
    """Guards against a division by zero or a logarithm of it, seen only as a loss that is not finite."""
    with pytest.raises(ConfigError, match="label_smoothing"):
        step(halves(), method, one_pair(), **settings)


def test_an_offset_needs_margins():
    """Guards against an offset that is silently 0 for data without margins."""
    bare = [
        PromptGroup(
            "p", np.array([3, 0]), tuple(Completion(e.ids, per_completion={"reference": 0.0}) for e in one_pair()[0].completions)
        )
    ]
    with pytest.raises(ConfigError, match="offset"):
        step(halves(), "dpo", bare, offset=1.0)
    step(halves(), "dpo", bare)


@pytest.mark.parametrize(
    ("method", "setting"), [("ipo", "label_smoothing"), ("cpo", "gamma"), ("dpo", "label_smoothing"), ("kto", "tau")]
)
def test_settings_of_other_methods_are_refused(method, setting):
    """Guards against one trainer of many losses, which takes every setting and ignores most."""
    with pytest.raises(ConfigError, match=f"{method} has no setting `{setting}`"):
        objective(method, **{setting: 0.3})


def test_every_row_says_what_it_needs():
    """Guards against a method whose reference log-probabilities nobody computes, or computes for nothing."""
    without = {"orpo", "simpo", "cpo", "cpo_simpo"}
    for name in small.METHODS:
        row = TABLE[name]
        assert row.reference == (name not in without), name
        assert row.data == ("ratings" if name == "kto" else "preferences"), name
        assert (row.prepare is not None) == (name == "kto"), name
