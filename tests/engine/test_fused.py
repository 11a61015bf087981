"""The fused forward pass, the prefix cache and guessing: faster ways to the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine import small
from tests.models.shapes import CASES
from tutelage.engine import Engine, Sampling
from tutelage.engine.blocks import Held, Slots, common_length
from tutelage.engine.drafts import Endings
from tutelage.engine.runner import FusedRunner
from tutelage.errors import ConfigError
from tutelage.models import kernels
from tutelage.models.config import DecoderConfig
from tutelage.models.init import build
from tutelage.models.interface import Batch, CacheView
from tutelage.models.kernels.decoder import FusedDecoder, round_rows

VOCAB = 97
needs_kernels = pytest.mark.skipif(not kernels.available(), reason=f"kernels: {kernels.why_not()}")


@pytest.fixture(scope="module")
def model() -> Any:
    return small.model(VOCAB, context=256)


def texts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length + 3 * i,), generator=g).tolist() for i in range(count)]


def flat(rows: list[list[int]], slots: list[int], first: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.tensor([token for row in rows for token in row])
    slot = torch.tensor([s for s, row in zip(slots, rows, strict=True) for _ in row])
    place = torch.tensor([at + i for at, row in zip(first, rows, strict=True) for i in range(len(row))])
    return ids, slot, place


@needs_kernels
@pytest.mark.parametrize("case", [c for c in CASES if "longrope" not in c])
@torch.inference_mode()
def test_fused_logits_are_the_models(case: str) -> None:
    """A norm at the wrong place, a head turned twice, a window off by one: each family has its own."""
    wide = {"n_embd": 64, "n_inner": 80} if case.startswith("gpt2") else {"hidden_size": 64, "head_dim": 16}
    model = build(DecoderConfig.from_hf(CASES[case] | wide), 1).eval()
    for p in model.parameters():
        if p.ndim == 1:
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    length = min(48, model.config.max_position_embeddings)
    cache, own = model.new_cache(4, length), model.new_cache(4, length)
    fused = FusedDecoder.of(model, own)
    assert fused is not None
    rows, slots, first = [texts(1, n)[0] for n in (5, 30, 17)], [2, 0, 3], [0, 0, 0]
    for _ in range(3):
        ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
        got, states = fused(*flat(rows, slots, first), ends, hidden=True)
        view = CacheView(cache, torch.tensor(slots), torch.tensor(first))
        hidden = model(Batch.of(rows, cache=view)).hidden
        for i, row in enumerate(rows):
            want = model.lm_head.logits(hidden[i, : len(row)])
            torch.testing.assert_close(got[i], want[-1], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(states[ends[i] - len(row) + 1 : ends[i] + 1], hidden[i, : len(row)], atol=1e-4, rtol=1e-4)
        first = [at + len(row) for at, row in zip(first, rows, strict=True)]
        rows = [[7], [8, 9], [10]]


def test_what_the_kernels_do_not_know_runs_by_operation() -> None:
    """Longrope turns by how long a text has grown; width 8 is no whole vector; a hook wants to be called."""
    assert not isinstance(Engine(build(DecoderConfig.from_hf(CASES["phi3-longrope"]), 1).eval()).runner, FusedRunner)
    assert not isinstance(Engine(small.model(VOCAB, head=8)).runner, FusedRunner)
    hooked = small.model(VOCAB)
    hooked.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    assert not isinstance(Engine(hooked).runner, FusedRunner)


@needs_kernels
@torch.inference_mode()
def test_a_row_alone_has_the_bits_it_has_among_others(model: Any) -> None:
    """Sums in an order that depends on the batch: temperature 0 that is not deterministic."""
    rows = texts(5, 20)
    together = FusedDecoder.of(model, model.new_cache(5, 64))
    alone = FusedDecoder.of(model, model.new_cache(5, 64))
    assert together is not None and alone is not None
    every = torch.arange(sum(map(len, rows)))
    whole, _ = together(*flat(rows, list(range(5)), [0] * 5), every)
    at = 0
    for slot, row in enumerate(rows):
        for part in (row[:7], row[7:8], row[8:10], row[10:]):
            first = at - sum(map(len, rows[:slot]))
            got, _ = alone(*flat([part], [slot], [first]), torch.arange(len(part)))
            assert torch.equal(got, whole[at : at + len(part)])
            at += len(part)


@needs_kernels
def test_batch_invariant_logprobs_are_equal_bit_for_bit(model: Any) -> None:
    """Also where long prompts are read, and where beginnings come from the cache."""
    shared = texts(1, 150)[0]
    prompts = [shared[:n] + t for n, t in zip((150, 0, 90, 150), texts(4, 5, seed=1), strict=True)]
    how = Sampling(12, temperature=0.8, seed=3, logprobs=0)

    def run(order: list[int], **options: Any) -> list[list[float]]:
        done = Engine(model, batch_invariant=True, **options).generate([prompts[i] for i in order], how)
        scores = {i: [s.logprob for s in c.scores] for i, c in zip(order, done, strict=True)}
        return [scores[i] for i in range(len(prompts))]

    want = run([0, 1, 2, 3], slots=1, prefix_cache=False)
    assert run([3, 1, 0, 2], slots=4) == want
    assert run([2, 0, 3, 1], slots=2, prefill_tokens=16) == want
    assert run([0, 1, 2, 3], slots=4, speculate=4) == want


@pytest.mark.parametrize("head", [16, 8])
def test_a_shared_beginning_is_read_once(head: int) -> None:
    """A prefix cache that never hits, or one that gives the next text another's tokens."""
    model = small.model(VOCAB, head=head)
    shared = texts(1, 60)[0]
    prompts = [shared + t for t in texts(6, 3, seed=2)]
    how = Sampling(8, temperature=0)
    plain = Engine(model, slots=2, prefix_cache=False)
    want = [c.ids for c in plain.generate(prompts, how)]
    engine = Engine(model, slots=2)
    done = engine.generate(prompts, how)
    assert [c.ids for c in done] == want and plain.prefix_cache_hits == 0
    assert [c.shared >= 60 for c in done] == [False] + [True] * 5
    assert engine.prefix_cache_hits == sum(c.shared for c in done) >= 300
    again = engine.generate([prompts[0]], how)[0]
    assert again.shared >= 60 and again.ids == want[0]


