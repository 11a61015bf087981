"""PPO: values and advantages against a table worked by hand and against numpy, answer by answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.objectives.rollouts import Value, policy, prompt_groups, replaced
from tutelage.data.groups.groups import Completion, PromptGroup, bins, collate
from tutelage.data.groups.source import count, group_batch
from tutelage.models import kernels
from tutelage.models.interface import Batch
from tutelage.objectives import objective
from tutelage.rollout.advantages import gae, token_rewards, whiten
from tutelage.train.step import StepConfig, gradients

GOLDEN = Path(__file__).parent.parent / "golden" / "ppo.json"
PENALTIES = {"kl_weight": 0.3, "entropy_weight": 0.2}


def run(made, micro=1000, layout="tree", dtype=torch.float32, weights=None, **settings):
    """The step's result and the gradient of each part, one vector."""
    parts = {"policy": policy(dtype), "value": Value(dtype)}
    groups = bins([f.size(layout) for f in made], micro)[0]
    batch = group_batch([[made[i] for i in g] for g in groups], count(made, layout), layout)
    result = gradients(StepConfig(parts, objective("ppo", **settings), weights or {}), batch)
    return result, {name: torch.cat([p.grad.flatten() for p in part.parameters()]) for name, part in parts.items()}


def judged(made, reward=1.0):
    """Groups with the streams that a rollout makes of an answer: GAE over rewards at the end and penalties at every token, then
    whitened over all tokens."""
    found, flat = {}, []
    for f in made:
        for e in f.completions:
            mask = np.ones(len(e.ids), bool) if e.mask is None else e.mask.astype(bool)
            s = {k: v[mask] for k, v in e.tokens.items()}
            rewards = token_rewards(reward * s["advantage"][0], s["old"], s["reference"], kl_weight=0.05)
            found[id(e)] = (mask, *gae(rewards, s["value_old"], gamma=0.99, lam=0.9))
            flat.append(found[id(e)][1])
    white = np.split(whiten(np.concatenate(flat)), np.cumsum([len(a) for a in flat])[:-1])
    order = {id(e): w for e, w in zip((e for f in made for e in f.completions), white, strict=True)}

    def spread(e, values):
        out = np.zeros(len(e.ids))
        out[found[id(e)][0]] = values
        return out

    return replaced(
        made, weight=1.0, correction=1.0, advantage=lambda f, e: spread(e, order[id(e)]),
        **{"return": lambda f, e: spread(e, found[id(e)][2])},
    )  # fmt: skip


def test_a_table_worked_by_hand():
    """One answer of three tokens. Rewards 0 0 1, values .5 .6 .2, gamma .9, lambda .5: advantages .013 -.06 .8, returns .513 .54
    1. New log-probabilities make the ratios 1.5, 0.5 and 1.1; new values are .9, .6 and .3.
    Gains: 1.2 * .013; the worse of .5 and .8 times -.06; 1.1 * .8. Together .0156 - .048 + .88 = .8476.
    Squared errors of values: (.9 - .513)^2 = .149769 against (.7 - .513)^2; (.06)^2 = .0036; (.7)^2 = .49: half is .3216845."""
    advantage, returns = gae([0, 0, 1], [0.5, 0.6, 0.2], gamma=0.9, lam=0.5)
    old = np.array([-1.0, -2.0, -0.5])
    streams = {
        "old": old,
        "advantage": advantage,
        "weight": np.ones(3),
        "value_old": np.array([0.5, 0.6, 0.2]),
        "return": returns,
    }
    made = [PromptGroup("r", np.array([7]), (Completion(np.array([1, 2, 3]), None, streams),))]

    class Given(torch.nn.Module):
        lm_head = property(lambda self: self)

        def forward(self, batch: Batch):
            return type("Out", (), {"hidden": torch.zeros(1, 4, 1)})

        def logprobs_and_entropy(self, hidden, targets, temperature):
            return torch.tensor(old + np.log([1.5, 0.5, 1.1])).float(), torch.zeros(3)

    values = torch.tensor([[0.9], [0.6], [0.3], [5.0]])  # the last place predicts nothing
    terms = objective("ppo")({"policy": Given(), "value": lambda batch: values}, collate(made, "tree"))
    assert terms["loss"].sum.item() == pytest.approx(-0.8476, abs=1e-6)
    assert terms["value"].sum.item() == pytest.approx(0.3216845, abs=1e-6)
    assert {term.unit for term in terms.values()} == {"tokens"}
    assert terms["_value_clipped"].sum.item() == 0
    assert terms["_clipped_high"].sum.item() == terms["_clipped_low"].sum.item() == 1


