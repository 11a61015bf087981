"""vLLM's engine beside the contract: what is decided before vLLM is asked, and its end."""

from __future__ import annotations

import importlib.util
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from tests.engine import small
from tutelage.engine import Sampling
from tutelage.engine.vllm.engine import VllmEngine
from tutelage.engine.vllm.sampling import check, seed_of
from tutelage.errors import ArtifactError, ConfigError, MissingExtra
from tutelage.structured.grammar import Grammar


@pytest.mark.parametrize(
    ("how", "field"),
    [({"temperature": 0.005}, "temperature"), ({"temperature": 2.5}, "temperature"),
     ({"grammar": Grammar("regex", "a"), "logprobs": 0}, "logprobs"), ({"beams": 2, "temperature": 0}, "beams"),
     ({"no_repeat_ngram": 2}, "no_repeat_ngram")],
)  # fmt: skip
def test_what_vllm_would_do_otherwise_is_refused(how: dict[str, Any], field: str) -> None:
    """A temperature that is quietly raised, log-probabilities that are not the model's."""
    with pytest.raises(ConfigError) as caught:
        check(Sampling(4, **how))
    assert caught.value.field == field
    check(Sampling(4, temperature=0.01, logprobs=3))
    check(Sampling(4, temperature=2.0, grammar=Grammar("regex", "a")))


def test_every_answer_has_a_seed_of_its_own() -> None:
    """n equal answers; seeds that torch refuses."""
    seeds = {seed_of(seed, index) for seed in (0, 1, -1, 2**80) for index in range(50)}
    assert len(seeds) == 200 and all(0 <= s < 2**63 for s in seeds) and seed_of(3, 1) == seed_of(3, 1)


def test_folders_are_judged_before_vllm_reads_them(tmp_path: Path) -> None:
    """A pickle, or code of the model's own, that a library opens because it can."""
    folder = small.saved(tmp_path, "model", 64)
    config = (folder / "config.json").read_text()
    for extra, field in (
        ('"auto_map": {"AutoConfig": "evil.Config"}', "auto_map"), ('"is_encoder_decoder": true', "is_encoder_decoder"),
    ):  # fmt: skip
        (folder / "config.json").write_text(config.replace("{", "{" + extra + ",", 1))
        with pytest.raises(ArtifactError) as caught:
            VllmEngine(folder)
        assert caught.value.field == field
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="pickle"):
        VllmEngine(folder)


def test_options_that_are_not_vllms(tmp_path: Path) -> None:
    """Settings that are taken and then not done."""
    for options, field in (
        ({"dtype": "int8"}, "dtype"), ({"trust_remote_code": True}, "trust_remote_code"), ({"load_format": "pt"}, "load_format"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            VllmEngine(tmp_path, **options)
        assert caught.value.field == field


INSTALLED = importlib.util.find_spec("vllm") is not None


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed here")
def test_says_how_to_get_vllm(tmp_path: Path) -> None:
    with pytest.raises(MissingExtra, match=r"tutelage\[vllm\]"):
        VllmEngine(small.saved(tmp_path, "model", 64))


@pytest.mark.skipif(not INSTALLED, reason="NOT CHECKED: --engine vllm when its process dies, since vLLM is not installed here")
def test_a_killed_process_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that waits for ever for a step of a process that the system has killed."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    engine = VllmEngine(small.saved(tmp_path, "model", 4096, head=32), enforce_eager=True)
    sequence = engine.submit([1, 2, 3], Sampling(4000, temperature=0))
    engine.step()
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(Exception, match="EngineCore"):
        while not engine.idle:
            engine.step()
    engine.cancel(sequence)
    with pytest.raises(Exception, match="EngineCore"):
        engine.submit([1], Sampling(1))
    engine.close()
