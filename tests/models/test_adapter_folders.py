"""Adapters of every kind in `peft`'s folders, both ways: the logits are those that `peft` gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.shapes import SHAPE, reference
from tutelage.config.adapter import Adapter
from tutelage.errors import ArtifactError
from tutelage.models.adapters.attach import attach_adapter, trainable
from tutelage.models.adapters.folder import OURS, load_adapter, save_adapter
from tutelage.models.interface import Batch
from tutelage.models.open import load

BASES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", **SHAPE, "head_dim": 16},
    "gemma": {"model_type": "gemma", **SHAPE},
    "gpt2": {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "phi3": {"model_type": "phi3", **SHAPE, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
             "original_max_position_embeddings": 256, "max_position_embeddings": 256},
    "gpt_neox": {"model_type": "gpt_neox", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "intermediate_size": 48, "max_position_embeddings": 256},
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 6},
    "lora-wide": {"kind": "lora", "rank": 24, "alpha": 6},
    "rslora": {"kind": "lora", "rank": 4, "alpha": 6, "rslora": True},
    "dora": {"kind": "dora", "rank": 4},
    "tables": {"kind": "lora", "rank": 4, "alpha": 6, "embeddings": True},
    "ia3": {"kind": "ia3"},
    "prompt": {"kind": "prompt", "tokens": 5},
    "prefix": {"kind": "prefix", "tokens": 5},
}
TABLES = {"gpt2": ["wte", "lm_head"], "gpt_neox": ["embed_in", "lm_head"]}  # elsewhere embed_tokens and lm_head
TEXTS = [3, 70, 90]


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    reference(BASES[request.param]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    reference(BASES["qwen3"]).save_pretrained(folder)
    return folder


def texts() -> list[list[int]]:
    g = torch.Generator().manual_seed(3)
    return [torch.randint(3, 97, (n,), generator=g).tolist() for n in TEXTS]


@torch.no_grad()
def disturb(parameters: list[nn.Parameter], seed: int = 5) -> None:
    """Moves an adapter away from where it begins, which changes nothing."""
    g = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.add_(torch.randn(p.shape, generator=g) * 0.2)


@torch.no_grad()
def ours(model: Any) -> list[Tensor]:
    """Logits of every text, all of them in one packed batch."""
    batch = Batch.of_groups([(ids, []) for ids in texts()])
    return list(model.logits(batch)[0].split(TEXTS))


@torch.no_grad()
def theirs(model: Any) -> list[Tensor]:
    out = []
    for ids in texts():
        one = torch.tensor([ids])
        logits = model(input_ids=one, attention_mask=torch.ones_like(one)).logits[0]
        out.append(logits[-len(ids) :])
    return out


def same(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_opens_what_we_write(base: Path, kind: str, tmp_path: Path) -> None:
    """A folder that only we can read, or that gives `peft` other logits than were trained."""
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    model = attach_adapter(load(base), Adapter(**KINDS[kind]), seed=0)
    plain = ours(load(base))
    disturb([p for _, p in trainable(model)])
    save_adapter(model, tmp_path / "adapter", base=base)
    expected = ours(model)
    assert max(float((a - b).abs().max()) for a, b in zip(plain, expected, strict=True)) > 0.01, "the adapter changes nothing"
    same(expected, theirs(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()))
    same(expected, theirs(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()))
    same(expected, ours(load_adapter(tmp_path / "adapter", load(base))))
    same(expected, ours(load(tmp_path / "adapter")))  # with its base, merged where it can be


def peft_config(kind: str, model_type: str) -> Any:
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig

    how, task = KINDS[kind], {"task_type": "CAUSAL_LM"}
    if how["kind"] in ("prompt", "prefix"):
        made = PromptTuningConfig if how["kind"] == "prompt" else PrefixTuningConfig
        return made(num_virtual_tokens=how["tokens"], **task)
    if how["kind"] == "ia3":
        named = {"target_modules": ["qkv_proj", "mlp.down_proj"], "feedforward_modules": ["mlp.down_proj"]}
        return IA3Config(**task, **(named if model_type == "phi3" else {}))  # `peft` knows no targets of Phi-3
    saved = TABLES.get(model_type, ["embed_tokens", "lm_head"])
    return LoraConfig(
        r=how["rank"], lora_alpha=how.get("alpha", 8), use_rslora=how.get("rslora", False), use_dora=how["kind"] == "dora",
        target_modules="all-linear", modules_to_save=saved if kind == "tables" else None, **task,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_we_open_what_peft_writes(base: Path, kind: str, tmp_path: Path) -> None:
    """An adapter of `peft` that says something else here; one that can't be trained on, or saved again."""
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made: Any = AutoModelForCausalLM.from_pretrained(base)
    made = get_peft_model(made, peft_config(kind, made.config.model_type))
    disturb([p for p in made.parameters() if p.requires_grad])
    made.save_pretrained(tmp_path / "theirs")
    if kind == "tables" and made.config.tie_word_embeddings:
        with pytest.raises(ArtifactError, match="one table in this model, and two in the adapter"):
            load_adapter(tmp_path / "theirs", load(base))
        return
    model: Any = load_adapter(tmp_path / "theirs", load(base))
    same(ours(model), theirs(made.eval()))
    assert len(trainable(model)) > 0
    save_adapter(model, tmp_path / "again", base=base)
    same(ours(model), theirs(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "again").eval()))


def test_an_adapter_for_another_base_is_refused(qwen3: Path, tmp_path: Path) -> None:
    """Weights of the same shapes take any adapter: the digest of the base tells, or the answers are nonsense."""
    save_adapter(attach_adapter(load(qwen3), Adapter(kind="lora", rank=2), 0), tmp_path / "adapter", base=qwen3)
    other = tmp_path / "other"
    shutil.copytree(qwen3, other)
    model = reference(BASES["qwen3"])
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)
    model.save_pretrained(other)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    with pytest.raises(ArtifactError, match="another base"):
        load(tmp_path / "adapter")
    (tmp_path / "adapter" / OURS).unlink()  # as `peft` would have written it
    load(tmp_path / "adapter")


def test_a_base_that_is_gone_is_named(qwen3: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(qwen3, base)
    save_adapter(attach_adapter(load(base), Adapter(kind="lora", rank=2), 0), tmp_path / "adapter", base=base)
    shutil.rmtree(base)
    with pytest.raises(ArtifactError, match="base of this adapter is not there"):
        load(tmp_path / "adapter")
