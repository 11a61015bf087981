"""Adapting to a field: new tokens, replay, resuming, child runs, and what is measured before and after."""

from __future__ import annotations

import functools
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.guarantees import tiny
from tutelage import api
from tutelage.errors import ConfigError, UserError
from tutelage.files import read_json
from tutelage.models.open import load
from tutelage.records import Document
from tutelage.tokenizer.load import TokenizerFolder

FIELD = ["thrombocytopenia", "neutropenia", "dexamethasone", "intravenously", "leukopenia", "cat", "dog"]


@functools.cache
def field() -> Path:
    """Documents of words that the checkpoint's tokenizer spells letter by letter."""
    texts = (" ".join(FIELD[(i * 3 + k * (1 + i % 4)) % len(FIELD)] for k in range(4 + i % 9)) for i in range(30))
    return tiny.records_folder(tiny.home() / "field", [Document.make(f"{i}: {t}", source="field") for i, t in enumerate(texts)])


def settings(**change: Any) -> dict[str, Any]:
    return {
        "stage": "adapt", "model": tiny.checkpoint(), "data": field(), "general": tiny.records("documents"), "vocab_add": 24,
        "warm_steps": 3, "steps": 6, "replay_share": 0.25, "max_documents": 4, "keep_checkpoints": 9, **change,
    }  # fmt: skip


@functools.cache
def straight() -> Path:
    """The run that nothing disturbed."""
    process = tiny.start(tiny.home() / "adapt-straight", **settings())
    assert process.wait() == 0, process.said
    return tiny.run_folder(tiny.home() / "adapt-straight", "adapt")


def test_killed_in_either_phase_and_resumed_is_never_killed(tmp_path: Path) -> None:
    """Promise 7 over two phases: a second phase that begins from other rows than the first one left, new tokens learnt again
    otherwise, a mixture that begins again."""
    for place in ({"at": "update", "count": 2}, {"at": "checkpoint", "count": 1}, {"at": "update", "count": 6}, {"at": "export"}):
        killed = tiny.start(tmp_path, die=place, **settings())
        assert killed.wait() == -signal.SIGKILL, (place, killed.said)
    last = tiny.start(tmp_path, **settings())
    assert last.wait() == 0, last.said
    for stage, files in (("extend_vocab", ("model/model.safetensors",)), ("adapt", ("model/model.safetensors", "after.json"))):
        one, two = tiny.run_folder(tmp_path, stage), straight().parent / tiny.run_folder(tmp_path, stage).name
        assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)
        assert tiny.metrics(one) == tiny.metrics(two)


@torch.no_grad()
def test_the_adapted_model_is_a_hugging_face_folder() -> None:
    """A config.json with the old size, a tokenizer without the new tokens, a chat template that is lost: `transformers` would
    read other ids or refuse."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = straight() / "model"
    old, new = TokenizerFolder.open(tiny.checkpoint()), TokenizerFolder.open(folder)
    theirs, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ours: Any = load(folder)
    assert new.vocab_size == old.vocab_size + 24 == len(theirs) == model.config.vocab_size == ours.config.vocab_size
    assert theirs.chat_template == old.template and new.stop_ids == old.stop_ids
    text = "dexamethasone intravenously, the cat sat"
    ids = theirs(text, return_tensors="pt", add_special_tokens=False).input_ids
    assert (
        ids[0].tolist() == new.encode_text(text) and len(ids[0]) < len(old.encode_text(text)) and int(ids.max()) >= old.vocab_size
    )
    hidden = ours.logits(tiny_batch(ids))
    torch.testing.assert_close(hidden, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def tiny_batch(ids: torch.Tensor) -> Any:
    from tutelage.models.interface import Batch

    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    return Batch(ids, torch.ones_like(ids, dtype=torch.int32), positions, ids, torch.ones(ids.shape))


def test_the_first_phase_trains_new_rows_alone() -> None:
    """Promise 13: what the checkpoint knew is still there, to the bit, when everything begins to be trained."""
    made = straight().parent / read_json(straight() / "run.json")["vocabulary"]
    before, after = load_file(tiny.checkpoint() / "model.safetensors"), load_file(made / "model" / "model.safetensors")
    begun = load_file(made / "begun" / "model.safetensors")
    for name, old in before.items():
        assert torch.equal(after[name][: len(old)], old) and torch.equal(begun[name][: len(old)], old), name
    assert not torch.equal(after["model.embed_tokens.weight"], begun["model.embed_tokens.weight"])


def test_gain_and_loss_are_facts() -> None:
    """Numbers of other documents before than after, of the training's own losses, or of tokens in place of bytes."""
    facts = read_json(straight() / "run.json")
    rows = sum(row["rows"] for row in facts["replayed"].values())
    assert rows == 6 * 4 and facts["replayed"]["general"]["rows"] > 0
    before, after = (read_json(straight() / f"{name}.json") for name in ("before", "after"))
    for kind, found in facts["adaptation_effect"].items():
        assert [r["document"] for r in before[kind]] == [r["document"] for r in after[kind]] and found["documents"] == 4
        bits = [
            sum(r["nats"] for r in rows) / sum(r["bytes"] for r in rows) / 0.6931471805599453
            for rows in (before[kind], after[kind])
        ]
        assert bits == pytest.approx([found["before"]["value"], found["after"]["value"]])
        assert found["change"]["value"] == pytest.approx(bits[1] - bits[0])
        assert found["change"]["low"] <= found["change"]["value"] <= found["change"]["high"]
    assert facts["adaptation_effect"]["field"]["change"]["high"] < 0 and facts["bits_per_byte"] < 5
    assert facts["bytes_per_token"] > 1.3 * facts["bytes_per_token_before"] and facts["verdict"].startswith("field: ")
    assert any("general_bits_per_byte" in row for row in tiny.metrics(straight()))