def by_numpy(made, value_clip=0.2, clip=0.2):
    """Losses and shares of a whole batch from log-probabilities in float64, token by token."""
    model, critic = policy(torch.float64), Value(torch.float64)
    loss = value = clipped = tokens = 0.0
    for prompt_group in made:
        for completion in prompt_group.completions:
            text = np.concatenate([prompt_group.prompt, completion.ids])
            batch = Batch.of([text.tolist()])
            with torch.no_grad():
                z, v = model.logits(batch)[0].double().log_softmax(-1).numpy(), critic(batch)[:, 0].numpy()
            for t in range(len(completion.ids)):
                if completion.mask is not None and not completion.mask[t]:
                    continue
                at, s = len(prompt_group.prompt) - 1 + t, {k: float(x[t]) for k, x in completion.tokens.items()}
                r = np.exp(z[at, completion.ids[t]] - s["old"])
                loss -= min(r * s["advantage"], min(max(r, 1 - clip), 1 + clip) * s["advantage"])
                near = s["value_old"] + min(max(v[at] - s["value_old"], -value_clip), value_clip)
                errors = (v[at] - s["return"]) ** 2, (near - s["return"]) ** 2
                far = abs(v[at] - s["value_old"]) > value_clip
                value, clipped, tokens = value + max(errors) / 2, clipped + (far and errors[1] > errors[0]), tokens + 1
    return loss / tokens, value / tokens, clipped / tokens


@pytest.mark.parametrize("value_clip", [0.2, 0.5])
def test_against_numpy(value_clip):
    """Guards places of values (before a token, not at it), the larger of two errors, and means over tokens."""
    made = judged(prompt_groups())
    terms = run(made, value_clip=value_clip)[0].terms
    loss, value, clipped = by_numpy(made, value_clip)
    assert terms["loss"] == pytest.approx(loss, rel=1e-5)
    assert terms["value"] == pytest.approx(value, rel=1e-5)
    assert terms["_value_clipped"] == pytest.approx(clipped, rel=1e-5)
    assert 0.05 < clipped < 0.9


def test_without_a_clip_values_are_regressed():
    made = judged(prompt_groups())
    assert run(made, value_clip=1e9)[0].terms["value"] == pytest.approx(by_numpy(made, 1e9)[1], rel=1e-5)
    assert "_value_clipped" in run(made)[0].terms


@pytest.mark.parametrize("own_kernels", [True, False])
def test_layout_and_accumulation_change_nothing(own_kernels):
    """Promises 5 and 6, for the value head too."""
    made = judged(prompt_groups())
    before = kernels.available()
    kernels.use(own_kernels)
    try:
        whole, gradient = run(made, **PENALTIES)
        for layout, micro in (("tree", 1), ("tree", 60), ("packed", 70), ("rows", 60)):
            result, again = run(made, micro, layout, **PENALTIES)
            assert result.terms == pytest.approx(whole.terms, rel=1e-5, abs=1e-6)
            for name in gradient:
                torch.testing.assert_close(again[name], gradient[name], rtol=1e-4, atol=2e-6)
    finally:
        kernels.use(before)


def test_value_is_a_term_of_its_own():
    """The loop weighs it: half its weight is half the value head's gradient, and nothing else changes."""
    made = judged(prompt_groups())
    _, one = run(made)
    _, half = run(made, weights={"value": 0.5})
    torch.testing.assert_close(half["value"], one["value"] / 2)
    assert torch.equal(half["policy"], one["policy"])


def test_a_clipped_value_gets_no_gradient():
    """Guards a clip that takes the smaller error: it would freeze values that are wrong and far from the old ones."""
    made = replaced(
        prompt_groups(), value_old=50.0, weight=1.0, **{"return": 50.5}
    )  # the values are near 0: beyond the clip, still wrong
    assert run(made)[1]["value"].abs().max() > 0
    made = replaced(
        prompt_groups(), value_old=50.0, weight=1.0, **{"return": 0.0}
    )  # they went further than the clip lets them: enough
    result, gradient = run(made)
    assert result.terms["_value_clipped"] == pytest.approx(1)
    assert gradient["value"].abs().max() == 0


def golden():
    with kernels.disabled():
        result, _ = run(judged(prompt_groups()), dtype=torch.float64, **PENALTIES)
    return {**result.terms, "grad_norm": result.grad_norm}


def test_golden():
    """Guards against any silent change: plain torch, float64. Anew with `python -m tests.objectives.test_ppo`."""
    assert golden() == pytest.approx(json.loads(GOLDEN.read_text(encoding="utf-8")), rel=1e-6, abs=1e-7)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n", encoding="utf-8")
