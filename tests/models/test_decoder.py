"""The decoder against itself: what must not change its results, on tiny models of every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.shapes import CASES, SHAPE
from tutelage.models import layers
from tutelage.models.config import DecoderConfig
from tutelage.models.decoder import Decoder
from tutelage.models.init import build
from tutelage.models.interface import Batch, CacheView

# longrope changes its frequencies when a sequence outgrows the first training length, also for what is in the cache already.
CACHED = [c for c in CASES if c != "phi3-longrope"]
TEXTS = [[5, 9, 40, 3, 77, 12, 8, 60, 31, 2, 90, 14, 22, 7, 1, 55, 48, 19], [33, 70, 6, 11], [95, 4, 17, 28, 65, 9, 81, 44, 13]]


def make(case: str, seed: int = 3) -> Decoder:
    """A model with weights large enough for differences to show."""
    config = DecoderConfig.from_hf({**CASES[case], "initializer_range": 0.3})
    model = build(config, seed, scheme="plain").eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.2)
    return model


def packed(texts: list[list[int]], length: int) -> Batch:
    """One row of `texts`, then padding."""
    rows: list[Tensor] = [torch.zeros(1, length, dtype=torch.int64) for _ in range(3)]
    at = 0
    for number, text in enumerate(texts, 1):
        for row, values in zip(rows, (text, [number] * len(text), range(len(text))), strict=True):
            row[0, at : at + len(text)] = torch.tensor(list(values))
        at += len(text)
    ids, segments, positions = rows
    return Batch(ids, segments.int(), positions, torch.zeros_like(ids), torch.zeros(1, length))


@pytest.mark.parametrize("case", [c for c in CASES if "longrope" not in c])
@torch.no_grad()
def test_packed_equals_alone(case: str) -> None:
    """A token that sees another sample, or a position that runs on across samples: the packing leak of the field."""
    model = make(case)
    row = model(packed(TEXTS, 40)).hidden[0]
    at = 0
    for text in TEXTS:
        alone = model(Batch.of([text])).hidden[0]
        torch.testing.assert_close(row[at : at + len(text)], alone, atol=1e-5, rtol=1e-5)
        at += len(text)


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    """Padding that is attended to makes a result depend on what else is in the batch."""
    model = make("qwen3")
    together = model(Batch.of(TEXTS, pad=13)).hidden
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(together[row, : len(text)], model(Batch.of([text])).hidden[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CACHED)
@torch.no_grad()
def test_cache_equals_whole(case: str) -> None:
    """Prefill and decode in uneven steps, in scattered slots that hold another sequence's remains, equal one whole pass."""
    model = make(case)
    cache = model.new_cache(slots=5, length=18)
    for held in cache.k + cache.v:
        held.fill_(1e3)
    expected = [model(Batch.of([t])).hidden[0] for t in TEXTS]
    slots, done = torch.tensor([4, 1, 2]), [0, 0, 0]
    for steps in ([9, 2, 1], [1, 1, 1], [5, 0, 4], [3, 1, 3]):
        new = [t[d : d + n] for t, d, n in zip(TEXTS, done, steps, strict=True)]
        got = model(Batch.of(new, cache=CacheView(cache, slots, torch.tensor(done)))).hidden
        for row, n in enumerate(steps):
            torch.testing.assert_close(got[row, :n], expected[row][done[row] : done[row] + n], atol=1e-5, rtol=1e-5)
        done = [d + n for d, n in zip(done, steps, strict=True)]
    assert done == [len(t) for t in TEXTS]


@torch.no_grad()
def test_cache_in_order_is_read_without_a_copy_and_gives_the_same() -> None:
    """Slots 1, 2, 3 take the path of a view, 3, 1, 2 that of a copy: a wrong first slot would mix sequences."""
    model = make("llama")
    results = []
    for slots in ([1, 2, 3], [3, 1, 2]):
        cache = model.new_cache(slots=4, length=20)
        view = CacheView(cache, torch.tensor(slots), torch.zeros(3, dtype=torch.int64))
        model(Batch.of([t[:3] for t in TEXTS], cache=view))
        view = CacheView(cache, torch.tensor(slots), torch.tensor([3, 3, 3]))
        results.append(model(Batch.of([[t[3]] for t in TEXTS], cache=view)).hidden)
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_padding_is_never_written_to_the_cache() -> None:
    """A padded row used to overwrite places past its end, which a row of the next step takes for tokens."""
    model = make("qwen3")
    cache = model.new_cache(slots=3, length=20)
    for held in cache.k + cache.v:
        held.fill_(123.0)
    model(Batch.of(TEXTS, cache=CacheView(cache, torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.int64))))
    for held in cache.k + cache.v:
        for slot, text in enumerate(TEXTS):
            assert (held[slot, len(text) :] == 123.0).all() and (held[slot, : len(text)] != 123.0).any()


