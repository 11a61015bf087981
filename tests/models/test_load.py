"""Model folders: what is written loads everywhere, and what can't be loaded says why."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.shapes import CASES, reference_logits, written
from tutelage.errors import ArtifactError
from tutelage.models.config import DecoderConfig
from tutelage.models.decoder import Decoder
from tutelage.models.export import read_stop_ids, save
from tutelage.models.folder import read_config
from tutelage.models.init import build
from tutelage.models.interface import Batch
from tutelage.models.open import load

IDS = [[5, 9, 40, 3, 77, 12, 8, 60]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(build(DecoderConfig.from_hf(CASES["qwen3"]), 1), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    save(build(DecoderConfig.from_hf(CASES["llama"]), 1), tmp_path / "model")
    return tmp_path / "model"


def logits(model: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(Batch.of(IDS))


@pytest.mark.parametrize("case", ["qwen3", "phi3", "gpt2"])
def test_saved_in_shards_loads_here_and_in_transformers(case: str, tmp_path: Path) -> None:
    """A fused tensor cut over two files, or an index that names a wrong file, loses weights."""
    from transformers import AutoModelForCausalLM

    model = build(DecoderConfig.from_hf(CASES[case]), 1).eval()
    save(model, tmp_path / "m", shard_bytes=20_000)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "m" / "model.safetensors").exists()
    again = load(tmp_path / "m", adapter=False)
    assert isinstance(again, Decoder)
    torch.testing.assert_close(logits(again), logits(model), atol=0, rtol=0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    torch.testing.assert_close(reference_logits(theirs, torch.tensor(IDS)), logits(model), atol=2e-5, rtol=1e-5)


def test_dtypes_of_file_and_of_memory(tmp_path: Path) -> None:
    """A float32 model stored as bfloat16 is half the size and loads as what was asked for."""
    model = build(DecoderConfig.from_hf(CASES["llama"]), 1)
    save(model, tmp_path / "m", dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.bfloat16}
    assert read_config(tmp_path / "m")["dtype"] == "bfloat16"
    assert {p.dtype for p in load(tmp_path / "m").parameters()} == {torch.float32}  # type: ignore[attr-defined]
    assert {p.dtype for p in load(tmp_path / "m", dtype="bfloat16").parameters()} == {torch.bfloat16}  # type: ignore[attr-defined]


def test_tied_weights_stay_tied(folder: Path) -> None:
    """A tied head that is loaded as a copy trains apart from the embeddings; stored twice, one of the two is stale."""
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[attr-defined]


def test_untied_later_is_written_as_such(folder: Path, tmp_path: Path) -> None:
    """A file that holds a head although config.json ties it (transformers 4 wrote such) loads as tied."""
    held = load_file(folder / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).lm_head.weight.shape == (97, 32)


def test_loaded_weights_are_a_copy(untied: Path) -> None:
    """Weights that map the file change or vanish when the folder is written again."""
    model = load(untied)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}  # type: ignore[attr-defined]
    size = (untied / "model.safetensors").stat().st_size
    (untied / "model.safetensors").write_bytes(b"\0" * size)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())  # type: ignore[attr-defined]


def test_first_releases_of_gpt2_load(tmp_path: Path) -> None:
    """The gpt2 that everyone has leaves out the prefix `transformer.` and holds masks among its weights."""
    theirs, folder = written("gpt2", tmp_path / "m")
    held = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    held["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(logits(load(folder)), reference_logits(theirs, torch.tensor(IDS)), atol=2e-5, rtol=1e-5)  # type: ignore[arg-type]


def test_tokenizer_files_and_stop_ids_travel_along(untied: Path, tmp_path: Path) -> None:
    """A model folder without its chat template or end tokens answers in the wrong format and never stops."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "tutelage.json", "notes.txt"):
        (tokenizer / name).write_text("{}", encoding="utf-8")
    save(load(untied), tmp_path / "out", tokenizer, stop_ids=[9, 2])  # type: ignore[arg-type]
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "tutelage.json"} <= names and "notes.txt" not in names
    assert read_stop_ids(tmp_path / "out") == (2, 9)
    with pytest.raises(ArtifactError, match="no tokenizer"):
        save(load(untied), tmp_path / "out2", tmp_path)  # type: ignore[arg-type]
    assert not (tmp_path / "out2").exists()


