"""New rows in embedding and head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.shapes import SHAPE, reference_logits, written
from tutelage.models import extend as extending
from tutelage.models.export import save
from tutelage.models.interface import Batch
from tutelage.models.open import load

PIECES = [(3, 4), (5, 6, 3), (96, 7)]
BIASED: dict[str, Any] = {
    "model_type": "phi", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CASES: dict[str, Any] = {
    "tied": "qwen3", "untied": "llama", "gpt2": "gpt2", "soft-cap": "gemma2", "biased head, of transformers": BIASED,
    "of transformers": {"model_type": "opt", "vocab_size": 97, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
                        "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
}  # fmt: skip


def some_ids() -> torch.Tensor:
    return torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))


def batch_of(ids: torch.Tensor) -> Batch:
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    return Batch(ids, torch.ones_like(ids, dtype=torch.int32), positions, ids, torch.ones(ids.shape))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_old_tokens_keep_their_logits_and_transformers_agrees(case: str, tmp_path: Path) -> None:
    """Rows that moved or were made again: at the moment of extension a model must say of old tokens what it said. And a folder
    whose config.json, tied weights or biases have the old size."""
    from transformers import AutoModelForCausalLM

    written(CASES[case], tmp_path / "old")
    ids = some_ids()
    before = load(tmp_path / "old").logits(batch_of(ids))
    model = extending.extend(load(tmp_path / "old"), 97, PIECES)
    after = model.logits(batch_of(ids))
    assert after.shape[-1] == model.config.vocab_size == 100
    assert torch.equal(after[..., :97], before)
    for table in extending.tables(model):
        assert torch.equal(table[97:], torch.stack([table[list(p)].mean(0) for p in PIECES]))
    save(model, tmp_path / "new")
    again, theirs = load(tmp_path / "new"), AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    ids = torch.cat([ids, torch.tensor([[97, 98, 99], [99, 97, 98]])], 1)
    assert theirs.config.vocab_size == 100 and torch.equal(again.logits(batch_of(ids)), model.logits(batch_of(ids)))
    torch.testing.assert_close(model.logits(batch_of(ids)), reference_logits(theirs, ids), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_spare_rows_are_used_first(tmp_path: Path) -> None:
    """A table padded to a round size grows although it has room; or new tokens take the place of old ones."""
    written("llama", tmp_path / "old")
    old = load(tmp_path / "old")
    before = [t.clone() for t in extending.tables(old)]
    model = extending.extend(old, 90, [(3, 4), (5, 6)])
    assert model.config.vocab_size == SHAPE["vocab_size"]
    for table, was in zip(extending.tables(model), before, strict=True):
        assert torch.equal(table[:90], was[:90]) and torch.equal(table[92:], was[92:])
        assert torch.equal(table[90], was[[3, 4]].mean(0))


@torch.no_grad()
def test_other_starts(tmp_path: Path) -> None:
    """A start that is accepted and not used; the first piece where the last one is read."""
    written("llama", tmp_path / "old")
    embedding, head = extending.tables(extending.extend(load(tmp_path / "old"), 97, PIECES, "ends"))
    assert torch.equal(embedding[98], embedding[3]) and torch.equal(head[98], head[5])
    written("qwen3", tmp_path / "tied")
    (both,) = extending.tables(extending.extend(load(tmp_path / "tied"), 97, PIECES, "ends"))
    assert torch.equal(both[98], both[[5, 3]].mean(0))
    noisy, _ = extending.tables(extending.extend(load(tmp_path / "old"), 97, PIECES * 50, "random"))
    torch.testing.assert_close(noisy[97:].std(), noisy[:97].std(), rtol=0.2, atol=0)
