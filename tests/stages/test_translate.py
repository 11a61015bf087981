"""Stage `translate` beside a model whose positions end: lengths are looked at before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import World, world  # noqa: F401 (a fixture)
from tutelage import api
from tutelage.errors import ConfigError, DataError
from tutelage.models.export import save
from tutelage.models.hf.seq2seq import new_seq2seq
from tutelage.rundir import RunDir
from tutelage.tokenizer.load import TokenizerFolder

pytest.importorskip("transformers")

POSITIONS = 32
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bart(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A model of 32 positions."""
    words = world.made["words"] / "tokenizer"
    known = TokenizerFolder.open(words)
    folder = tmp_path_factory.mktemp("bart") / "model"
    shape = {"model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0,
             "max_position_embeddings": POSITIONS, "vocab_size": known.vocab_size, "eos_token_id": known.eos_id,
             "pad_token_id": known.eos_id, "bos_token_id": known.eos_id, "decoder_start_token_id": known.eos_id,
             "forced_eos_token_id": None}  # fmt: skip
    save(new_seq2seq(shape), folder, words)
    return folder


def pairs(folder: Path, source: int = 4, target: int = 4, held_out: int = 4) -> RunDir:
    """30 pairs of texts of so many words, and 4 held-out ones whose targets are of `held_out`."""
    files = []
    for name, count, words in (("train", 30, target), ("held", 4, held_out)):
        rows = [{"prompt": f"{name} {i}" + " a" * (source - 2), "completion": f"{i}" + " b" * (words - 1)} for i in range(count)]
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return api.data(runs=folder, kind="conversations", sources=[str(files[0])], validation_sources=[str(files[1])], dedup="exact")


def translate(folder: Path, model: Any, data: RunDir, **how: Any) -> RunDir:
    return api.translate(runs=folder, model=model, data=data, steps=2, batch=8, threads=1, **how)


@pytest.mark.parametrize(("setting", "value"), [("max_length", 128), ("max_target", 64)])
def test_lengths_beyond_the_model_are_refused(bart: Path, tmp_path: Path, setting: str, value: int) -> None:
    """Guards against an IndexError of torch in the first step, and against a training whose comparison fails in the end with a
    number that nobody gave."""
    data = pairs(tmp_path, source=40 if setting == "max_length" else 4)
    with pytest.raises(ConfigError) as caught:
        translate(tmp_path, bart, data, **{setting: value})
    error = caught.value
    assert (error.field, error.found, error.expected) == (setting, value, f"at most {POSITIONS}") and error.fix
    assert not list(tmp_path.glob("*/translate-*/metrics.jsonl"))


def test_lengths_are_derived_from_the_model(bart: Path, tmp_path: Path, capsys: Capture) -> None:
    """Guards against a default that the model has no room for; sources and targets that fill the room are read to the end."""
    data = pairs(tmp_path, source=40, target=20)
    made = translate(tmp_path, bart, data)
    assert made.facts["numbers"]["max_length"] == made.facts["numbers"]["max_target"] == POSITIONS
    said = capsys.readouterr().err
    assert "max_target: 32, as many tokens as the model has room for" in said and "source too long, cut at the right" in said
    assert len((made.path / "scores" / "held_out.jsonl").read_text().splitlines()) == 4
    exact = translate(tmp_path, bart, data, max_length=POSITIONS, max_target=POSITIONS)
    assert exact.facts["validation_loss"] == pytest.approx(made.facts["validation_loss"], abs=1e-6)


@pytest.mark.parametrize(("kind", "taken"), [("prompt", "max_length"), ("prefix", "max_target")])
def test_virtual_tokens_take_their_room(bart: Path, tmp_path: Path, kind: str, taken: str) -> None:
    """Guards against places beyond the model's last: a prompt stands before the source, a prefix before the target."""
    data, adapter = pairs(tmp_path, source=40, target=20), {"kind": kind, "tokens": 5}
    made = translate(tmp_path, bart, data, adapter=adapter)
    expected = {"max_length": POSITIONS, "max_target": POSITIONS, taken: POSITIONS - 5}
    assert {name: made.facts["numbers"][name] for name in expected} == expected
    with pytest.raises(ConfigError, match="at most 27, behind 5 virtual tokens") as caught:
        translate(tmp_path, bart, data, adapter=adapter, **{taken: POSITIONS})
    assert caught.value.field == taken


def test_held_out_targets_that_are_too_long_stop_nothing(bart: Path, tmp_path: Path, capsys: Capture) -> None:
    """Guards against a sound training that ends because no held-out pair is short enough."""
    made = translate(tmp_path, bart, pairs(tmp_path, held_out=60))
    said = " ".join(capsys.readouterr().err.split())
    assert "validation: nothing of it can be read" in said and "4 pairs, 4 target too long, left out" in said
    assert "raise max_target" in said and made.facts["steps"] == 2 and "right" not in made.facts
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="no pair is short enough") as caught:
        translate(tmp_path, bart, pairs(tmp_path / "other", target=60))
    assert caught.value.found == "30 pairs, 30 target too long, left out"
