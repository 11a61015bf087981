"""Models of `transformers` in our engine, with their own caches: the answers of `generate`, each token read once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.watched import Watch
from tests.models.shapes import reference
from tutelage.engine import Engine, Sampling
from tutelage.engine.hf_runner import HfRunner
from tutelage.engine.runner import RecomputingRunner
from tutelage.models.hf.causal import Adapter

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
CACHED: dict[str, dict[str, Any]] = {
    "gpt_neox": {"model_type": "gpt_neox", **SHAPE},
    "opt": {"model_type": "opt", **SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"model_type": "bloom", "vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"model_type": "falcon", **SHAPE, "alibi": True, "multi_query": True},
    "stablelm": {"model_type": "stablelm", **SHAPE, "num_key_value_heads": 2},
    "phi": {"model_type": "phi", **SHAPE},
    "cohere2-window": {"model_type": "cohere2", **SHAPE, "num_key_value_heads": 2, "sliding_window": 4,
                       "sliding_window_pattern": 2},
}  # fmt: skip
NOT_CACHED: dict[str, dict[str, Any]] = {
    "mamba": {"model_type": "mamba", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "hybrid": {"model_type": "lfm2", **SHAPE, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
}  # fmt: skip
GREEDY = Sampling(12, temperature=0)


def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, 97, (n,), generator=g).tolist() for n in (5, 11, 11, 20)]


def generated(theirs: Any, prompt: list[int], count: int = 12) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=None)
    return tuple(out[0, len(prompt) :].tolist())


@pytest.fixture(scope="module", params=CACHED)
def theirs(request: pytest.FixtureRequest) -> Any:
    return reference(CACHED[request.param])


def test_greedy_equals_generate(theirs: Any) -> None:
    """A cache a token short, or one sequence's in another's place, changes the answer; so do prompts read in parts."""
    for engine in (Engine(Adapter(theirs), slots=3, max_length=60), Engine(Adapter(theirs), max_length=60, prefill_tokens=4)):
        assert isinstance(engine.runner, HfRunner)
        done = engine.generate(prompts(), GREEDY)
        assert [c.ids for c in done] == [generated(theirs, p) for p in prompts()]


def test_logits_equal_those_of_whole_sequences(theirs: Any) -> None:
    """Every step of a mixture: parts of prompts, samples that part and meet again, guesses that were wrong, a cancelled one."""
    engine = Engine(Adapter(theirs), slots=5, max_length=60, prefill_tokens=12, speculate=3)
    watch = Watch(engine)
    twice = [p * 2 for p in prompts()[:2]]
    sequences = [engine.submit(p, Sampling(4 + 3 * i, seed=i), i) for p in prompts() for i in range(2)]
    sequences += [engine.submit(p, Sampling(20, temperature=0, logit_bias={p[-1]: 3.0})) for p in twice]
    for step in range(200):
        engine.step()
        if step == 3:
            engine.cancel(sequences[0])
    assert all(s.finish_reason for s in sequences)
    assert any(w.wanted > 1 for work in watch.work for w in work), "nothing was guessed"
    assert any(rows > 1 for rows, _ in watch.reads)


def test_each_token_is_read_once_and_samples_of_a_prompt_together() -> None:
    """A model that reads its whole text for every token; one call of it for every sample."""
    engine = Engine(Adapter(reference(CACHED["gpt_neox"])), slots=4)
    watch = Watch(engine)
    engine.generate(prompts()[:1], Sampling(6, seed=0, n=4))
    assert watch.reads == [(4, 5)] + [(4, 1)] * 5


def test_a_sequence_that_ends_frees_its_cache() -> None:
    """Rows of the dead that are read, and kept, until the server stops."""
    engine = Engine(Adapter(reference(CACHED["gpt_neox"])), slots=3)
    runner = engine.runner
    assert isinstance(runner, HfRunner)
    first, second, third = (engine.submit(prompts()[0], Sampling(n, seed=n)) for n in (2, 9, 30))
    engine.step()
    assert {state.rows for state, _ in runner.rows.values()} == {3}
    engine.step()
    engine.step()
    assert first.finish_reason == "length" and {state.rows for state, _ in runner.rows.values()} == {2}
    engine.cancel(third)
    engine.step()
    assert [(state.rows, state.length) for state, _ in runner.rows.values()] == [(1, second.cached)]
    engine.cancel(second)
    assert not runner.rows


@pytest.mark.parametrize("name", NOT_CACHED)
def test_models_with_other_states_are_read_again(name: str) -> None:
    """A recurrent state taken for keys and values: it cannot be cut back, and rows of it are not rows of texts."""
    theirs = reference(NOT_CACHED[name])
    engine = Engine(Adapter(theirs), slots=3, max_length=60, speculate=2)
    assert isinstance(engine.runner, RecomputingRunner)
    assert [c.ids for c in engine.generate(prompts(), GREEDY)] == [generated(theirs, p) for p in prompts()]


@torch.inference_mode()
def test_angles_that_change_with_length_are_read_again() -> None:
    """Keys turned by the angles of a short text, looked at by a query with those of a long one."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 4.0, 8.0],
    }  # fmt: skip
    theirs = reference({"model_type": "gpt_neox", **SHAPE, "rope_parameters": rope})
    ids = list(prompts()[1])
    for _ in range(12):
        ids.append(int(theirs(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert Engine(Adapter(theirs)).generate([ids[:-12]], GREEDY)[0].ids == tuple(ids[-12:])


def test_making_an_engine_leaves_the_model_as_it_was() -> None:
    """The trial of a model's cache must not switch dropout off for good, nor be misled by it."""
    model = Adapter(reference(CACHED["opt"]))
    for mode in (True, False):
        model.train(mode)
        assert isinstance(Engine(model).runner, HfRunner)
        assert (model.training, model.hf.training) == (mode, mode)