def test_an_interrupted_save_leaves_the_old_folder(untied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a model folder that looks whole is worse than none."""
    import tutelage.models.export as export

    model, before = load(untied), sorted(p.name for p in untied.iterdir())

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        save(model, untied)  # type: ignore[arg-type]
    assert sorted(p.name for p in untied.iterdir()) == before
    assert [p.name for p in untied.parent.iterdir()] == [untied.name]
    load(untied)


def change_config(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**raw, **changes}))

    return apply


def rename_to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def drop_tensor(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, folder / "model.safetensors")


def add_tensor(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    save_file({**held, "model.layers.9.extra": torch.zeros(2)}, folder / "model.safetensors")


def index_of_missing_file(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))


DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json is missing", "fix:")),
    "broken config": (lambda f: (f / "config.json").write_text("{"), ("not valid JSON", "config.json")),
    "config of something else": (lambda f: (f / "config.json").write_text("[1]"), ("model_type",)),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("weights are missing", "model.safetensors")),
    "pickle": (rename_to_pickle, ("pytorch_model.bin", "pickle", "save_pretrained")),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes(b"12345678abc"), ("damaged", "model.safetensors")),
    "other shape": (change_config(intermediate_size=64), ("gate_proj.weight", "[48, 32]", "[64, 32]")),
    "fewer tensors": (drop_tensor, ("model.layers.1.mlp.up_proj.weight", "missing")),
    "more tensors": (add_tensor, ("model.layers.9.extra",)),
    "missing shard": (index_of_missing_file, ("model-00001-of-00002.safetensors",)),
    "own code": (change_config(model_type="mine", auto_map={"AutoModel": "m.M"}), ("auto_map", "never")),
    "quantized": (change_config(quantization_config={"bits": 4}), ("quantiz",)),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_named_with_what_was_expected(damage: str, untied: Path) -> None:
    """Each of these used to be a traceback from three libraries down."""
    spoil, said = DAMAGE[damage]
    spoil(untied)
    with pytest.raises(ArtifactError) as caught:
        load(untied, adapter=damage == "own code")
    for text in said:
        assert text in str(caught.value), str(caught.value)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "torchao", "hqq", "of-tomorrow", None])
def test_quantized_weights_are_named_with_their_method(method: str | None, untied: Path) -> None:
    """An ImportError from three libraries down; a method that nobody knows, which transformers reads as if it were none."""
    change_config(quantization_config={"quant_method": method, "bits": 4} if method else {"bits": 4})(untied)
    with pytest.raises(ArtifactError, match=method or "by an unnamed method") as caught:
        load(untied)
    assert caught.value.field == "quantization_config" and "GGUF" in str(caught.value.fix)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """A mistyped path must not be looked up on a hub."""
    with pytest.raises(ArtifactError, match="no such model folder"):
        load(tmp_path / "nowhere")


def test_code_in_the_folder_of_a_known_family_is_not_run(untied: Path) -> None:
    """auto_map beside a family of ours is ignored: our own code runs, that of the folder never does."""
    (untied / "modeling.py").write_text("raise SystemExit('ran')")
    change_config(auto_map={"AutoModelForCausalLM": "modeling.Mine"})(untied)
    assert isinstance(load(untied), Decoder)


def test_loading_our_families_does_not_import_transformers(untied: Path) -> None:
    """transformers takes seconds to import; `tutelage chat` promises its first token in five."""
    code = "import sys; from tutelage.models.open import load; load(sys.argv[1]); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(untied)], check=False).returncode == 0


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_size": "128"}, "hidden_size"),
        ({"num_attention_heads": [4]}, "num_attention_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers"),
        ({"model_type": "foreign", "num_layers": 10**7}, "num_layers"),
        ({"head_dim": True}, "head_dim"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "rope_parameters.factor"),
        ({"rope_parameters": {"full_attention": 3}}, "rope_parameters.full_attention"),
        ({"rope_scaling": "x"}, "rope_scaling"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id"),
        ({"bos_token_id": {}}, "bos_token_id"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"hidden_act": 3}, "hidden_act"),
        ({"layer_types": 3}, "layer_types"),
        ({"architectures": 5}, "architectures"),
        ({"architectures": [5]}, "architectures"),
        ({"sliding_window": "4"}, "sliding_window"),
    ],
)
def test_a_value_of_another_type_is_named(folder: Path, change: dict[str, object], field: str) -> None:
    """TypeErrors, from places that name neither the file nor the key."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtifactError) as caught:
        load(folder)
    assert caught.value.field == field and caught.value.file == path and caught.value.expected and caught.value.fix


def test_a_wrong_value_of_another_family_is_named(tmp_path: Path) -> None:
    """The plan reads the shape of every family."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom", "hidden_size": "64"}))
    with pytest.raises(ArtifactError) as caught:
        read_config(tmp_path)
    assert caught.value.field == "hidden_size"
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match="nested too deeply"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("table", "field"),
    [
        ([1], "weight_map"),
        ({"a": 1}, "weight_map"),
        (None, "weight_map"),
        ({"a": "../outside.safetensors"}, "weight_map.a"),
        ({"a": "/etc/passwd"}, "weight_map.a"),
        ({"a": "x/y.safetensors"}, "weight_map.a"),
        ({"a": ".."}, "weight_map.a"),
        ({"a": ""}, "weight_map.a"),
        ({"a": "config.json"}, "weight_map.a"),
    ],
)
def test_an_index_names_weights_of_its_own_folder(folder: Path, table: object, field: str) -> None:
    """Files outside a model's folder, read because its index says so; and an index that is none."""
    (folder.parent / "outside.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(ArtifactError) as caught:
        load(folder)
    assert caught.value.field == field and caught.value.file == folder / "model.safetensors.index.json"


def test_stop_ids_are_numbers(folder: Path) -> None:
    """`int("</s>")` in a traceback."""
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ArtifactError, match="not the number of a token"):
        read_stop_ids(folder)
