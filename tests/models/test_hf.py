"""The adapter around `transformers`: same interface, isolated samples, folders that survive."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.guarantees import tiny
from tests.models.shapes import reference, reference_logits, written
from tutelage import log
from tutelage.errors import MissingExtra
from tutelage.models.export import save
from tutelage.models.heads import LmHead
from tutelage.models.hf.causal import Adapter, LogitsHead, pieces
from tutelage.models.interface import Batch
from tutelage.models.open import load
from tutelage.models.shard import is_shard, layers, shard, whole
from tutelage.objectives.next_token import next_token
from tutelage.train import distributed

TEXTS = [[5, 9, 40, 3, 77, 12, 8, 60, 31, 2, 90, 14, 22, 7], [33, 70, 6, 11], [95, 4, 17, 28, 65]]
OTHERS: dict[str, dict[str, Any]] = {
    "gpt_neox": {"model_type": "gpt_neox", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "intermediate_size": 64, "max_position_embeddings": 64},
    "opt": {"model_type": "opt", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "ffn_dim": 64, "dropout": 0.0, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "bloom": {"model_type": "bloom", "vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "cohere": {"model_type": "cohere", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
               "intermediate_size": 64, "logit_scale": 0.25, "max_position_embeddings": 64},
}  # fmt: skip


@pytest.fixture(params=OTHERS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Adapter]:
    theirs, folder = written(OTHERS[request.param], tmp_path / "m")
    ours = load(folder)
    assert isinstance(ours, Adapter)
    return theirs, ours


def packed() -> Batch:
    """Two rows: the first and second text and padding; the third text and padding."""
    ids, segments = torch.zeros(2, 20, dtype=torch.int64), torch.zeros(2, 20, dtype=torch.int32)
    positions = torch.zeros_like(ids)
    for number, (row, at, text) in enumerate(((0, 0, TEXTS[0]), (0, 14, TEXTS[1]), (1, 0, TEXTS[2])), 1):
        ids[row, at : at + len(text)] = torch.tensor(text)
        segments[row, at : at + len(text)] = number
        positions[row, at : at + len(text)] = torch.arange(len(text))
    weights = torch.zeros(2, 20)
    weights[:, :-1] = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)).float()
    return Batch(ids, segments, positions, ids.roll(-1, 1), weights)


@torch.no_grad()
def test_packed_rows_equal_each_text_alone_in_transformers(pair: tuple[Any, Adapter]) -> None:
    """Samples that see each other, or positions that run on: the adapter has to isolate for models of every kind."""
    theirs, ours = pair
    got = ours.logits(packed())
    for row, at, text in ((0, 0, TEXTS[0]), (0, 14, TEXTS[1]), (1, 0, TEXTS[2])):
        expected = reference_logits(theirs, torch.tensor([text]))[0]
        torch.testing.assert_close(got[row, at : at + len(text)], expected, atol=2e-5, rtol=1e-4)


def test_loss_and_gradients_equal_transformers(pair: tuple[Any, Adapter]) -> None:
    """The head's weight is the model's own parameter: a copy would never learn, or learn alone."""
    theirs, ours = pair
    batch = packed()
    ours.lm_head(ours(batch).hidden.flatten(0, 1), batch.targets.flatten(), batch.weights.flatten()).backward()
    total: Any = 0
    for text in TEXTS:
        logits = theirs(input_ids=torch.tensor([text]), use_cache=False).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:]), reduction="sum")
    total.backward()
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    got = {n: p.grad for n, p in ours.named_parameters()}
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_the_head_is_ours_where_it_is_a_product_and_whole_where_it_is_more(pair: tuple[Any, Adapter]) -> None:
    """Cohere scales its logits after the head: treating that as a plain product trains at another temperature."""
    theirs, ours = pair
    scaled = theirs.config.model_type == "cohere"
    assert isinstance(ours.lm_head, LogitsHead if scaled else LmHead)


@torch.no_grad()
def test_saved_adapter_loads_again(pair: tuple[Any, Adapter], tmp_path: Path) -> None:
    """An export under the adapter's names could be read by nothing."""
    theirs, ours = pair
    next(ours.parameters()).add_(0.1)
    save(ours, tmp_path / "out", stop_ids=[7])
    again = load(tmp_path / "out")
    torch.testing.assert_close(again.logits(Batch.of(TEXTS)), ours.logits(Batch.of(TEXTS)))
    assert not torch.allclose(again.logits(Batch.of(TEXTS[:1])), reference_logits(theirs, torch.tensor(TEXTS[:1])))


