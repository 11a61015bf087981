"""Adapters on the model: what is trained and how fast it is reached, off and on again, merged, lent to the engine, in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.shapes import SHAPE, written
from tutelage.config.adapter import Adapter
from tutelage.engine import Engine, Sampling
from tutelage.engine.runner import FusedRunner
from tutelage.errors import ArtifactError, ConfigError
from tutelage.models import kernels
from tutelage.models.adapters.attach import (
    ParameterCount,
    adapter_disabled,
    attach_adapter,
    inference_view,
    reference_weights,
    snapshot,
    sync_merged_weights,
    trainable,
)
from tutelage.models.adapters.linear import Adapted, LowRankChange, adapted
from tutelage.models.adapters.merge import merge
from tutelage.models.adapters.nf4 import BLOCK, VALUES, dequantize, quantize
from tutelage.models.config import DecoderConfig
from tutelage.models.init import build
from tutelage.models.interface import Batch
from tutelage.models.open import load
from tutelage.models.scorer import build_scorer

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4}, "whole": {"kind": "lora", "rank": 64},
    "rslora": {"kind": "lora", "rank": 16, "rslora": True}, "tables": {"kind": "lora", "rank": 4, "embeddings": True},
    "dora": {"kind": "dora", "rank": 4}, "ia3": {"kind": "ia3"}, "prompt": {"kind": "prompt", "tokens": 5},
    "prefix": {"kind": "prefix", "tokens": 5}, "qlora": {"kind": "lora", "rank": 4, "quantize": "nf4"},
    "qdora": {"kind": "dora", "rank": 4, "quantize": "nf4"},
}  # fmt: skip
MERGED = ("lora", "whole", "tables", "rslora", "dora", "ia3", "qlora", "qdora")
TEXTS = [40, 3, 17, 60]


def base(**change: Any) -> Any:
    raw = {
        "model_type": "qwen3",
        **SHAPE,
        "head_dim": 16,
        "rope_theta": 1e4,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    return build(DecoderConfig.from_hf({**raw, **change}), 3)


@torch.no_grad()
def disturbed(model: Any, seed: int = 5) -> Any:
    """The model with an adapter that says something."""
    g = torch.Generator().manual_seed(seed)
    for _, p in trainable(model):
        p.add_(torch.randn(p.shape, generator=g) * 0.2)
    return model


def dressed(kind: str, **change: Any) -> Any:
    return disturbed(attach_adapter(base(**change), Adapter(**KINDS[kind]), seed=0))


def texts() -> list[list[int]]:
    g = torch.Generator().manual_seed(3)
    return [torch.randint(3, 97, (n,), generator=g).tolist() for n in TEXTS]


def loss_of(model: Any, batch: Batch) -> Tensor:
    """Log-probability of every next token, summed."""
    hidden = model(batch).hidden
    total = model.lm_head(hidden.flatten(0, 1), batch.targets.flatten(), batch.weights.flatten())
    assert isinstance(total, Tensor)
    return total


def gradients(model: Any, *batches: Batch) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in trainable(model) if p.grad is not None}


def packed() -> Batch:
    """All texts in two rows, of several segments each and with padding."""
    ids, segments = torch.zeros(2, 64, dtype=torch.int64), torch.zeros(2, 64, dtype=torch.int32)
    positions, targets, weights = torch.zeros_like(ids), torch.zeros_like(ids), torch.zeros(2, 64)
    at = [0, 0]
    for row, number, text in ((0, 1, texts()[0]), (0, 2, texts()[1]), (0, 3, texts()[2]), (1, 1, texts()[3])):
        first, last = at[row], at[row] + len(text)
        ids[row, first:last] = torch.tensor(text)
        segments[row, first:last] = number
        positions[row, first:last] = torch.arange(len(text))
        targets[row, first : last - 1] = torch.tensor(text[1:])
        weights[row, first : last - 1] = 1
        at[row] = last
    return Batch(ids, segments, positions, targets, weights)


def same(left: tuple[float, dict[str, Tensor]], right: tuple[float, dict[str, Tensor]], share: float = 1e-4) -> None:
    assert left[0] == pytest.approx(right[0], rel=1e-5)
    assert left[1].keys() == right[1].keys() and left[1]
    for name, grad in left[1].items():
        assert float((grad - right[1][name]).abs().max()) <= share * (float(grad.abs().max()) + 1e-3), name


@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_padded_and_accumulated(kind: str, path: str) -> None:
    """Losses or gradients that depend on what else is in the batch: a text that sees another's virtual tokens, a change that is
    added for rows of padding."""
    model = dressed(kind)
    whole = gradients(model, packed())
    assert len(whole[1]) == len(trainable(model)), "something is not trained"
    same(whole, gradients(model, Batch.of(texts())))
    same(whole, gradients(model, *(Batch.of([text]) for text in texts())))
    model.checkpointing = "layer"
    same(whole, gradients(model, packed()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_is_its_texts(kind: str, path: str) -> None:
    """Prompts that are read once for several answers give other hidden states than the texts alone."""
    model = dressed(kind)
    head, *tails = texts()
    tree = model(Batch.of_groups([(head, tails)])).hidden[0]
    at = len(head)
    for tail in tails:
        alone = model(Batch.of([head + tail])).hidden[0]
        torch.testing.assert_close(tree[at : at + len(tail)], alone[len(head) :], atol=2e-4, rtol=1e-3)
        at += len(tail)


def written_out(model: Any) -> Any:
    """The same model and adapter by the formulas of the papers, by autograd alone: every adapted layer a plain function."""

    def formula(layer: Adapted) -> Any:
        def forward(x: Tensor) -> Tensor:
            change, weight = layer.change, layer.base_weight()
            if isinstance(change, LowRankChange):
                changed = weight + change.scale * change.b @ change.a
                if change.length is not None:
                    changed = changed * (change.length / changed.detach().norm(dim=1))[:, None]
                return F.linear(x, changed, layer.bias)
            assert change is not None
            return F.linear(x * change.factor, weight) if change.of_input else F.linear(x, weight) * change.factor

        return forward

    for _, layer in adapted(model):
        if layer.change is not None:
            layer.forward = formula(layer)  # type: ignore[method-assign]
            layer.takes = lambda x: False  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("kind", MERGED)
def test_gradients_are_those_of_the_formula(kind: str, path: str) -> None:
    """The narrow products, the changed weight made twice, the fused norms and gates: all by hand, all able to be wrong."""
    same(gradients(dressed(kind), packed()), gradients(written_out(dressed(kind)), packed()))


def test_few_tokens_and_many_agree() -> None:
    """Two ways through a layer: the change beside the base, and in its weight."""
    for kind in MERGED:
        model = dressed(kind)
        long, short = texts()[3], texts()[3][:20]
        with torch.no_grad():
            many, few = (model.logits(Batch.of([t])) for t in ([*long, *long[:20]], short))
        torch.testing.assert_close(many[:, :20], few, atol=2e-4, rtol=1e-3)


def test_dropout_leaves_out_inputs_of_the_change_alone() -> None:
    """Dropout that is ignored, that is left on in evaluation, or that touches the base."""
    model = attach_adapter(base(), Adapter(kind="lora", rank=4, dropout=0.5), 0)
    plain = base().logits(Batch.of(texts()))
    model.train()
    torch.testing.assert_close(model.logits(Batch.of(texts())), plain)  # B is zero: there is only the base
    disturbed(model)
    first, second = (model.logits(Batch.of(texts())) for _ in range(2))
    assert not torch.allclose(first, second)
    model.eval()
    first, second = (model.logits(Batch.of(texts())) for _ in range(2))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_bare_is_the_base(kind: str) -> None:
    """A reference that has what was trained in it, or a policy that stays without it."""
    model, batch = dressed(kind), Batch.of(texts())
    plain = attach_adapter(base(), Adapter(kind="lora", rank=1, quantize="nf4"), 0) if kind.startswith("q") else base()
    with torch.no_grad():
        with_adapter = model.logits(batch)
        with adapter_disabled(model), adapter_disabled(model):
            assert torch.equal(model.logits(batch), plain.logits(batch)) or kind.startswith("q")
            torch.testing.assert_close(model.logits(batch), plain.logits(batch))
        assert torch.equal(model.logits(batch), with_adapter)


def test_beginning_is_what_a_continued_adapter_began_with() -> None:
    """A reference that forgets the adapter that training went on from: it is part of the model that was there."""
    model = dressed("lora")
    model.attached_adapter.start = snapshot(model)
    batch = Batch.of(texts())
    with torch.no_grad():
        start = model.logits(batch)
        disturbed(model, seed=9)
        now = model.logits(batch)
        with reference_weights(model):
            assert torch.equal(model.logits(batch), start)
        assert torch.equal(model.logits(batch), now) and not torch.equal(now, start)


@pytest.mark.parametrize("kind", MERGED)
def test_merged_is_adapted(kind: str) -> None:
    """Promise 14: weights that say something else than what was trained."""
    model, batch = dressed(kind), Batch.of(texts())
    with torch.no_grad():
        before = model.logits(batch)
        merged = merge(model)
        assert not adapted(merged)
        torch.testing.assert_close(merged.logits(batch), before, atol=2e-4, rtol=1e-3)


def test_a_scorer_merges_too() -> None:
    """A reward model that was trained with an adapter is written whole."""
    scorer = build_scorer(dressed("lora", tie_word_embeddings=False), 2)
    batch = Batch.of(texts())
    with torch.no_grad():
        before = scorer(batch)
        torch.testing.assert_close(merge(scorer)(batch), before, atol=1e-5, rtol=1e-4)
    assert not adapted(scorer) and not adapted(scorer.backbone)


def test_virtual_tokens_are_not_merged() -> None:
    with pytest.raises(ArtifactError, match="can't be merged"):
        merge(dressed("prompt"))


def test_a_merge_that_goes_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that compares a model with itself."""
    model = dressed("lora")
    monkeypatch.setattr(LowRankChange, "weight", lambda self, base: base)
    with pytest.raises(ArtifactError, match="differ from those of the adapted model"):
        merge(model)


