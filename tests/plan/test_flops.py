"""Parameters and FLOPs."""

from __future__ import annotations

from typing import Any

import pytest

from tutelage.plan.energy import energy
from tutelage.plan.flops import count_flops, explain, generate_flops, mean_seen, mfu, six_nd, train_flops_per_token
from tutelage.plan.parameters import Shape, count, count_config

BENCH: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 768, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def test_bench_model_by_hand() -> None:
    """Guards the number that MFU is made of, written out: 39.3 MFLOP a token for the benchmarks' model."""
    matrices = 6 * (256 * 64 * (2 * 4 + 2 * 2) + 3 * 256 * 768) + 256 * 4096
    attention = 12 * 6 * 4 * 64 * 512 * 0.5
    assert train_flops_per_token(BENCH, 512) == 6 * matrices + attention == 39_321_600
    assert train_flops_per_token(BENCH, 512, "full") == 6 * matrices + 2 * attention
    assert count_config(BENCH).total == 5_771_264
    assert "39.3 MFLOP" in explain(BENCH, 512) and "half" in explain(BENCH, 512)


def test_untied_head_costs_the_same() -> None:
    """Guards against counting the token table as a product, or forgetting a tied head."""
    untied = {**BENCH, "tie_word_embeddings": False}
    assert train_flops_per_token(untied, 512) == train_flops_per_token(BENCH, 512)
    assert count_config(untied).total - count_config(BENCH).total == 4096 * 256


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("mistral", {"head_dim": 16}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
        ("gemma", {"head_dim": 16}),
        ("gemma2", {"head_dim": 16}),
        ("gemma3_text", {"head_dim": 16}),
        ("phi3", {"pad_token_id": 0}),
        ("smollm3", {"pad_token_id": 0}),
        ("olmo2", {}),
        ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 300}),
    ],
)
def test_counts_equal_transformers(model_type: str, more: dict[str, Any]) -> None:
    """Guards the counts of every family against the real models, built without memory."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = {"model_type": model_type, **(more if model_type == "gpt2" else {**SMALL, **more})}
    real = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(real)
    assert count_config(config).total == model.num_parameters()


def test_window_sees_less() -> None:
    """Guards sliding windows: a token at place p sees min(p, window) of those before it, on average as in the formula."""
    assert mean_seen(1000, None) == 500 and mean_seen(1000, 1000) == 500 and mean_seen(1000, None, "full") == 1000
    exact = sum(min(p + 0.5, 100) for p in range(1000)) / 1000
    assert mean_seen(1000, 100) == pytest.approx(exact, rel=1e-3)
    local = {**SMALL, "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 16, "num_hidden_layers": 6}
    assert Shape.of(local).windows == (16,) * 5 + (None,)
    assert count_flops(local, 128).attention < count_flops({**local, "sliding_window": None}, 128).attention


def test_unknown_family_is_counted_and_marked() -> None:
    """Guards against a refusal to plan models that run through transformers, and against passing a guess off as exact."""
    assert not Shape.of({**SMALL, "model_type": "newcomer"}).exact
    assert count(Shape.of({**SMALL, "model_type": "newcomer"})).total > 0
    assert "unknown family" in explain({**SMALL, "model_type": "newcomer"}, 128)


def test_recompute_and_generation() -> None:
    """Guards the extra forward pass of checkpointing, and that a prompt's logits are not counted."""
    flops = count_flops(BENCH, 512)
    assert flops.train(recompute=True) == pytest.approx(flops.train() + flops.layers + flops.attention)
    assert generate_flops(BENCH, 100, 1) < 101 * count_flops(BENCH, 101).forward


# Published runs: name, parameters, tokens, GPU-hours, watts, MWh, tonnes of CO2 (None: not published), MFU on 312 TFLOP/s
# LLaMA's table 15 (arXiv:2302.13971) at PUE 1.1 and 385 g/kWh, rounded as printed there; Llama 2's model card.
PUBLISHED = [
    ("LLaMA-7B", 6.7e9, 1.0e12, 82_432, 400, 36.3, 13.96, 0.434),
    ("LLaMA-13B", 13.0e9, 1.0e12, 135_168, 400, 59.5, 22.90, 0.514),
    ("LLaMA-33B", 32.5e9, 1.4e12, 530_432, 400, 233.4, 89.86, 0.458),
    ("LLaMA-65B", 65.2e9, 1.4e12, 1_022_362, 400, 449.8, 173.19, 0.477),
    ("OPT-175B", 175e9, 180e9, 809_472, 400, 356.2, 137.12, 0.208),
    ("BLOOM-176B", 176e9, 366e9, 1_082_880, 400, 476.5, 183.44, 0.318),
    ("Llama 2 7B", 6.74e9, 2.0e12, 184_320, 400, None, 31.22, 0.391),
    ("Llama 2 13B", 13.0e9, 2.0e12, 368_640, 400, None, 62.44, 0.377),
    ("Llama 2 34B", 33.7e9, 2.0e12, 1_038_336, 350, None, 153.90, 0.347),
    ("Llama 2 70B", 69.0e9, 2.0e12, 1_720_320, 400, None, 291.42, 0.428),
]
TABLE = {
    "defaults": {"country": "paper", "pue": 1.1, "electricity_per_kwh": 0.1, "currency": "USD"},
    "grid_grams_per_kwh": {"paper": 385},
    "devices": {"A100": 400},
}


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[0])
def test_published_runs(row: tuple[str, float, float, int, int, float | None, float, float]) -> None:
    """Guards energy, emissions and 6ND against ten published runs: within 0.5%; MFU as computed from the same rows within 1%."""
    _, parameters, tokens, hours, watts, megawatt_hours, tonnes, share = row
    found = energy(hours * 3600, "A100-80", watts=watts, table=TABLE)
    assert found.grams_co2 / 1e6 == pytest.approx(tonnes, rel=0.005)
    if megawatt_hours is not None:
        assert found.kwh / 1e3 == pytest.approx(megawatt_hours, rel=0.005)
    rate = tokens / (hours * 3600)
    assert mfu(rate, six_nd(parameters, 1), 312e12) == pytest.approx(share, rel=0.01)
