"""Memory of keys and values: bounded by tokens, whatever the context and the number of places; answers stay what they are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import small
from tests.models.shapes import reference
from tutelage.engine import Engine, Sampling
from tutelage.engine.blocks import token_bytes
from tutelage.errors import ConfigError
from tutelage.models import kernels
from tutelage.models.hf.causal import Adapter

VOCAB = 97
GREEDY = Sampling(50, temperature=0, logprobs=0, ignore_eos=True)
SAMPLED = Sampling(50, temperature=0.9, seed=3, logprobs=0, ignore_eos=True, stop_ids=(5,))
NEOX: dict[str, Any] = {
    "model_type": "gpt_neox", "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 128,
}  # fmt: skip


def texts() -> list[list[int]]:
    g = torch.Generator().manual_seed(4)
    return [torch.randint(6, VOCAB, (n,), generator=g).tolist() for n in (3, 40, 9, 60, 21, 5, 33, 17, 8, 50)]


def run(engine: Engine, how: Sampling) -> tuple[list[Any], int]:
    """Answers, and the most tokens that were in memory between two steps."""
    sequences, most = [engine.submit(ids, how) for ids in texts()], 0
    while not engine.idle:
        engine.step()
        most = max(most, sum(engine.scheduler.memory.resident.values()))
        assert 0 <= engine.cache_usage <= 1
    return [s.completion() for s in sequences], most


@pytest.fixture(params=["fused", "by operation", "transformers"])
def model(request: pytest.FixtureRequest) -> Any:
    if request.param == "transformers":
        return Adapter(reference(NEOX))
    return small.model(VOCAB, head=16 if request.param == "fused" else 8)


@pytest.mark.parametrize("how", [GREEDY, SAMPLED])
def test_a_tight_memory_changes_no_answer(model: Any, how: Sampling) -> None:
    """Sequences that give their places back and wait again: tokens read twice, noise of the wrong place, a stop missed."""
    want, _ = run(Engine(model, slots=8), how)
    tight = Engine(model, slots=8, cache_bytes=token_bytes(model) * 200)
    got, most = run(tight, how)
    assert tight.scheduler.preemptions > 0 and most <= 200
    for a, b in zip(want, got, strict=True):
        assert (a.ids, a.finish_reason) == (b.ids, b.finish_reason)
        assert [s.logprob for s in a.scores] == pytest.approx([s.logprob for s in b.scores], abs=1e-4)
    assert len(tight.scheduler.slots) == tight.scheduler.slots.count


def test_enough_memory_preempts_nobody(model: Any) -> None:
    engine = Engine(model, slots=8)
    run(engine, GREEDY)
    assert engine.scheduler.preemptions == 0


def test_guesses_have_room(model: Any) -> None:
    engine = Engine(model, slots=8, speculate=4, cache_bytes=token_bytes(model) * 200)
    got, most = run(engine, GREEDY)
    assert [c.ids for c in got] == [c.ids for c in run(Engine(model, slots=8), GREEDY)[0]] and most <= 200


def test_a_context_that_does_not_fit_is_said() -> None:
    model = small.model(VOCAB)
    with pytest.raises(ConfigError, match="cache_gib"):
        Engine(model, cache_bytes=token_bytes(model) * 127)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux only")
def test_places_take_memory_as_they_are_used() -> None:
    """16 places of a long context must not take the machine's memory; what was used must come back."""

    def held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    model = small.model(VOCAB, context=1 << 17)
    before = held()
    with kernels.disabled():
        cache = model.new_cache(16, 1 << 17)
    assert cache.nbytes > 900 << 20 and held() - before < 50 << 20
    for part in (*cache.k, *cache.v):
        part[3].fill_(1.0)
    assert held() - before > 50 << 20
    cache.trim(3, 100)
    assert held() - before < 20 << 20
    assert float(cache.k[0][3, :100].sum()) == cache.k[0][3, :100].numel()