def test_samples_of_one_prompt_share_its_reading(model: Any) -> None:
    """Every sample reading the prompt anew."""
    engine = Engine(model, slots=8)
    done = engine.generate(texts(1, 50), Sampling(4, seed=1, n=8))
    assert engine.prefix_cache_hits == 7 * 49
    assert len({c.ids for c in done}) > 1


def test_new_weights_forget_the_old_texts() -> None:
    """Keys and values of the old weights under the new ones: neither model's answer."""
    model, other = small.model(VOCAB, seed=1), small.model(VOCAB, seed=2)
    prompt, how = texts(1, 40), Sampling(10, temperature=0)
    engine = Engine(model)
    engine.generate(prompt, how)
    model.load_state_dict(other.state_dict())
    engine.weights_changed()
    done = engine.generate(prompt, how)[0]
    assert done.ids == Engine(other).generate(prompt, how)[0].ids and done.shared == 0


def test_weights_that_moved_are_found() -> None:
    """A kernel that reads the memory of weights that are gone."""
    model, other = small.model(VOCAB, seed=1), small.model(VOCAB, seed=2)
    prompt, how = texts(1, 40), Sampling(10, temperature=0)
    engine = Engine(model, prefix_cache=False)
    engine.generate(prompt, how)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.data = q.data.clone()
    assert engine.generate(prompt, how)[0].ids == Engine(other).generate(prompt, how)[0].ids


@pytest.mark.parametrize("how", [Sampling(40, temperature=0), Sampling(40, temperature=0.5, seed=5), Sampling(9, temperature=0)])
@pytest.mark.parametrize("head", [16, 8])
def test_guessing_changes_nothing(head: int, how: Sampling) -> None:
    """A guess taken without a look at its own logits; one token too many at the end."""
    model = small.model(VOCAB, head=head)
    prompts = [t * 3 for t in texts(4, 5)]
    engine = Engine(model, slots=3, speculate=5)
    assert [c.ids for c in engine.generate(prompts, how)] == [c.ids for c in Engine(model, slots=3).generate(prompts, how)]


def test_guesses_that_come_true_save_steps() -> None:
    """Guesses that are never accepted."""
    model = small.model(VOCAB)
    with (
        torch.no_grad()
    ):  # attention and MLP add nothing: the next token depends on the last alone, and greedy text runs in a circle
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    steps = {}
    for guesses in (0, 4):
        engine = Engine(model, slots=1, speculate=guesses)
        engine.submit([5], Sampling(100, temperature=0))
        steps[guesses] = sum(1 for _ in iter(lambda e=engine: e.step() or e.idle, True))
    assert steps[4] < 0.7 * steps[0]


def test_lookup_finds_what_followed() -> None:
    assert Endings().after([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert Endings().after([9, 2, 3, 7, 1, 2, 3, 8, 4, 2, 3], 3) == [8, 4, 2]  # the latest place
    assert Endings().after([1, 2, 3, 4], 4) == []
    text, growing = [1, 2, 1, 2, 1, 2, 3, 1, 2, 3, 3, 1, 2] * 3, Endings()
    for length in range(1, len(text), 2):
        assert growing.after(text[:length], 3) == Endings().after(text[:length], 3)


def test_places_keep_what_pays() -> None:
    slots = Slots(2)
    long = list(range(100))
    first = slots.place(long)
    slots.give(first.slot, Held(long))
    short = [*long[:20], 7, 7]
    place = slots.place(short)
    assert place.shared == 20 and place.slot != place.source  # the long text stays for others
    slots.give(place.slot, Held(short))
    place = slots.place([*long, 1])
    assert place.shared == 100 and place.slot == place.source == first.slot
    assert common_length([1, 2, 3], [1, 2, 4], 3) == 2


@needs_kernels
def test_int8_is_close_and_says_where_it_cannot_be() -> None:
    model = small.model(VOCAB, context=64)
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    rounded, scale = round_rows(weight)
    assert ((rounded * scale[:, None] - weight).abs() <= scale[:, None] / 2 + 1e-7).all()
    engine = Engine(model, dtype="int8")
    assert isinstance(engine.runner, FusedRunner)
    how = Sampling(1, temperature=0, logprobs=0)
    prompts = texts(8, 20)
    exact = [c.scores[0].logprob for c in Engine(model).generate(prompts, how)]
    close = [c.scores[0].logprob for c in engine.generate(prompts, how)]
    assert 0 < max(abs(a - b) for a, b in zip(exact, close, strict=True)) < 0.2
    with pytest.raises(ConfigError, match="kernels cannot run"):
        Engine(small.model(VOCAB, head=8), dtype="int8")
