"""The real files, SmolLM2-135M-Instruct and Gemma 3 270M, against llama.cpp and `transformers`: `make test-models`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import RECORD, as_float32, digests, log_probabilities, tokens
from strings_2000 import strings

from tutelage.gguf import reader
from tutelage.gguf.dequantize import dequantize
from tutelage.models.interface import Batch
from tutelage.models.open import load
from tutelage.tokenizer.load import TokenizerFolder

NAMES = ("smollm2", "gemma")


@pytest.fixture(params=NAMES)
def real(request: pytest.FixtureRequest) -> tuple[str, Path]:
    return request.param, request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    record: dict[str, Any] = json.loads(RECORD.read_text())
    return record


def _llama_cpp() -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("needs llama.cpp (make test-models, or pip install llama-cpp-python)")


def _ids(file: Path, special: bool) -> list[list[int]]:
    words = TokenizerFolder.open(file)
    if special:
        return [list(words.tokenizer.encode(s, add_special_tokens=False).ids) for s in strings()]
    return [list(x) for x in words.encode_batch(strings())]


def _unlike_llama_cpp(name: str, special: bool, text: str) -> bool:
    """`</s>` is an HTML tag to Gemma, and the file says so; llama.cpp takes every token of this name for a control token."""
    return name == "gemma" and not special and "</s>" in text


@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
def test_ids_are_those_that_llama_cpp_gave(real: tuple[str, Path], special: bool, recorded: dict[str, Any]) -> None:
    """Guards every token of 2,000 strings: a model reads another language where ids differ."""
    name, file = real
    found, wanted = digests(_ids(file, special)), recorded[name]["special" if special else "plain"]
    differ = [text for i, text in enumerate(strings()) if found[4 * i : 4 * i + 4] != wanted[4 * i : 4 * i + 4]]
    assert [text for text in differ if not _unlike_llama_cpp(name, special, text)] == []


@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
def test_ids_are_those_of_llama_cpp(real: tuple[str, Path], special: bool) -> None:
    """Guards the record itself."""
    _llama_cpp()
    name, file = real
    rows = zip(strings(), _ids(file, special), tokens(file, special), strict=True)
    assert [text for text, ours, theirs in rows if ours != theirs and not _unlike_llama_cpp(name, special, text)] == []


def _ours(file: Path, ids: list[int]) -> np.ndarray:
    model = load(file)
    with torch.no_grad():
        rows = model.logits(Batch.of([ids])).view(len(ids), -1).log_softmax(-1)
    return rows[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].double().numpy()


def test_log_probabilities_are_those_that_llama_cpp_gave(real: tuple[str, Path], recorded: dict[str, Any]) -> None:
    """Guards the whole model over 500 positions, within a hundredth of a nat. Gemma's differ by its activation, for which
    llama.cpp looks up half-precision values."""
    name, file = real
    wanted = recorded[name]
    differences = np.abs(_ours(file, wanted["ids"]) - np.array(wanted["logprobs"]))
    assert len(differences) == 500 and differences.max() < (1e-3 if name == "smollm2" else 1e-2)


def test_log_probabilities_are_those_of_llama_cpp(real: tuple[str, Path], tmp_path: Path) -> None:
    """Guards the record itself, and float32 files, which are read to the same values."""
    _llama_cpp()
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the gguf package (make test-models, or pip install gguf)")
    file = as_float32(real[1], tmp_path / "f32.gguf")
    ids, wanted = log_probabilities(file)
    assert np.abs(_ours(file, ids) - np.array(wanted)).max() < 1e-2


def test_values_are_those_of_the_gguf_package(real: tuple[str, Path]) -> None:
    """Guards every packed tensor of the real files, K types among them, to the bit."""
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the gguf package (make test-models, or pip install gguf)")
    import gguf

    data = torch.from_numpy(np.fromfile(real[1], np.uint8))
    places = reader.read(real[1]).tensors
    for tensor in gguf.GGUFReader(real[1]).tensors:
        place = places[tensor.name]
        found = dequantize(data[place.start : place.start + place.size], place.type).view(place.shape).numpy()
        wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(place.shape).astype(np.float32)
        assert np.array_equal(found.view(np.uint32), wanted.view(np.uint32)), tensor.name


def test_smollm2_knows_the_capital_of_france(smollm2: Path) -> None:
    """Guards the whole way: file, template, tokens, weights, end of turn."""
    from typer.testing import CliRunner

    from tutelage.cli.main import app

    for reference in (str(smollm2), "smollm2"):
        done = CliRunner().invoke(app, ["chat", reference, "--message", "What is the capital of France?"])
        assert (done.exit_code, done.stdout.strip()) == (0, "The capital of France is Paris.")


def test_smollm2_written_is_what_transformers_opens(smollm2: Path, tmp_path: Path) -> None:
    """Guards the folder that training leaves: ids of 2,000 strings and logits are the same in `transformers`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tutelage.gguf.folder import model_folder
    from tutelage.models.export import read_stop_ids, save

    source, model = model_folder("smollm2"), load("smollm2")
    save(model, tmp_path / "out", source, stop_ids=read_stop_ids(source))
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [words(s, add_special_tokens=False).input_ids for s in strings()] == _ids(smollm2, True)
    ids = torch.tensor([words("The quick brown fox jumps over the lazy dog.").input_ids])
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model.logits(Batch.of(ids.tolist())).view(1, ids.shape[1], -1), other(ids).logits, atol=1e-3, rtol=1e-3
        )
