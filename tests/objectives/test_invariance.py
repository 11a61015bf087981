"""Promises 5 and 6 for every preference method: layout, accumulation, ranks and order change nothing but rounding."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.objectives import small
from tutelage.data.groups.groups import PromptGroup
from tutelage.data.tokens.loader import GlobalBatch
from tutelage.objectives import objective
from tutelage.train.step import StepConfig, StepResult, gradients, measure, prepared, with_shared


def recipe(method: str, policy: torch.nn.Module) -> StepConfig:
    return StepConfig({"policy": policy}, objective(method, **small.METHODS[method]))


def flat(policy: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def found(method: str, batch: GlobalBatch) -> tuple[StepResult, torch.Tensor]:
    policy = small.decoder()
    result = gradients(recipe(method, policy), batch)
    return result, flat(policy)


def same(a: tuple[StepResult, torch.Tensor], b: tuple[StepResult, torch.Tensor]) -> None:
    assert a[0].terms == pytest.approx(b[0].terms, abs=1e-5, rel=1e-5)
    torch.testing.assert_close(a[1], b[1], atol=1e-5 * float(a[1].abs().max()), rtol=1e-4)


@pytest.mark.parametrize("method", small.METHODS)
@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_layout(method, layout):
    """Guards against attention across answers, and against padding or a shared prompt that counts."""
    same(found(method, small.source(method).next(0)), found(method, small.source(method, layout=layout).next(0)))


@pytest.mark.parametrize("method", small.METHODS)
def test_accumulation(method):
    """Guards against micro-batches divided by their own counts, and against a reference point of each micro-batch (TRL's): 1x8,
    about 2x4 and 8x1 have one gradient, though prompt groups differ much in length."""
    whole = found(method, small.source(method).next(0))
    for micro_tokens, most in ((60, 4), (1, 8)):
        batch = small.source(method, micro_tokens=micro_tokens).next(0)
        assert 2 <= len(batch.micro) <= most and (micro_tokens > 1 or len(batch.micro) == 8)
        same(whole, found(method, batch))


def test_a_reference_point_of_each_micro_batch_would_be_seen():
    """Guards the test above: in its data the usual mistake is no rounding."""
    whole, _ = found("kto", small.source("kto").next(0))
    total, policy = 0.0, small.decoder()
    for group in small.rated():
        total += gradients(recipe("kto", policy), small.source("kto", [group]).next(0)).loss / 8
    assert whole.terms["_kl"] > 0.05
    assert abs(total - whole.loss) > 1e-2


@pytest.mark.parametrize("method", small.METHODS)
def test_order_of_groups(method):
    """Guards against answers that get another prompt group's reference, length or judgement."""
    made = small.prompt_groups(method)
    moved: Sequence[PromptGroup] = [*made[3:], *made[:3]][::-1]
    same(found(method, small.source(method, made).next(0)), found(method, small.source(method, moved).next(0)))


@pytest.mark.parametrize("method", ["dpo", "orpo", "cpo", "kto"])
def test_ranks(method):
    """Guards against a rank that divides by its own counts: two ranks' gradients add up to one rank's. What `prepare` finds adds
    up as well."""
    one = small.decoder()
    whole = gradients(recipe(method, one), small.source(method).next(0))
    two, loss = small.decoder(), 0.0
    batches = [small.source(method, rank=rank, world=2, micro_tokens=40).next(0) for rank in range(2)]
    assert all(len(b.micro) > 1 for b in batches)
    shares = [prepared(recipe(method, two), b.micro, b.counts) for b in batches]
    shared = {name: sum(s[name] for s in shares) for name in shares[0]}
    for batch in batches:
        for micro in batch.micro:
            terms = recipe(method, two).objective({"policy": two}, with_shared(micro, shared))
            share = sum(t.sum / batch.counts[t.unit] for name, t in terms.items() if not name.startswith("_"))
            share.backward()
            loss += share.item()
    assert loss == pytest.approx(whole.loss, rel=1e-5)
    torch.testing.assert_close(flat(one), flat(two), atol=1e-5 * float(flat(one).abs().max()), rtol=1e-4)


@pytest.mark.parametrize("method", small.METHODS)
def test_validation_measures_what_a_step_does(method):
    """Guards against a validation that forgets a unit or the reference point, or cuts otherwise and gets something else."""
    policy = small.decoder()
    whole = gradients(recipe(method, policy), small.source(method).next(0))
    batches, counts = small.source(method, micro_tokens=30).validation()
    assert len(batches) > 3
    assert measure(recipe(method, policy), batches, counts) == pytest.approx(whole.terms, rel=1e-5, abs=1e-5)