def scored(engine: Engine, lora: Any) -> list[np.ndarray]:
    return [np.array(s) for s in engine.score([(t, 1) for t in texts()], lora)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_says_what_is_trained(kind: str) -> None:
    """Rollouts of the base, or of the adapter as it was some steps ago: tensors are shared, copies are brought up to date."""
    model = dressed(kind)
    plain, lora = inference_view(model)
    engine = Engine(plain, slots=4, max_length=96)
    assert isinstance(engine.runner, FusedRunner) == (kind in MERGED[:6]) or not kernels.available()
    for seed in (11, 12):
        disturbed(model, seed)
        sync_merged_weights(model, plain)
        engine.weights_changed()
        done = engine.generate(texts()[:2], Sampling(6, temperature=0, logprobs=0), lora)
        for prompt, made in zip(texts()[:2], done, strict=True):
            with torch.no_grad():
                logprobs = model.logits(Batch.of([prompt + list(made.ids)]))[0].log_softmax(-1)
            expected = [float(logprobs[len(prompt) - 1 + i, t]) for i, t in enumerate(made.ids)]
            np.testing.assert_allclose([s.logprob for s in made.scores], expected, atol=1e-4)
            assert list(made.ids) == logprobs[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_only_the_adapter_is_trained() -> None:
    """Gradients, and their memory, for weights that stay; a share that is reported wrongly."""
    model = attach_adapter(base(), Adapter(kind="lora", rank=4, targets=["q_proj", "down_proj"]), 0)
    loss_of(model, packed()).backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    assert names == {n for n, _ in trainable(model)} and all(".q_proj.change." in n or ".down_proj.change." in n for n in names)
    layer = 4 * (32 + 64) + 4 * (48 + 32)  # q_proj 32 -> 64, down_proj 48 -> 32
    assert ParameterCount.of(model).trained == 4 * layer
    assert ParameterCount.of(model).whole == sum(p.numel() for p in base().parameters()) + 4 * layer


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kind": "lora", "targets": ["qkv"]}, "no linear layer of this name"),
        ({"kind": "ia3", "targets": ["nope"]}, "no linear layer"),
    ],
)
def test_targets_that_are_not_there(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        attach_adapter(base(), Adapter(**settings), 0)


# Four bits


def nearest(weight: np.ndarray) -> np.ndarray:
    """NF4 by its definition: each block over its largest value, each value the nearest of the sixteen."""
    flat = weight.reshape(-1).astype(np.float64)
    out = np.empty_like(flat)
    for at in range(0, len(flat), BLOCK):
        block = flat[at : at + BLOCK]
        largest = np.abs(block).max()
        scaled = block / largest if largest else block
        out[at : at + BLOCK] = np.array(VALUES)[np.abs(scaled[:, None] - np.array(VALUES)).argmin(1)] * largest
    return out.reshape(weight.shape)


@pytest.mark.parametrize("shape", [(8, 64), (5, 7), (3, 43), (1, 1)])
def test_nf4_is_the_nearest_value_of_each_block(shape: tuple[int, int]) -> None:
    """Halves of bytes in the wrong order, blocks that end in the wrong place, a last block that is not full."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    codes, largest = quantize(weight)
    assert codes.dtype == torch.uint8 and codes.numel() == -(-weight.numel() // 2)
    got = dequantize(codes, largest, weight.shape, torch.float32)
    np.testing.assert_allclose(got.numpy(), nearest(weight.numpy()), rtol=1e-6, atol=1e-7)


def test_a_block_of_zeros_stays_one() -> None:
    weight = torch.zeros(2, 64)
    assert torch.equal(dequantize(*quantize(weight), weight.shape, torch.float32), weight)


@pytest.mark.peers
@pytest.mark.parametrize("shape", [(256, 256), (100, 64), (3, 43)])
def test_nf4_is_that_of_bitsandbytes(shape: tuple[int, int]) -> None:
    """Codes and scales bit for bit, so that a base is the same here and there."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes (make test-peers)")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    packed_, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    codes, largest = quantize(weight)
    assert torch.equal(codes, packed_.flatten()) and torch.equal(largest, state.absmax)
    assert torch.equal(dequantize(codes, largest, weight.shape, torch.float32), functional.dequantize_4bit(packed_, state))


