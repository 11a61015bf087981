"""Policy gradients: each method against its formula, what clipping stops, and what may not change a result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.objectives.rollouts import LONGEST, policy, prompt_groups, replaced, without
from tutelage.data.groups.groups import Completion, PromptGroup, bins, collate
from tutelage.data.groups.source import count, group_batch
from tutelage.errors import ConfigError
from tutelage.models import kernels
from tutelage.models.interface import Batch, Output
from tutelage.objectives import TABLE, objective
from tutelage.objectives.answers import token_logprobs
from tutelage.rollout.weights import ADVANTAGE_SPECS
from tutelage.train.step import StepConfig, gradients

GOLDEN = Path(__file__).parent.parent / "golden" / "policy_gradient.json"
METHODS = tuple(ADVANTAGE_SPECS)
PENALTIES = {"kl_weight": 0.3, "entropy_weight": 0.2}


def made_for(name, **kwargs):
    return prompt_groups(ADVANTAGE_SPECS[name].normaliser, **kwargs)


def run(name, made, micro=1000, layout="tree", dtype=torch.float32, **settings):
    """The step's result and the model's gradient, one vector."""
    model = policy(dtype)
    groups = bins([f.size(layout) for f in made], micro)[0]
    batch = group_batch([[made[i] for i in g] for g in groups], count(made, layout), layout)
    result = gradients(StepConfig({"policy": model}, objective(name, **settings)), batch)
    return result, torch.cat([p.grad.flatten() for p in model.parameters()])


def expected_terms(name, made, kl="k3", kl_importance=True, **settings):
    """The terms by another way: numpy over single answers, from log-probabilities of the model in float64."""
    row = TABLE[name]
    wanted = {"clip_low": 0.2, "clip_high": 0.2, "delta": None} | row.defaults | settings | row.fixed
    low, high, delta = (wanted[key] for key in ("clip_low", "clip_high", "delta"))
    model = policy(torch.float64)
    tokens = answers = 0
    loss = penalty = distance = entropy = below = above = 0.0
    for prompt_group in made:
        for completion in prompt_group.completions:
            mask = np.ones(len(completion.ids), bool) if completion.mask is None else completion.mask.astype(bool)
            text = np.concatenate([prompt_group.prompt, completion.ids])
            with torch.no_grad():
                z = model.logits(Batch.of([text.tolist()]))[0].double().log_softmax(-1).numpy()
            at = len(prompt_group.prompt) - 1 + np.flatnonzero(mask)
            lp = z[at, completion.ids[mask]]
            s = {k: v[mask].astype(float) for k, v in completion.tokens.items()}
            n, a = len(lp), s["advantage"]
            change = lp - s["old"]
            if row.fixed["level"] != "token":
                change = np.full(n, change.mean() if row.fixed["level"] == "sequence" else change.sum())
            r = np.exp(change)
            if row.fixed["form"] == "clip":
                free = r if delta is None else np.minimum(r, delta)
                each = np.minimum(free * a, np.clip(r, 1 - low, 1 + high) * a)
            elif row.fixed["form"] == "cispo":
                each = np.clip(r, 1 - low, 1 + high) * a * lp
            else:
                each = a * lp
            each = each * s.get("correction", 1.0)
            d = lp - s["reference"]
            k = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}[kl]
            weight = {"length": 1 / n, "longest": 1 / LONGEST, "sum": 1.0, "token": 1.0}[ADVANTAGE_SPECS[name].normaliser]
            loss, penalty = loss - weight * each.sum(), penalty + weight * (k * (r if kl_importance else 1)).sum()
            distance += k.sum()
            entropy -= (np.exp(z[at]) * z[at]).sum()
            below, above = below + ((r < 1 - low) & (a < 0)).sum(), above + ((r > 1 + high) & (a > 0)).sum()
            tokens, answers = tokens + n, answers + 1
    units = {"sequences": answers, "tokens": tokens}[row.fixed["unit"]]
    found = {"loss": loss / units, "kl": penalty / units, "_kl": distance / tokens, "_entropy": entropy / tokens}
    if row.fixed["form"] != "none":
        found |= {"_clipped_low": below / tokens, "_clipped_high": above / tokens}
    return found


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("kl", "kl_importance"), [("k1", True), ("k2", True), ("k3", True), ("k3", False)])
def test_terms_are_their_formulas(name, kl, kl_importance):
    """Against an independent calculation, answer by answer: normaliser, ratio, clip, penalty, entropy, shares."""
    clip = {"clip_low": 0.3, "clip_high": 0.25} if name == "cispo" else {}  # its own are hardly ever reached
    result, _ = run(name, made_for(name), kl=kl, kl_importance=kl_importance, **PENALTIES, **clip)
    expected = expected_terms(name, made_for(name), kl, kl_importance, **clip)
    assert result.terms["kl"] == pytest.approx(0.3 * expected.pop("kl"), rel=1e-5)
    assert result.terms["entropy"] == pytest.approx(-0.2 * expected["_entropy"], rel=1e-5)
    for key, value in expected.items():
        assert result.terms[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    assert result.loss == pytest.approx(sum(result.terms[key] for key in ("loss", "kl", "entropy")), rel=1e-5)


@pytest.mark.parametrize("name", [n for n in METHODS if "delta" not in TABLE[n].fixed])
def test_dual_clip(name):
    """Guards against a bound on ratios that is read as one on advantages, or that holds for gains too."""
    made = made_for(name)
    found, expected = run(name, made, delta=1.3)[0].terms["loss"], expected_terms(name, made, delta=1.3)["loss"]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert abs(found - run(name, made)[0].terms["loss"]) > 1e-4


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("own_kernels", [True, False])
def test_layout_and_accumulation_change_nothing(name, own_kernels):
    """Promises 5 and 6: shared, packed or padded prompts, in one micro-batch or in many, in any order."""
    made = made_for(name)
    before = kernels.available()
    kernels.use(own_kernels)
    try:
        whole, gradient = run(name, made, **PENALTIES)
        ways = [("tree", 1, made), ("tree", 60, made), ("packed", 70, made), ("rows", 1, made), ("rows", 1000, made),
                ("tree", 60, made[::-1])]  # fmt: skip
        for layout, micro, order in ways:
            result, again = run(name, order, micro, layout, **PENALTIES)
            assert result.terms == pytest.approx(whole.terms, rel=1e-5, abs=1e-6), (layout, micro)
            torch.testing.assert_close(again, gradient, rtol=1e-4, atol=2e-6)
    finally:
        kernels.use(before)


def on_policy(made):
    """The same answers with the model's own log-probabilities as the old ones."""
    with torch.no_grad():
        found = token_logprobs(policy(), collate(made, "tree")).numpy()
    at = 0

    def old(prompt_group, completion):
        nonlocal at
        out = np.zeros(len(completion.ids))
        picked = np.ones(len(out), bool) if completion.mask is None else completion.mask.astype(bool)
        out[picked] = found[at : at + picked.sum()]
        at += picked.sum()
        return out

    return replaced(made, old=old)


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_on_policy_every_method_is_the_plain_gradient(name):
    """While the ratio is 1, nothing is clipped and the gradient is that of weight * advantage * log-probability: each method's
    first step. Whole-answer ratios spread over the tokens (weight 1/length) have to add up to it too."""
    made = without(on_policy(made_for(name)), "correction")
    result, gradient = run(name, made)
    assert result.terms["_ratio"] == pytest.approx(1, abs=1e-5)
    assert result.terms["_clipped_low"] == result.terms["_clipped_high"] == 0
    model = policy()
    answers = collate(made, "tree").answers
    logprobs = token_logprobs(model, collate(made, "tree"))
    weight = answers.tokens["weight"] * (answers.lengths[answers.completion_of] if name == "rloo" else 1)
    if (
        name == "gspo"
    ):  # the mean of an answer's advantages, times the mean of its log-probabilities: the same for equal advantages
        assert all(len(set(e.tokens["advantage"].tolist())) == 1 for f in made for e in f.completions)
    units = count(made, "tree")[TABLE[name].fixed["unit"]]
    (-(logprobs * weight * answers.tokens["advantage"]).sum() / units).backward()
    torch.testing.assert_close(gradient, torch.cat([p.grad.flatten() for p in model.parameters()]), rtol=1e-4, atol=1e-6)