def test_modes_and_devices_reach_the_model(pair: tuple[Any, Adapter]) -> None:
    """The wrapped model is not a registered module: `train`, `eval` and `to` have to reach it all the same."""
    _, ours = pair
    ours.train()
    assert ours.hf.training
    ours.eval()
    assert not ours.hf.training
    ours.to(torch.float64)
    assert {p.dtype for p in ours.hf.parameters()} == {torch.float64}
    assert ours.config.vocab_size == 97 and ours.config.hidden_size == 32 and ours.config.num_hidden_layers == 2


def test_checkpointing_reaches_the_model(pair: tuple[Any, Adapter]) -> None:
    """The setting of the loop has to act on any model, or memory runs out where the plan said it fits."""
    _, ours = pair
    batch = packed()

    def first_gradient() -> torch.Tensor:
        ours.zero_grad()
        ours.lm_head(ours(batch).hidden.flatten(0, 1), batch.targets.flatten(), batch.weights.flatten()).backward()
        return next(p.grad for p in ours.parameters() if p.grad is not None).clone()

    plain = first_gradient()
    ours.checkpointing = "layer"
    ours.train()
    assert ours.checkpointing == "layer" and ours.hf.is_gradient_checkpointing
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(first_gradient(), plain, atol=1e-5, rtol=1e-4)


def test_pieces_cover_every_token_once() -> None:
    """A token in two groups is computed twice and one of them lost; one in none is silently 0."""
    segments = packed().segments
    seen = torch.cat([index[real] for index, real in pieces(segments)])
    assert sorted(seen.tolist()) == (segments.flatten() != 0).nonzero().flatten().tolist()
    assert all(real.sum() > real.numel() / 2 for _, real in pieces(segments))


def sharded(folder: str) -> None:
    """On each of two ranks: a packed batch on rank 0 and one text on rank 1, whose groups differ in number; then the folder."""
    distributed.start("cpu")
    batches = [packed(), Batch.of([TEXTS[0] + TEXTS[2]])]
    for name in ("gpt_neox", "cohere"):
        theirs, ours = Adapter(reference(OTHERS[name])), Adapter(reference(OTHERS[name]))
        shard(ours, torch.device("cpu"))
        assert len(layers(ours)) == 2 and all(is_shard(p) for p in ours.hf.parameters())
        next_token({"policy": ours}, batches[log.rank()])["loss"].sum.backward()
        for batch in batches:
            next_token({"policy": theirs}, batch)["loss"].sum.backward()
        for (name_of, p), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(whole(p.grad), expected.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name_of: f"{n}: {m}")
        save(ours, Path(folder) / name)
    distributed.stop()


def test_two_sharded_ranks_have_the_gradients_of_one_and_one_folder(tmp_path: Path) -> None:
    """Ranks that call their layers a different number of times wait for ever; a head outside the tree would keep old weights."""
    pair = [tiny.Process({"call": sharded, "args": [str(tmp_path)], "env": env, "die": {}}) for env in tiny.ranks(2)]
    assert [p.wait() for p in pair] == [0, 0], [p.said for p in pair]
    for name in ("gpt_neox", "cohere"):
        expected = reference(OTHERS[name]).state_dict()
        found = load(tmp_path / name).hf.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


def test_a_loaded_model_is_in_evaluation_mode(pair: tuple[Any, Adapter]) -> None:
    """An engine refuses a model in training; one that says it is, and is not, cannot be served."""
    _, ours = pair
    assert not ours.training and not ours.hf.training


def test_a_head_of_its_own_stays_among_the_parameters(tmp_path: Path) -> None:
    """A whole model's output matrix that no optimizer is given: it is never trained."""
    theirs, folder = written({**OTHERS["cohere"], "tie_word_embeddings": False}, tmp_path / "m")
    ours = load(folder)
    assert isinstance(ours, Adapter) and ours.whole
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}
    assert ours.get_parameter("lm_head.weight") is ours.hf.lm_head.weight


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare ModuleNotFoundError does not say what to install."""
    _, folder = written(OTHERS["opt"], tmp_path / "m")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install .tutelage\[hf\]."):
        load(folder)