def test_a_base_in_four_bits_is_smaller_and_learns() -> None:
    """Weights that are quantized but also kept, in memory or for the backward pass."""
    model = attach_adapter(base(hidden_size=64, intermediate_size=192), Adapter(kind="lora", rank=4, quantize="nf4"), 0)
    plain = base(hidden_size=64, intermediate_size=192)
    matrices = sum(m.weight.numel() for m in plain.modules() if isinstance(m, nn.Linear))
    rest = sum(p.nbytes for p in plain.parameters()) - 4 * matrices
    assert ParameterCount.of(model).base_bytes == pytest.approx(rest + matrices * (0.5 + 4 / BLOCK))
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = loss_of(model, Batch.of([texts()[3]] * 2))
    assert 64 * 192 not in kept, "a whole weight waits for the backward pass"
    loss.backward()
    optimizer = torch.optim.AdamW([p for _, p in trainable(model)], lr=1e-2)
    before = float(loss.detach())
    for _ in range(10):
        optimizer.step()
        _, _ = gradients(model, Batch.of([texts()[3]] * 2))
    assert float(loss_of(model, Batch.of([texts()[3]] * 2)).detach()) < before * 0.9


def test_a_transformers_model_wears_them_too(tmp_path: Path) -> None:
    """Models that are not of our families: frozen, trained, bare again; their classes stay theirs."""
    raw = {"model_type": "gpt_neox", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
           "intermediate_size": 48, "max_position_embeddings": 256}  # fmt: skip
    written(raw, tmp_path)
    for kind in KINDS:
        model: Any = load(tmp_path)
        batch = packed()
        with torch.no_grad():
            plain = model.logits(batch)
        disturbed(attach_adapter(model, Adapter(**KINDS[kind]), 0))
        same(gradients(model, batch), gradients(model, *(Batch.of([t]) for t in texts())), share=1e-3)
        with torch.no_grad(), adapter_disabled(model):
            real = batch.segments != 0
            got = model.logits(batch)
            assert kind.startswith("q") or torch.allclose(got[real], plain[real], atol=1e-5)
