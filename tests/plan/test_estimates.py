"""Memory, time, energy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tutelage.errors import ConfigError
from tutelage.plan.energy import Meter, energy, prices, rent
from tutelage.plan.memory import cache, compare, estimate, frozen, largest_micro_rows
from tutelage.plan.shape import derive
from tutelage.plan.time import MFU, duration, explain, sustained_flops, train_seconds


def test_memory_terms() -> None:
    """Guards the terms that a user can act on: rows, checkpointing, optimizer, and logits that are never held whole."""
    shape = derive("5.8m", 4096).architecture
    one, two = estimate(shape, 8, 512), estimate(shape, 16, 512)
    assert two.terms["activations"] == 2 * one.terms["activations"]
    assert two.terms["head"] == one.terms["head"], "the head's chunk does not grow with the batch"
    assert one.terms["weights"] == one.terms["gradients"] == 4 * 5_771_264
    assert estimate(shape, 8, 512, "adamw").terms["optimizer"] == 8 * 5_771_264
    assert estimate(shape, 16, 512, checkpointing="layer").total < 0.7 * two.total
    once = estimate(shape, 16, 512, accumulate=False)
    assert once.terms["gradients"] == 0 and two.terms["gradients"] > 0, "gradients grow while activations are freed"
    large = derive("350m", 4096).architecture
    assert estimate(large, 1, 8, "muon").terms["update"] > 0 == two.terms["update"], "Muon's temporaries matter for tiny batches"
    shared = estimate(shape, 16, 512, ranks=4)
    for term in ("weights", "gradients", "optimizer"):
        assert shared.terms[term] == pytest.approx(two.terms[term] / 4, abs=1)
    assert shared.terms["activations"] == two.terms["activations"] and "whole" in shared.terms and "whole" not in two.terms
    assert estimate(shape, 16, 512, kernels=False).total > two.total
    assert two.low < two.total < two.high and "activations" in two.explain()


def test_other_models_are_terms_of_their_own() -> None:
    """Guards against a plan of PPO or distillation that has one model where there are five."""
    shape = derive("5.8m", 4096).architecture
    one = estimate(shape, 8, 512)
    both = one.with_model("value", one).with_terms({"reference": frozen(shape)})
    assert both.terms["reference"] == 4 * 5_771_264
    again = sum(one.terms[name] for name in ("weights", "gradients", "optimizer", "activations", "ends", "fused weights"))
    assert both.terms["value"] == again and both.total == one.total + again + 4 * 5_771_264
    assert "value" in both.explain() and "reference" in both.explain()
    assert frozen(shape, 4096) > frozen(shape) > frozen(shape, ranks=2) == 2 * 5_771_264
    kept = 4 * 10 * 100 * shape["num_hidden_layers"] * 2 * shape["num_key_value_heads"] * shape["head_dim"]
    assert cache(shape, 10, 100) == kept and cache(shape, 10**6, 10**6) == 2 << 30


def test_rows_that_fit() -> None:
    """Guards the choice of micro_rows: the most whose upper estimate fits, and 0 when nothing does."""
    shape = derive("5.8m", 4096).architecture
    rows = largest_micro_rows(shape, 512, 10**9, optimizer="adamw")
    assert estimate(shape, rows, 512, "adamw").high <= 10**9 < estimate(shape, rows + 1, 512, "adamw").high
    assert largest_micro_rows(shape, 512, 10**6) == 0


MEASURE = """
import torch, tutelage.train.loop
from tutelage.models import kernels
from tutelage.models.config import DecoderConfig
from tutelage.models.init import build
from tutelage.models.interface import Batch
from tutelage.objectives import objective
from tutelage.plan.memory import peak_rss
from tutelage.plan.shape import derive
from pathlib import Path
torch.set_num_threads(1)
kernels.use(False)
shape = derive("3m", 2048).architecture
(torch.randn(512, 512) @ torch.randn(512, 512)).sum()
base = peak_rss()
model = build(DecoderConfig.from_hf(shape), seed=0)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
for _ in range(2):
    batch = Batch.of(torch.randint(2048, (4, 256)).tolist())
    (objective("next_token")({"policy": model}, batch)["loss"].sum / 1024).backward()
    optimizer.step()
print(base, peak_rss())
"""


def test_memory_against_a_real_step() -> None:
    """Guards against an estimate that is off by half: two steps of a 3M model on plain torch, in a process of their own."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    base, peak = (int(x) for x in done.stdout.split())
    found = compare(estimate(derive("3m", 2048).architecture, 4, 256, "adamw", kernels=False, accumulate=False), base, peak)
    print(found)
    assert 0.5 < found.ratio < 1.5, f"measured {found.measured / 1e6:.0f} MB: {found.predicted.explain()}"


def test_time_is_a_range() -> None:
    """Guards against a point estimate: 1e15 FLOPs at 250 GFLOP/s and 40% to 65% of it."""
    found = train_seconds(1e15, 250e9)
    assert found.low < found.likely < found.high
    assert found.high == pytest.approx(10_000) and found.low == pytest.approx(4000 / 0.65)
    assert train_seconds(1e15, 250e9, "cuda:0").likely == pytest.approx(10_000)
    assert sustained_flops(100.0) == 100 * MFU["cpu"].likely
    assert "measured" in explain(1e15, 250e9) and "2.8 h" in explain(1e15, 250e9)
    with pytest.raises(ValueError):
        train_seconds(1e15, 0)
    assert [duration(x) for x in (45, 600, 7200, 864_000)] == ["45 s", "10 min", "2.0 h", "10 d"]


def test_energy_says_where_it_comes_from(tmp_path: Path) -> None:
    """Guards the flag: counters are measured, tables are estimated; and the user's own country and table."""
    table = {**prices()}
    guessed = energy(3600, "some CPU", country="FRA")
    assert guessed.origin == "estimated" and guessed.grams_co2 == pytest.approx(guessed.kwh * 56.0)
    assert "estimated" in guessed.explain() and guessed.to_json()["country"] == "FRA"
    read = energy(3600, "some CPU", joules=360_000, pue=1.5)
    assert read.origin == "measured" and read.kwh == pytest.approx(0.15) and read.watts == pytest.approx(100)
    assert energy(3600, "NVIDIA H100 PCIe", table=table).watts == 350, "the longest name counts"
    assert energy(3600, "NVIDIA H200", count=8).kwh == pytest.approx(5.6)
    assert rent(3600, "NVIDIA H100 80GB HBM3", 8) == pytest.approx((15.92, 40.0)) and rent(1, "a CPU") is None
    with pytest.raises(ConfigError, match="country"):
        energy(1, "x", country="Atlantis")


def test_meter_reads_counters(tmp_path: Path) -> None:
    """Guards the energy counters: sub-domains are not added twice, one wrap is undone, and no counters give None."""
    for name, value in (("intel-rapl:0", 900_000), ("intel-rapl:1", 100), ("intel-rapl:0:0", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(str(value))
        (tmp_path / name / "max_energy_range_uj").write_text("1000000")
    meter = Meter(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("400000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("500100")
    assert meter.joules() == pytest.approx(1.0)
    assert Meter(tmp_path / "none").joules() is None