def test_a_child_run_goes_on_with_the_new_tokens(tmp_path: Path) -> None:
    """`--extend` of a run with another vocabulary than its input: checkpoints would not fit the model it starts from."""
    runs, given = tmp_path / "runs", settings()
    stage = given.pop("stage")
    first = tiny.Process({"argv": tiny.arguments(runs, stage=stage, **given), "die": {}, "env": {}})
    assert first.wait() == 0, first.said
    second = tiny.Process({"argv": [*tiny.arguments(runs, stage=stage, **given), "--extend", "steps=8"], "die": {}, "env": {}})
    assert second.wait() == 0 and "extend_vocab: hit" in second.said, second.said
    found = [read_json(p) for p in runs.glob("cli/adapt-*/run.json")]
    assert sorted(f["steps"] for f in found) == [6, 8] and any("extended_from" in f for f in found)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from tutelage.setup import trainer

    monkeypatch.setattr(trainer, "measure_machine", lambda: tiny.MACHINE)


NO_TOKENS: dict[str, Any] = {"vocab_add": 0, "warm_steps": 100}  # the steps as they are when left out


def adapt(runs: Path, **change: Any) -> Any:
    given = {**settings(), "sequence_length": tiny.ROW, "batch_tokens": 4 * tiny.ROW, "threads": 1, "device": "cpu", **change}
    given.pop("stage")
    return api.adapt(**{k: str(v) if isinstance(v, Path) else v for k, v in given.items()}, runs=runs)


def test_without_general_text_it_says_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Forgetting that nobody measures and nobody is told of."""
    made = adapt(tmp_path, general=None, replay_share=0.2, steps=1, **NO_TOKENS)
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: no general text" in said and "not measured" in said
    assert list(made.facts["adaptation_effect"]) == ["field"] and "replayed" not in made.facts


def test_share_of_nothing_measures_only(tmp_path: Path) -> None:
    """A share of 0 that is an error of the mixture, or that replays all the same."""
    made = adapt(tmp_path, replay_share=0.0, steps=1, **NO_TOKENS)
    assert list(made.facts["adaptation_effect"]) == ["field", "general"] and "replayed" not in made.facts


@pytest.mark.parametrize(
    ("change", "field"),
    [({"rows": "ends"}, "rows"), ({"warm_steps": 7}, "warm_steps"), ({"general": None, "replay_share": 0.5}, "replay_share")],
)
def test_settings_that_change_nothing_are_refused(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    """Guards against new tokens that were asked for in part, and a replay of nothing."""
    with pytest.raises(ConfigError, match="changes nothing here, with") as caught:
        adapt(tmp_path, **{**NO_TOKENS, **change})
    assert caught.value.field == field


def test_new_tokens_may_be_begun_only(tmp_path: Path) -> None:
    """Guards against training settings that `adapt` hands to a stage which has no use for them, and against those that are taken
    and ignored: `extend-vocab --train false --steps 33`."""
    made = adapt(tmp_path, warm_steps=0, steps=1, optimizer={"lr": 1e-3})
    assert made.facts["tokens_added"] > 0
    how: dict[str, Any] = {"model": str(tiny.checkpoint()), "data": str(field()), "add": 8, "train": False, "threads": 1}
    for name, value in {"steps": 33, "dtype": "bfloat16", "schedule": {"warmup": 0.5}}.items():
        with pytest.raises(ConfigError, match="changes nothing here, with train=false") as caught:
            api.extend_vocab(**how, **{name: value}, runs=tmp_path)
        assert caught.value.field == name
    assert api.extend_vocab(**how, runs=tmp_path).facts["tokens_added"] == 8


def test_what_cannot_be_adapted_is_refused(tmp_path: Path) -> None:
    """Hours of training whose loss elsewhere nothing can measure; a tokenizer that is another one afterwards; a traceback."""
    with pytest.raises(UserError, match="replay_share"):
        adapt(tmp_path, replay_share=1.0)
    no_held_out = tiny.records_folder(tmp_path / "none", tiny.documents(), held_out=0)
    with pytest.raises(UserError, match=r"`general` has no held-out document(.|\n)*validation_share"):
        adapt(tmp_path, general=no_held_out)
    with pytest.raises(UserError, match=r"other records than this stage reads(.|\n)*general(.|\n)*Conversation"):
        adapt(tmp_path, general=tiny.records("conversations"))
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((tiny.checkpoint() / name).read_bytes())
    with pytest.raises(UserError, match="no tokenizer here"):
        adapt(tmp_path, model=bare)


def test_new_tokens_for_another_kind_of_tokenizer_are_refused(tmp_path: Path) -> None:
    """Merges of bytes in a SentencePiece vocabulary; the model without them can still be adapted."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from tutelage.models.export import save

    inner = Tokenizer(
        models.Unigram(
            [("<unk>", 0.0), ("</s>", 0.0), *((c, -2.0) for c in "abcdefghijklmnopqrstuvwxyz:0123456789\u2581")], 0, False
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.add_special_tokens(["</s>"])
    (tmp_path / "words").mkdir()
    inner.save(str(tmp_path / "words" / "tokenizer.json"))
    (tmp_path / "words" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    save(tiny.model(eos_token_id=1), tmp_path / "model", tmp_path / "words")
    with pytest.raises(UserError, match=r"byte-level BPE alone(.|\n)*Unigram(.|\n)*vocab_add=0"):
        adapt(tmp_path / "runs", model=tmp_path / "model")
    assert "field" in adapt(tmp_path / "runs", model=tmp_path / "model", steps=1, **NO_TOKENS).facts["adaptation_effect"]