@torch.no_grad()
def test_a_slot_that_is_too_short_is_an_error() -> None:
    """Writing past a slot's end would land in the next sequence."""
    model = make("llama")
    view = CacheView(model.new_cache(slots=2, length=4), torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(AssertionError, match="do not fit"):
        model(Batch.of([[1, 2, 3, 4, 5]], cache=view))


def gradients(model: Decoder, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    hidden = model(batch).hidden
    model.lm_head(hidden.flatten(0, 1), batch.targets.flatten(), batch.weights.flatten()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_learns_and_checkpointing_changes_nothing(case: str) -> None:
    """A parameter outside the graph trains to nothing in silence; a checkpoint that recomputes otherwise trains to the wrong."""
    model = make(case).train()
    batch = Batch.of(TEXTS * 3)  # enough tokens for the fused path
    plain = gradients(model, batch)
    assert plain.keys() == dict(model.named_parameters()).keys()
    assert all(g.isfinite().all() and g.any() for g in plain.values())
    model.checkpointing = "layer"
    torch.testing.assert_close(gradients(model, batch), plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", ["qwen2", "gemma", "gpt2", "llama-biased-tied"])
def test_fused_projections_equal_separate_ones(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights laid end to end in another order than their outputs are cut would swap keys and values."""
    model, batch = make(case), Batch.of(TEXTS * 3)
    fused = gradients(model, batch)
    monkeypatch.setattr(layers, "FUSE_FROM", 1 << 30)
    for name, grad in gradients(model, batch).items():
        assert (grad - fused[name]).norm() <= 1e-4 * grad.norm() + 1e-5, name


class Doubled(nn.Linear):
    """Stands for an adapter: its output is not weight times input alone."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.gate_proj"])
@torch.no_grad()
def test_a_replaced_projection_is_called(name: str) -> None:
    """Fusing reads weights: an adapter on a fused projection would be skipped, and train nothing."""
    model, batch = make("llama"), Batch.of(TEXTS * 3)
    before = model(batch).hidden
    parent, _, own = f"model.layers.1.{name}".rpartition(".")
    old = model.get_submodule(f"{parent}.{own}")
    new = Doubled(old.in_features, old.out_features, bias=False)  # type: ignore[arg-type]
    new.weight = old.weight  # type: ignore[assignment]
    setattr(model.get_submodule(parent), own, new)
    assert (model(batch).hidden - before).abs().max() > 1e-2
    setattr(model.get_submodule(parent), own, old)
    called: list[Any] = []
    handle = old.register_forward_hook(lambda *a: called.append(a))
    model(batch)
    handle.remove()
    assert called


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "gemma3", "smollm3", "olmo2"])
def test_parameters_have_the_names_of_transformers(case: str) -> None:
    """Adapters, optimizer groups and exports find parameters by their Hugging Face names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CASES[case]))
    ours = make(case)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


def test_tied_weights_are_one_parameter() -> None:
    """Two copies of a tied matrix drift apart in training, and one of them is lost by the export."""
    tied, untied = make("qwen3"), make("llama")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(tied.named_parameters())


def test_new_weights_depend_on_the_seed_and_the_name_alone() -> None:
    """A model of more layers, or built in another order, would otherwise be another experiment."""
    small = DecoderConfig.from_hf({"model_type": "gemma2", **SHAPE, "num_hidden_layers": 2})
    large = DecoderConfig.from_hf({"model_type": "gemma2", **SHAPE})
    torch.manual_seed(11)
    one, two = build(small, 5, scheme="plain"), build(large, 5, scheme="plain")
    three = dict(build(small, 6, scheme="plain").named_parameters())
    for name, p in one.named_parameters():
        assert torch.equal(p, dict(two.named_parameters())[name]), name
        assert p.ndim == 1 or not torch.equal(p, three[name]), name
    weight = one.model.embed_tokens.weight
    assert abs(float(weight.detach().std()) / small.initializer_range - 1) < 0.1


@pytest.mark.parametrize(("scheme", "factor"), [("plain", 1.0), ("depth", 8**-0.5), ("zero", 0.0)])
def test_residual_projections_follow_the_scheme(scheme: str, factor: float) -> None:
    """Without the scheme the residual stream's variance grows with depth."""
    model = build(DecoderConfig.from_hf(CASES["llama"]), 1, scheme=scheme)
    deviation = model.get_parameter("model.layers.0.mlp.down_proj.weight").detach().std()
    assert abs(float(deviation) / 0.02 - factor) < 0.1
    assert model.get_parameter("model.layers.0.mlp.up_proj.weight").std() > 0.01


@torch.no_grad()
def test_layers_and_embeds() -> None:
    """Explanations read every layer's output and start from embeddings: both have to be those of the normal pass."""
    model, batch = make("gemma"), Batch.of(TEXTS)
    out = model(batch, keep_layers=True)
    assert out.layers is not None and len(out.layers) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(model.model.norm(out.layers[-1]), out.hidden)
    embeds = model.model.embed_tokens(batch.ids)
    given = Batch(batch.ids * 0, batch.segments, batch.positions, batch.targets, batch.weights, embeds=embeds)
    torch.testing.assert_close(model(given).hidden, out.hidden)


@torch.no_grad()
def test_bfloat16_stays_near_float32() -> None:
    """A step that leaves bfloat16, or rounds where float32 is due, shows as a type error or a large difference."""
    model, batch = make("qwen3"), Batch.of(TEXTS)
    exact = model(batch).hidden
    rounded = model.to(torch.bfloat16)(batch).hidden
    assert rounded.dtype == torch.bfloat16
    real = batch.segments != 0
    assert (rounded.float() - exact)[real].norm() / exact[real].norm() < 0.05


def test_batch_of_texts() -> None:
    """Targets shifted by one too many, or a padded place supervised, is the classic of training code."""
    batch = Batch.of([[7, 8, 9], [5]], supervised=[[1, 0, 1], [1]], pad=3)
    assert batch.ids.tolist() == [[7, 8, 9], [5, 3, 3]]
    assert batch.segments.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.targets.tolist() == [[8, 9, 0], [0, 0, 0]]
    assert batch.weights.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
