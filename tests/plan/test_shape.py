"""The size dial."""

from __future__ import annotations

import pytest

from tutelage.errors import ConfigError
from tutelage.plan.parameters import count_config
from tutelage.plan.shape import derive, optimal_tokens, parse_size

SIZES = {"3m": 3e6, "5.8m": 5.8e6, "10m": 1e7, "30m": 3e7, "125m": 1.25e8, "350m": 3.5e8, "1b": 1e9, "7b": 7e9}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("vocabulary", [2048, 32768, 131072])
def test_size_is_met(size: str, vocabulary: int) -> None:
    """Guards against a dial that gives another size than asked: within 5% with the token table (10% where the table leaves few
    shapes), or an error that says why."""
    if vocabulary == 131072 and SIZES[size] < 9e6:
        with pytest.raises(ConfigError, match="vocabulary"):
            derive(size, vocabulary)
        return
    shape = derive(size, vocabulary).architecture
    assert abs(count_config(shape).total / SIZES[size] - 1) <= (0.1 if vocabulary == 131072 and SIZES[size] < 2e7 else 0.05)
    assert shape["hidden_size"] % 64 == 0 and shape["intermediate_size"] % 64 == 0
    assert shape["num_attention_heads"] % shape["num_key_value_heads"] == 0
    assert shape["vocab_size"] == vocabulary


def test_known_shape() -> None:
    """Guards the shape that the benchmarks and the peers use: the dial must land on it."""
    shape = derive("5.8m", 4096).architecture
    found = [shape[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")]
    assert [*found, shape["intermediate_size"]] == [256, 6, 4, 2, 64, 768]


def test_every_value_is_explained_and_can_be_overridden() -> None:
    """Guards against a derived number without a reason, and against an override that is lost or not marked."""
    plain = derive("3m", 2048)
    for name in plain.values:
        assert name == "architecture" or plain.because[name]
    given = {"lr": 0.123, "matrix_lr": 0.2, "embedding_lr": 0.3, "batch_tokens": 1024, "sequence_length": 256, "warmup_steps": 3}
    changed = derive("3m", 2048, architecture={"num_hidden_layers": 4}, tokens=100_000, weight_decay=0.0, **given)
    assert {k: changed.values[k] for k in given} == given
    assert changed.values["tokens"] == 100_000 and changed.values["steps"] == 98
    assert changed.architecture["num_hidden_layers"] == 4
    assert changed.architecture["max_position_embeddings"] == 256
    marked = {name for name, _, _ in changed.rows() if name.endswith("*")}
    assert {"lr*", "num_hidden_layers*", "tokens*"} <= marked and "hidden_size*" not in marked


def test_budgets() -> None:
    """Guards the three ways to give a budget, the cap on repeated text, and steps that give tokens."""
    assert derive("3m", 2048, epochs=2, corpus_tokens=700_000).values["tokens"] == 1_400_000
    assert derive("3m", 2048, corpus_tokens=700_000).values["tokens"] == 4 * 700_000
    assert derive("3m", 2048, corpus_tokens=10**12).values["tokens"] == pytest.approx(optimal_tokens(3.05e6), rel=0.01)
    by_time = derive("3m", 2048, minutes=4, flops_per_second=100e9)
    assert 5e5 < by_time.values["tokens"] < 2e6
    by_steps = derive("3m", 2048, steps=123)
    assert by_steps.values["tokens"] == 123 * by_steps.values["batch_tokens"]
    with pytest.raises(ConfigError, match="twice"):
        derive("3m", 2048, minutes=4, tokens=5, flops_per_second=1e9)
    with pytest.raises(ConfigError, match="rate"):
        derive("3m", 2048, minutes=4)


def test_scaling_law_matches_its_published_check() -> None:
    """Guards the constants: at Chinchilla's 5.76e23 FLOPs the refit gives 18.4 tokens a parameter, 72.3B and 1.33T."""
    tokens = optimal_tokens(72.3e9)
    assert tokens / 72.3e9 == pytest.approx(18.4, rel=0.01)
    assert 6 * 72.3e9 * tokens == pytest.approx(5.76e23, rel=0.01)


def test_checkpoint_keeps_its_shape() -> None:
    """Guards continued training: a complete config.json is taken as it is, even of a family with other key names."""
    gpt2 = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
    found = derive("124439808", 50257, architecture=gpt2, sequence_length=1024)
    assert found.architecture == gpt2
    assert found.values["matrix_lr"] == pytest.approx(0.1 / 768**0.5, rel=1e-3)


@pytest.mark.parametrize("size", ["", "3", "m", "3x", "-3m", "0m", "3 m b", "nan", "1e6"])
def test_wrong_size(size: str) -> None:
    """Guards against a size that is misread."""
    with pytest.raises(ConfigError, match="size"):
        parse_size(size)


def test_a_size_without_a_shape_of_its_own_is_rounded() -> None:
    """`--size 300k` with 512 tokens stopped: the dial takes the nearest shape and says how far off it is."""
    found = derive("300k", 512, tokens=1e6)
    said = next(reason for name, _, reason in found.rows() if name == "parameters")
    assert found.architecture["vocab_size"] == 512 and "the nearest shape" in said
    with pytest.raises(ConfigError, match="no shape of 300k"):
        derive("300k", 50257, tokens=1e6)


def test_unknown_name() -> None:
    """Guards against an override that is silently ignored."""
    with pytest.raises(ConfigError, match="did you mean `batch_tokens`"):
        derive("3m", 2048, batch_token=5)
