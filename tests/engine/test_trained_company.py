"""A trained model, whose answers are worth something: they do not depend on their company, and the trainer scores them alike.

Log-probabilities agree within CLOSE, greedy tokens up to the first place where the best two are nearer than NEAR.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine import small
from tutelage.chat.render import Renderer
from tutelage.data.tokens.loader import GlobalBatch
from tutelage.engine import Completion, Engine, Sampling
from tutelage.engine.runner import FusedRunner
from tutelage.models.adapters.lora import Lora, LowRank
from tutelage.models.decoder import Decoder
from tutelage.models.init import build
from tutelage.models.interface import Batch
from tutelage.objectives import objective
from tutelage.train.step import StepConfig, gradients

CLOSE, NEAR, TOKENS = 1e-4, 2e-4, 24
GREEDY = Sampling(TOKENS, temperature=0, logprobs=2, ignore_eos=True)
SAMPLED = Sampling(TOKENS, temperature=1.0, seed=3, logprobs=0)


@dataclass
class Trained:
    renderer: Renderer
    model: Decoder
    draft: Decoder  # of one layer, trained on the same texts
    losses: list[float]  # nats a token, first and last
    prompts: list[list[int]]
    worn: list[Lora | None]  # by the prompts

    def engine(self, **how: Any) -> Engine:
        return Engine(self.model, self.renderer, **how)


def text(rng: random.Random) -> str:
    """One of the texts, or its words in another order: something stays to be guessed."""
    words = rng.choice(small.TEXTS).split()
    if rng.random() < 0.5:
        rng.shuffle(words)
    return " ".join(words)


def train(model: Decoder, renderer: Renderer, steps: int) -> list[float]:
    """Plain AdamW on our own objective. Returns the mean loss of the first and of the last ten steps."""
    rng, losses = random.Random(0), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(steps):
        batch = Batch.of([renderer.tokenizer.encode_text(text(rng)) for _ in range(16)])
        loss = objective("next_token")({"policy": model}, batch)["loss"].sum / batch.weights.sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return [float(np.mean(losses[:10])), float(np.mean(losses[-10:]))]


def adapter(model: Decoder, seed: int) -> Lora:
    g = torch.Generator().manual_seed(seed)
    parts = {
        name: LowRank(torch.randn(4, m.in_features, generator=g) * 0.1, torch.randn(m.out_features, 4, generator=g) * 0.1, 1.0)
        for name, m in model.named_modules()
        if name.endswith(("q_proj", "v_proj", "down_proj")) and isinstance(m, torch.nn.Linear)
    }
    assert parts
    return Lora(parts)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    renderer = small.renderer(tmp_path_factory.mktemp("trained") / "t")
    config = small.config(renderer.tokenizer.vocab_size, 256)
    model, draft = build(config, 0), small.model(renderer.tokenizer.vocab_size, 256, seed=1)
    losses = train(model, renderer, 200)
    train(draft, renderer, 60)
    rng = random.Random(1)
    shared = renderer.tokenizer.encode_text("the cat sat on the mat, and the dog sat by the door. ")
    own = [renderer.tokenizer.encode_text(text(rng))[: rng.randint(1, 12)] for _ in range(15)]
    long = (renderer.tokenizer.encode_text(" ".join(text(rng) for _ in range(20))))[:140]  # goes through the model's own products
    prompts = [ids if i % 3 else shared + ids for i, ids in enumerate(own)] + [long]
    loras = [None, adapter(model, 1), None, adapter(model, 2)]
    return Trained(renderer, model, draft, losses, prompts, [loras[i % 4] for i in range(16)])


def alone(trained: Trained, how: Sampling, **engine: Any) -> list[Completion]:
    """Each answer from an engine that has seen nothing else."""
    return [
        trained.engine(slots=1, prefix_cache=False, **engine).generate([ids], how, lora)[0]
        for ids, lora in zip(trained.prompts, trained.worn, strict=True)
    ]


def together(trained: Trained, how: Sampling, order: Sequence[int], **engine: Any) -> list[Completion]:
    """All answers of one engine asked twice (the second time, its cache has seen them), in the order of the prompts."""
    made = trained.engine(**engine)
    for _ in range(2):
        done = made.generate([trained.prompts[i] for i in order], how, [trained.worn[i] for i in order])
    return [done[order.index(i)] for i in range(len(order))]


STRAIGHT = list(range(16))
SHUFFLED = random.Random(2).sample(STRAIGHT, 16)
WAYS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "one by one": (STRAIGHT, {"slots": 1}),
    "sixteen": (STRAIGHT, {"slots": 16}),
    "sixteen, nothing cached": (STRAIGHT, {"slots": 16, "prefix_cache": False}),
    "shuffled": (SHUFFLED, {"slots": 16}),
    "few slots, prompts in parts": (SHUFFLED, {"slots": 3, "prefill_tokens": 7}),
    "looked up": (STRAIGHT, {"slots": 16, "speculate": 4}),
    "looked up, shuffled, nothing cached": (SHUFFLED, {"slots": 2, "speculate": 3, "prefix_cache": False}),
    "a draft": (SHUFFLED, {"slots": 3, "speculate": 4, "draft": "draft"}),
    "itself as draft": (STRAIGHT, {"slots": 5, "speculate": 4, "draft": "model"}),
}


def settings(trained: Trained, way: str) -> tuple[list[int], dict[str, Any]]:
    order, how = WAYS[way]
    return order, how | ({"draft": getattr(trained, how["draft"])} if "draft" in how else {})


def test_it_is_trained(trained: Trained) -> None:
    first, last = trained.losses
    assert last < 0.25 * first, trained.losses


@pytest.fixture(scope="module")
def references(trained: Trained) -> list[Completion]:
    return alone(trained, GREEDY)


def sure(answer: Completion) -> int:
    """How many tokens come before a place where rounding may choose."""
    near = [s.top[0][1] - s.top[1][1] < NEAR for s in answer.scores]
    return near.index(True) if True in near else len(near)


def test_places_where_rounding_may_choose_are_few(references: list[Completion]) -> None:
    """A comparison that ends at its first token proves nothing."""
    total = sum(len(a.ids) for a in references)
    near = sum(s.top[0][1] - s.top[1][1] < NEAR for a in references for s in a.scores)
    assert total == 16 * TOKENS and near <= 2, near
    assert sum(map(sure, references)) > 0.9 * total and len({a.ids for a in references}) > 8


@pytest.mark.parametrize("way", WAYS)
def test_answers_do_not_depend_on_their_company(trained: Trained, references: list[Completion], way: str) -> None:
    """Scores that move with the batch; a prefix taken from a text that wore another adapter; a guess taken for an answer."""
    order, how = settings(trained, way)
    for want, got in zip(references, together(trained, GREEDY, order, **how), strict=True):
        same = sure(want)
        assert got.ids[:same] == want.ids[:same]
        ours, theirs = ([s.logprob for s in a.scores[:same]] for a in (got, want))
        np.testing.assert_allclose(ours, theirs, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("way", [w for w, (_, how) in WAYS.items() if "speculate" in how])
def test_guesses_are_made_and_prove_right(trained: Trained, way: str) -> None:
    """Without a guess that is taken, the ways above would all be the same one."""
    order, how = settings(trained, way)
    made, steps, guesses = trained.engine(**how), 0, 0
    logits = made.runner.logits

    def counted(work: list[Any]) -> torch.Tensor:
        nonlocal steps, guesses
        steps, guesses = steps + 1, guesses + sum(w.wanted > 1 for w in work)
        return logits(work)

    made.runner.logits = counted  # type: ignore[method-assign]
    prompts, worn = [trained.prompts[i] for i in order], [trained.worn[i] for i in order]
    made.generate(prompts, GREEDY, worn)
    guessing, steps = steps, 0
    plain = trained.engine(slots=how["slots"], prefix_cache=False)
    logits, plain.runner.logits = plain.runner.logits, counted  # type: ignore[method-assign]
    plain.generate(prompts, GREEDY, worn)
    assert guesses > 5 and guessing < steps, (guesses, guessing, steps)


@pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_batch_invariant_is_equality_of_bits(trained: Trained, how: Sampling) -> None:
    """Resuming to the bit needs it: one bit of one score would choose another token one day."""
    if not isinstance(trained.engine().runner, FusedRunner):
        pytest.skip("bitwise equality needs our kernels")
    want = alone(trained, how, batch_invariant=True)
    for way in WAYS:
        order, settled = settings(trained, way)
        got = together(trained, how, order, batch_invariant=True, **settled)
        assert [a.ids for a in got] == [a.ids for a in want], way
        assert [a.scores for a in got] == [a.scores for a in want], way


def test_scores_of_given_tokens_are_those_of_generation(trained: Trained, references: list[Completion]) -> None:
    engine = trained.engine()
    for answer, lora in zip(references, trained.worn, strict=True):
        (scores,) = engine.score([((*answer.prompt, *answer.ids), len(answer.prompt))], lora)
        np.testing.assert_allclose(scores, [s.logprob for s in answer.scores], atol=CLOSE, rtol=0)


def test_trainer_and_engine_agree(trained: Trained) -> None:
    """Promise 16: the loss of a training step is minus the sum of the engine's scores, of answers and of whole texts.

    Ratios of policies that are not 1 at the first step, where nothing was learnt yet.
    """
    engine = trained.engine()
    answers = engine.generate(trained.prompts, SAMPLED)
    texts = [[*a.prompt, *a.ids] for a in answers]
    recipe = StepConfig({"policy": trained.model}, objective("next_token"))

    def loss(rows: list[list[int]], supervised: list[list[float]] | None) -> float:
        """Nats in all, as a step of the loop measures them."""
        micro = [Batch.of(rows[i : i + 5], supervised=supervised and supervised[i : i + 5]) for i in range(0, len(rows), 5)]
        count = sum(float(m.weights.sum()) for m in micro)
        return gradients(recipe, GlobalBatch(micro, {"tokens": count}, [])).loss * count

    for a, ids in zip(answers, texts, strict=True):
        asked = [[0.0] * len(a.prompt) + [1.0] * len(a.ids)]
        own, scored = [s.logprob for s in a.scores], engine.score([(ids, len(a.prompt))])[0]
        assert loss([ids], asked) == pytest.approx(-sum(own), abs=CLOSE) == pytest.approx(-float(scored.sum()), abs=CLOSE)
    whole = [scores for scores in engine.score([(ids, 1) for ids in texts])]
    count = sum(map(len, whole))
    assert loss(texts, None) / count == pytest.approx(-float(sum(s.sum() for s in whole)) / count, abs=CLOSE / 10)
    trained.model.zero_grad()