class Given(torch.nn.Module):
    """A policy whose tokens have given log-probabilities."""

    lm_head = property(lambda self: self)

    def __init__(self, logprobs):
        super().__init__()
        self.logprobs = torch.nn.Parameter(torch.as_tensor(logprobs, dtype=torch.float32))

    def forward(self, batch):
        return Output(torch.zeros(*batch.shape, 1))

    def logprobs_and_entropy(self, hidden, targets, temperature):
        return self.logprobs, torch.zeros_like(self.logprobs)


def single(streams):
    """Answers of one token, with these streams."""
    count = len(next(iter(streams.values())))
    completions = (Completion(np.array([2]), None, {k: np.array([v[i]]) for k, v in streams.items()}) for i in range(count))
    return collate([PromptGroup("r", np.array([1]), (e,)) for e in completions], "tree")


@pytest.mark.parametrize("form", ["clip", "cispo"])
def test_clipping_stops_gradients_exactly_where_it_should(form):
    """One answer a token, ratios on both sides of both bounds, advantages of both signs. `clip` stops what would go further
    out, and nothing that comes back; with `delta` also the far side of a bad token. `cispo` never stops."""
    ratios = np.array([0.5, 0.85, 1.0, 1.25, 1.5, 4.0])
    for advantage in (1.0, -1.0):
        for delta in (None, 3.0):
            if form == "cispo" and delta:
                continue
            ones = np.ones(len(ratios))
            batch = single({"old": -2 * ones, "advantage": advantage * ones, "weight": ones})
            model = Given(np.log(ratios) - 2)
            name = "dapo" if form == "clip" else "cispo"
            settings = {"clip_low": 0.2, "clip_high": 0.3} | ({"delta": delta} if delta else {})
            objective(name, **settings)({"policy": model}, batch)["loss"].sum.backward()
            if form == "cispo":
                expected = -advantage * np.clip(ratios, 0.8, 1.3)
            else:
                passes = ratios < 1.3 if advantage > 0 else (ratios > 0.8) & (ratios < (delta or np.inf))
                expected = np.where(passes, -advantage * ratios, 0.0)
            np.testing.assert_allclose(model.logprobs.grad.numpy(), expected, rtol=1e-5, err_msg=f"{advantage} {delta}")


