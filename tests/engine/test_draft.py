"""Guesses of a smaller model: they change no answer, save steps where they are right, and stop where they are wrong."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine import small
from tutelage.engine import Engine, Sampling
from tutelage.engine.blocks import token_bytes
from tutelage.engine.draft import ModelDrafter
from tutelage.errors import ConfigError
from tutelage.models.decoder import Decoder
from tutelage.models.init import build

VOCAB = 331
GREEDY, SAMPLED = Sampling(40, temperature=0), Sampling(40, temperature=0.9, seed=5, top_p=0.95)


def pair(head: int = 16, agree: bool = True) -> tuple[Decoder, Decoder]:
    """A model of six layers and a draft of its first one; all others add nothing where they are to agree."""
    config = replace(small.config(VOCAB, 256, head), num_hidden_layers=6)
    large = build(replace(config, layers=config.layers[:1] * 6), seed=0).eval()
    if agree:
        with torch.no_grad():
            for layer in large.model.layers[1:]:  # type: ignore[attr-defined]
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
    draft = build(replace(config, num_hidden_layers=1, layers=config.layers[:1]), seed=0).eval()
    draft.load_state_dict(copy.deepcopy(large.state_dict()), strict=False)
    return large, draft


def texts() -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in (5, 40, 9, 130, 22)]


def steps(engine: Engine, prompt: list[int], how: Sampling) -> int:
    engine.submit(prompt, how)
    return sum(1 for _ in iter(lambda: engine.step() or engine.idle, True))


@pytest.mark.parametrize("how", [GREEDY, SAMPLED])
@pytest.mark.parametrize("agree", [True, False])
@pytest.mark.parametrize("head", [16, 8])
def test_a_draft_changes_nothing(head: int, agree: bool, how: Sampling) -> None:
    """A guess taken without a look at its own logits; a draft that reads one sequence's text in another's place."""
    large, draft = pair(head, agree)
    plain = [c.ids for c in Engine(large, slots=3).generate(texts(), how)]
    engine = Engine(large, slots=3, draft=draft, speculate=5)
    assert [c.ids for c in engine.generate(texts(), how)] == plain
    assert [c.ids for c in engine.generate(texts()[::-1], how)] == [c.ids for c in Engine(large).generate(texts()[::-1], how)]


@pytest.mark.parametrize("how", [GREEDY, SAMPLED])
def test_right_guesses_save_steps(how: Sampling) -> None:
    """Guesses that are never accepted; with sampling, a draft that draws with noise of its own."""
    large, draft = pair()
    how = replace(how, ignore_eos=True)
    assert steps(Engine(large, draft=draft, speculate=4), texts()[0], how) < 0.35 * steps(Engine(large), texts()[0], how)


def test_wrong_guesses_stop() -> None:
    """A draft that knows nothing would be asked at every token, for nothing."""
    large, draft = pair(agree=False)
    engine = Engine(large, draft=draft)
    asked: list[int] = []
    propose = engine.guesser.propose  # type: ignore[union-attr]
    engine.guesser.propose = lambda s, most: asked.append(1) or propose(s, most)  # type: ignore[union-attr,method-assign,func-returns-value]
    engine.generate([texts()[0]], Sampling(120, temperature=0, ignore_eos=True))
    assert 5 < len(asked) < 40


def test_a_draft_that_does_not_fit_is_refused() -> None:
    large, _ = pair()
    for other, found in ((small.model(VOCAB + 1, 256), "vocab_size"), (small.model(VOCAB, 128), "max_position_embeddings")):
        with pytest.raises(ConfigError) as error:
            Engine(large, draft=other)
        assert error.value.field == "draft" and found in str(error.value.found)


def test_penalties_and_long_answers_hold_with_a_draft() -> None:
    large, draft = pair()
    how: dict[str, Any] = {"temperature": 0.7, "seed": 2, "frequency_penalty": 1.2, "logit_bias": {7: 3.0}, "n": 3}
    want = [c.ids for c in Engine(large, slots=4).generate(texts()[:2], Sampling(60, **how))]
    assert [c.ids for c in Engine(large, slots=4, draft=draft).generate(texts()[:2], Sampling(60, **how))] == want


def test_a_draft_forgets_what_memory_was_taken_for() -> None:
    """Keys that the system has taken back are zeros: guesses from them would be wrong ones, for as long as the text goes on."""
    large, draft = pair()
    how = replace(GREEDY, ignore_eos=True, max_tokens=80)
    want = [c.ids for c in Engine(large, slots=4).generate(texts(), how)]
    engine = Engine(large, slots=4, draft=draft, cache_bytes=(token_bytes(large) + token_bytes(draft)) * 400)
    assert [c.ids for c in engine.generate(texts(), how)] == want and engine.preemptions > 0
    assert isinstance(engine.guesser, ModelDrafter)
    engine.guesser.trim(0, 3)
    assert engine.guesser._readers[0].cached <= 3
