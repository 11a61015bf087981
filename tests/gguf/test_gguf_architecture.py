"""Models of every family, written as llama.cpp's converter writes them and read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_files import of_folder, tiny

from tests.models.shapes import CASES, LLAMA3, SHAPE, reference_logits, written
from tutelage.errors import ArtifactError
from tutelage.gguf import reader
from tutelage.gguf.architecture import config_of, shortest
from tutelage.models.interface import Batch
from tutelage.models.open import load

REAL_LLAMA3 = {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
SAME = ("llama", "llama-biased-tied", "llama-llama3", "llama-linear", "llama-yarn", "qwen2", "qwen3", "gemma")
FAMILIES = {
    **{name: CASES[name] for name in SAME},
    "llama-3.1": {"model_type": "llama", **SHAPE, "head_dim": 64, "max_position_embeddings": 131072,
                  "rope_parameters": REAL_LLAMA3},
    "gemma2": {**CASES["gemma2"], "query_pre_attn_scalar": 8},
    "gemma3": {**CASES["gemma3"], "query_pre_attn_scalar": 8, "sliding_window_pattern": 6,
               "layer_types": ["sliding_attention"] * 4},
}  # fmt: skip


@pytest.mark.parametrize("case", FAMILIES)
def test_logits_are_those_of_the_folder(case: str, tmp_path: Path) -> None:
    """Guards the order of queries and keys, Gemma's norms, biases, tied embeddings, windows and every rotary scaling: a
    mistake in any of them gives a model that talks nonsense without an error."""
    model, folder = written(FAMILIES[case], tmp_path / "folder")
    ids = torch.arange(3, 43)[None]
    read = load(of_folder(folder, tmp_path / "model.gguf"))
    with torch.no_grad():
        found = read.logits(Batch.of(ids.tolist())).view(1, 40, -1)
    torch.testing.assert_close(found, reference_logits(model, ids), rtol=2e-4, atol=2e-4)


def test_the_factors_of_llama_3_are_recognised(tmp_path: Path) -> None:
    """Guards a trained folder that other libraries open: the file holds factors, config.json wants Llama 3's numbers."""
    _, folder = written(FAMILIES["llama-3.1"], tmp_path / "folder")
    found = config_of(reader.read(of_folder(folder, tmp_path / "model.gguf")))["rope_scaling"]
    assert found == {k: v for k, v in REAL_LLAMA3.items() if k != "rope_theta"}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"general__architecture": "mamba"}, "mamba"),
        ({"general__type": "adapter"}, "adapter"),
        ({"split__count": 3}, "llama-gguf-split"),
        ({"llama__block_count": "one"}, "llama.block_count"),
        ({"llama__embedding_length": 32}, "another shape"),
        ({"llama__feed_forward_length": [32, 16]}, "layers of different shapes"),
        ({"llama__attention__head_count": 0}, "head_count"),
        ({"llama__attention__head_count": 4, "llama__attention__head_count_kv": 4}, "another shape"),
        ({"llama__attention__value_length": 4}, "value_length"),
        ({"llama__rope__dimension_count": 4}, "dimension_count"),
        ({"llama__rope__scaling__type": "spiral"}, "spiral"),
        ({"llama__block_count": 2}, "missing"),
    ],
)
def test_what_is_not_read_is_an_error(changed: dict[str, object], named: str, tmp_path: Path) -> None:
    """Guards against tracebacks, and against models that are read as what they are not."""
    with pytest.raises(ArtifactError, match=named) as caught:
        load(tiny(tmp_path / "model.gguf", **changed))
    assert "model.gguf" in str(caught.value) or "config.json" in str(caught.value)


def test_single_precision_numbers_are_written_short() -> None:
    """Guards config.json: 9.999999747378752e-06 is 1e-05 in single precision, and every other folder says 1e-05."""
    assert [shortest(x) for x in (9.999999747378752e-06, 100000.0, 0.30000001192092896)] == [1e-05, 100000.0, 0.3]