@pytest.mark.parametrize(("kl", "kl_importance"), [("k1", True), ("k2", True), ("k3", True), ("k2", False)])
@pytest.mark.parametrize("on_policy", [True, False])
def test_the_penalty_has_the_gradient_of_the_divergence(kl, kl_importance, on_policy):
    """Over all tokens there are, each as often as it is sampled, against the divergence itself: guards estimators that are right
    in value and wrong in gradient, as plain k1 (0 on average) and k3 are."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], requires_grad=True)
    reference = torch.tensor([0.1, 0.4, -0.6, 0.2]).log_softmax(0)
    sampled = logits.detach() if on_policy else torch.tensor([0.5, -0.2, 0.4, 0.0])
    if not (on_policy or kl_importance):
        return
    old = sampled.log_softmax(0)
    batch = single({"old": old.numpy(), "advantage": np.zeros(4), "weight": old.exp().numpy(), "reference": reference.numpy()})
    policy = Given(logits.detach().log_softmax(0))
    objective("grpo", kl_weight=1.0, kl=kl, kl_importance=kl_importance)({"policy": policy}, batch)["kl"].sum.backward()
    p = logits.log_softmax(0)
    (p.exp() * (p - reference)).sum().backward()
    through_softmax = policy.logprobs.grad - p.detach().exp() * policy.logprobs.grad.sum()
    torch.testing.assert_close(through_softmax, logits.grad, atol=1e-6, rtol=1e-5)


def test_tokens_of_weight_0_are_not_there():
    """Guards against masked answers that still move the entropy bonus, the penalty or what is measured."""
    made = made_for("grpo")
    none = replaced(made, weight=lambda f, e: np.where(np.arange(len(e.ids)) < len(e.ids) - 2, e.tokens["weight"], 0))

    def wild(key):
        return lambda f, e: np.where(e.tokens["weight"] == 0, -9.0, e.tokens[key])

    others = replaced(none, **{key: wild(key) for key in ("old", "advantage", "reference")})
    a, b = run("grpo", none, **PENALTIES), run("grpo", others, **PENALTIES)
    assert a[0].terms == b[0].terms
    assert torch.equal(a[1], b[1])
    assert a[0].terms["entropy"] == pytest.approx(-PENALTIES["entropy_weight"] * a[0].terms["_entropy"], rel=1e-6)


def test_correction_scales_the_surrogate_alone():
    """Guards against an importance that also scales the penalty, or that is left out."""
    made = made_for("grpo")
    twice = run("grpo", replaced(made, correction=2.0), kl_weight=0.3)[0].terms
    once = run("grpo", without(made, "correction"), kl_weight=0.3)[0].terms
    assert twice["loss"] == pytest.approx(2 * once["loss"], rel=1e-5, abs=1e-6)
    assert twice["kl"] == pytest.approx(once["kl"], rel=1e-6)


def test_temperature_divides_the_logits():
    """Answers that were sampled at another temperature come from another distribution: guards a setting that is ignored."""
    made = made_for("reinforce")
    found = run("reinforce", made, temperature=0.5)[0].terms
    model = policy()
    with torch.no_grad():
        model.model.norm.weight *= 2  # twice the last hidden states are twice the logits
        expected = objective("reinforce")({"policy": model}, collate(made, "tree"))
    answers = count(made, "tree")
    assert found["loss"] == pytest.approx(expected["loss"].sum.item() / answers["sequences"], rel=1e-5)
    assert found["_entropy"] == pytest.approx(expected["_entropy"].sum.item() / answers["tokens"], rel=1e-5)


def test_settings_are_honoured_or_refused():
    """A setting that a method does not have is an error with its name; one that it has by another default can be changed."""
    for name, key in (("reinforce", "clip_low"), ("grpo", "level"), ("cispo", "delta"), ("gspo", "unit"), ("rloo", "value_clip")):
        with pytest.raises(ConfigError, match=key):
            objective(name, **{key: 1})
    assert objective("dapo").settings["clip_high"] == 0.28
    assert objective("dapo", clip_high=0.4).settings["clip_high"] == 0.4
    assert objective("dapo", clip_high=None).settings["clip_high"] == 0.28
    with pytest.raises(AssertionError, match="reference"):
        run("grpo", without(made_for("grpo"), "reference"), kl_weight=0.1)
    assert "_kl" not in run("grpo", without(made_for("grpo"), "reference"))[0].terms


def golden(name):
    with kernels.disabled():
        result, _ = run(name, made_for(name), dtype=torch.float64, **PENALTIES)
    return {**result.terms, "grad_norm": result.grad_norm}


@pytest.mark.parametrize("name", METHODS)
def test_golden(name):
    """Guards against any silent change: plain torch, float64. Anew with `python -m tests.objectives.test_policy_gradient`."""
    assert golden(name) == pytest.approx(json.loads(GOLDEN.read_text(encoding="utf-8"))[name], rel=1e-6, abs=1e-7)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: golden(name) for name in METHODS}, indent=1) + "\n", encoding="utf-8")
