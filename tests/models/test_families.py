"""Every family against `transformers`: equal logits in both directions, and configs that survive the way there and back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models.shapes import CASES, SHAPE, reference_logits, written
from tutelage.errors import ArtifactError
from tutelage.models import families, kernels
from tutelage.models.config import DecoderConfig, check_vocabulary, unsupported
from tutelage.models.decoder import Decoder
from tutelage.models.export import save
from tutelage.models.interface import Batch
from tutelage.models.open import load

IDS = [[5, 9, 40, 3, 77, 12, 8, 60, 31, 2, 90, 14, 22, 7, 1, 55, 48, 19, 33, 70, 6, 11, 95, 4]] * 4
IDS[1] = IDS[1][::-1]  # 96 tokens: projections run fused; single rows and decoding (test_decoder) run apart


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_both_ways(case: str, tmp_path: Path) -> None:
    """Guards every trait of every family: a norm, bias, scale, window, soft-cap or rotary parameter read or written wrongly."""
    from transformers import AutoModelForCausalLM

    theirs, folder = written(case, tmp_path / "theirs")
    expected = reference_logits(theirs, torch.tensor(IDS))
    ours = load(folder, adapter=False)
    assert isinstance(ours, Decoder)
    with torch.no_grad():
        got = ours.logits(Batch.of(IDS))
        with kernels.disabled():
            plain = ours.logits(Batch.of(IDS))
    torch.testing.assert_close(plain, expected, atol=2e-5, rtol=1e-5)
    assert expected.std() > 0.3, "the tiny model says nothing"
    print(f"{case}: max difference {(got - expected).abs().max():.2e}")
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)

    save(ours, tmp_path / "ours")
    again, problems = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(problems.values()), problems
    torch.testing.assert_close(reference_logits(again, torch.tensor(IDS)), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_config_survives_the_round_trip(case: str) -> None:
    """A field lost by `to_hf` would turn a fine-tuned model into another one: same weights, other window or theta."""
    config = DecoderConfig.from_hf(CASES[case])
    assert DecoderConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_old_rotary_keys_read_as_the_new_ones() -> None:
    """Checkpoints written before transformers 5 have rope_theta and rope_scaling; ignoring them gives theta 10000 silently."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = {"model_type": "llama", **SHAPE, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    new = {"model_type": "llama", **SHAPE, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    assert DecoderConfig.from_hf(old) == DecoderConfig.from_hf(new)
    gemma_old = {"model_type": "gemma3_text", **SHAPE, "rope_theta": 2e5, "rope_local_base_freq": 3e3}
    ropes = DecoderConfig.from_hf(gemma_old).ropes
    assert (ropes["full_attention"].theta, ropes["sliding_attention"].theta) == (2e5, 3e3)


@pytest.mark.parametrize("case", ["llama-llama3", "gemma3-linear", "phi3-longrope", "mistral"])
def test_written_config_has_the_keys_that_older_transformers_read(case: str) -> None:
    """transformers 4 ignores rope_parameters: without the old keys it would run the model at the default theta."""
    raw = DecoderConfig.from_hf(CASES[case]).to_hf()
    stripped = {k: v for k, v in raw.items() if k != "rope_parameters"}
    assert DecoderConfig.from_hf(stripped) == DecoderConfig.from_hf(CASES[case])


@pytest.mark.parametrize("name", families.names())
def test_defaults_are_those_of_transformers(name: str) -> None:
    """A config.json leaves out what equals the class's default: another default here would be another model."""
    from transformers import AutoConfig

    keys = families.family(name).keys
    shape = {k: SHAPE[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    bare = {str(keys.get(k, k)): v for k, v in shape.items()}
    bare |= {} if name == "gpt2" else {"intermediate_size": 48, "num_key_value_heads": 4}
    assert DecoderConfig.from_hf({"model_type": name, **bare}) == DecoderConfig.from_hf(
        AutoConfig.for_model(name, **bare).to_dict()
    )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
    ],
)
def test_a_wrong_shape_names_its_key(change: dict, field: str) -> None:
    """A missing or odd number used to surface as a shape mismatch deep in a matrix product."""
    raw = {"model_type": "qwen3", **SHAPE, "use_sliding_window": True, **change}
    with pytest.raises(ArtifactError) as caught:
        DecoderConfig.from_hf(raw, Path("some/config.json"))
    assert field in str(caught.value) and "config.json" in str(caught.value)


def test_what_the_decoder_can_not_run_is_told_apart() -> None:
    """Running a model with an unknown trait as if it had none gives fluent nonsense."""
    base = {"model_type": "llama", **SHAPE}
    assert unsupported(base) is None
    for change in (
        {"model_type": "gpt_neox"},
        {"hidden_act": "swishy"},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"quantization_config": {"bits": 4}},
        {"use_bidirectional_attention": True},
    ):
        assert unsupported({**base, **change}), change


def test_a_tokenizer_larger_than_the_embeddings_is_refused() -> None:
    """An id past the embedding table was an index error on the CPU and a dead GPU elsewhere."""
    config = DecoderConfig.from_hf({"model_type": "llama", **SHAPE})
    check_vocabulary(config, 97)
    with pytest.raises(ArtifactError, match="more tokens than the model"):
        check_vocabulary(config, 98)


def test_configs_import_without_torch() -> None:
    """The plan and `--help` read configs; importing torch there costs two seconds."""
    code = "import sys, tutelage.models.config as c; c.families.family('llama'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
