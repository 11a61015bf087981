"""Encoders of `transformers` as parts that score classes: isolated texts, equal losses, folders that others open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.errors import ArtifactError, ConfigError
from tutelage.models.export import save
from tutelage.models.hf.encoder import ClassScorer, context, load_classifier, load_encoder, new_classifier
from tutelage.models.interface import Batch

transformers = pytest.importorskip("transformers")

TEXTS = [[2, 9, 40, 3, 77, 12, 8, 60, 31, 5, 90, 14, 22, 3], [2, 70, 6, 3], [2, 4, 17, 28, 3]]
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
         "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
         "pad_token_id": 0}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": {**SIZES, "pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {"vocab_size": 97, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64,
                   "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "electra": {**SIZES, "embedding_size": 16},
    "modernbert": {**{k: v for k, v in SIZES.items() if not k.endswith("dropout_prob")}, "global_attn_every_n_layers": 2,
                   "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
}  # fmt: skip
LABELS = ("cold", "mild", "warm")


def made(kind: str = "bert", task: Any = "class", **more: Any) -> ClassScorer:
    torch.manual_seed(3)
    return new_classifier({"model_type": kind, **KINDS[kind]}, task, LABELS, **more)


def packed() -> Batch:
    """All three texts in one row, with padding behind them."""
    ids, segments = torch.zeros(1, 30, dtype=torch.int64), torch.zeros(1, 30, dtype=torch.int32)
    at = 0
    for number, text in enumerate(TEXTS, 1):
        ids[0, at : at + len(text)] = torch.tensor(text)
        segments[0, at : at + len(text)] = number
        at += len(text)
    return Batch(ids, segments, torch.zeros_like(ids), torch.zeros_like(ids), torch.zeros(1, 30), attention="bidirectional")


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["class", "token"])
def test_packed_texts_score_as_each_alone_in_transformers(kind: str, task: str) -> None:
    """Texts that see each other or their padding; scores of a text that stand at another text's place."""
    part = made(kind, task)
    got = part(packed())
    assert got.shape == (30, 3) and got.dtype == torch.float32
    at = 0
    for text in TEXTS:
        expected = part.hf(input_ids=torch.tensor([text]), attention_mask=torch.ones(1, len(text))).logits[0]
        ours = got[at : at + len(text)] if task == "token" else got[at + len(text) - 1]
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
        at += len(text)
    assert not got[at:].any()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize("task", ["class", "token"])
def test_the_folder_opens_in_transformers_with_equal_logits(kind: str, task: str, tmp_path: Path) -> None:
    """A folder that only this project can read, or whose classes have no names."""
    part = made(kind, task)
    save(part, tmp_path / "m")
    auto = transformers.AutoModelForTokenClassification if task == "token" else transformers.AutoModelForSequenceClassification
    theirs = auto.from_pretrained(tmp_path / "m").eval()
    assert theirs.config.id2label == dict(enumerate(LABELS)) and theirs.config.label2id["warm"] == 2
    text = torch.tensor([TEXTS[0]])
    expected = theirs(input_ids=text, attention_mask=torch.ones_like(text)).logits[0]
    again, new = load_classifier(tmp_path / "m", task)  # type: ignore[arg-type]
    got = again(Batch.of([TEXTS[0]]))
    torch.testing.assert_close(got if task == "token" else got[-1], expected, atol=1e-6, rtol=1e-5)
    assert not new and again.labels == LABELS


@torch.no_grad()
def test_an_encoder_gives_hidden_states_of_every_token(tmp_path: Path) -> None:
    """Hidden states that depend on the texts around, or on one direction alone."""
    part = made()
    part.hf.bert.save_pretrained(tmp_path / "m")
    model = load_encoder(tmp_path / "m")
    got = model(packed()).hidden
    expected = part.hf.bert(input_ids=torch.tensor([TEXTS[0]])).last_hidden_state[0]
    torch.testing.assert_close(got[0, :14], expected, atol=1e-5, rtol=1e-4)
    changed = torch.tensor([[*TEXTS[0][:-1], 50]])
    assert not torch.allclose(part.hf.bert(input_ids=changed).last_hidden_state[0, 0], expected[0])
    assert not got[0, 23:].any()


@torch.no_grad()
def test_the_second_text_of_a_pair_has_its_own_type() -> None:
    """BERT was trained with token types: a pair without them is read as one text."""
    pair = [2, 9, 40, 3, 77, 12, 3]
    part = made(sep_id=3)
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    expected = part.hf(input_ids=torch.tensor([pair]), token_type_ids=types).logits[0]
    torch.testing.assert_close(part(Batch.of([pair, TEXTS[1]]))[6], expected, atol=1e-5, rtol=1e-4)
    same = [3, 9, 40, 3, 77, 12, 3]  # one mark for both ends of a text
    expected = part.hf(input_ids=torch.tensor([same]), token_type_ids=types).logits[0]
    torch.testing.assert_close(part(Batch.of([same]))[6], expected, atol=1e-5, rtol=1e-4)


def test_roberta_counts_positions_from_its_padding(tmp_path: Path) -> None:
    """A text of 64 tokens in a table of 64 places, of which RoBERTa leaves two out: an index error in the last batch."""
    part = made("roberta")
    assert context(part.hf) == 62 and context(made("bert").hf) == 64
    part(Batch.of([[5] * 62, [5]]))
    with pytest.raises((IndexError, RuntimeError)):
        part(Batch.of([[5] * 63]))


@pytest.mark.parametrize("kind", ["roberta", "camembert", "bert", "distilbert"])
def test_a_new_model_has_room_for_the_texts_that_it_is_made_for(kind: str) -> None:
    """Roberta's positions begin behind its padding token: an index error at the first long text."""
    part = new_classifier({"model_type": kind}, "class", LABELS, base={**SIZES, "pad_token_id": 5})
    assert context(part.hf) == 64
    assert part(Batch.of([[7] * 64]))[-1].isfinite().all()
    told = new_classifier({"model_type": kind, "max_position_embeddings": 32}, "class", LABELS, base={**SIZES, "pad_token_id": 5})
    assert context(told.hf) == (26 if kind in ("roberta", "camembert") else 32)


def test_keys_that_a_family_does_not_have_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """`hiden_size`, which `transformers` keeps and nothing reads: a model of another size than was asked for."""
    for key, near in (("hiden_size", "hidden_size"), ("num_hidden_layer", "num_hidden_layers")):
        with pytest.raises(ConfigError, match="no such key") as error:
            new_classifier({key: 3}, "class", LABELS, base=SIZES)
        assert error.value.field == f"architecture.{key}" and error.value.fix == f"did you mean `{near}`?"
    with pytest.raises(ConfigError, match="no such key"):  # it would be written over
        new_classifier({"id2label": {0: "a"}}, "class", LABELS, base=SIZES)
    with pytest.raises(ConfigError, match="knows no such model") as error:
        new_classifier({"model_type": "robreta"}, "class", LABELS, base=SIZES)
    assert error.value.fix == "did you mean `roberta`?"
    for wrong in ({"hidden_size": 33}, {"hidden_size": "big"}, {"hidden_act": "nothing"}):
        with pytest.raises(ConfigError, match="makes no such model"):
            new_classifier(wrong, "class", LABELS, base=SIZES)
    capsys.readouterr()
    part = new_classifier({"model_type": "distilbert"}, "class", LABELS, base=SIZES)
    assert part.hf.config.dim == 32 and part.hf.config.hidden_dim == 3072
    assert "distilbert has no intermediate_size" in capsys.readouterr().err
    rotary = new_classifier({"model_type": "modernbert", "global_rope_theta": 500.0}, "class", LABELS, base=SIZES)
    assert rotary.hf.config.rope_parameters["full_attention"]["rope_theta"] == 500


def test_a_new_head_is_said_and_an_old_one_is_kept(tmp_path: Path) -> None:
    """A trained head that is thrown away without a word, or one of other classes that is taken over."""
    part = made()
    save(part, tmp_path / "m")
    same, new = load_classifier(tmp_path / "m", "class", LABELS)
    assert not new and torch.equal(same.classifier.weight, part.classifier.weight)
    other, new = load_classifier(tmp_path / "m", "class", ("a", "b", "c"))
    assert new and not torch.equal(other.classifier.weight, part.classifier.weight) and other.labels == ("a", "b", "c")
    more, new = load_classifier(tmp_path / "m", "class", ("a", "b", "c", "d"))
    assert new and more(Batch.of(TEXTS)).shape[1] == 4


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    """A decoder that is read as an encoder; half of an encoder; an encoder whose random head is taken for a trained one."""
    with pytest.raises(ConfigError, match="not an encoder"):
        new_classifier({"model_type": "gpt2"}, "class", LABELS)
    part = made()
    part.hf.bert.save_pretrained(tmp_path / "bare")
    with pytest.raises(ArtifactError, match="not trained to classify"):
        load_classifier(tmp_path / "bare", "class")
    save(part, tmp_path / "deep")
    raw = json.loads((tmp_path / "deep" / "config.json").read_text())
    (tmp_path / "deep" / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 3}))
    with pytest.raises(ArtifactError, match="encoder's tensors are missing"):
        load_classifier(tmp_path / "deep", "class")
    (tmp_path / "deep" / "config.json").write_text(json.dumps({**raw, "model_type": "gpt2"}))
    with pytest.raises(ArtifactError, match="not an encoder"):
        load_classifier(tmp_path / "deep", "class", LABELS)


def test_modes_reach_the_model() -> None:
    """Dropout that stays on when a classifier is used."""
    part = made()
    part.train()
    assert part.hf.training
    assert not part.eval().hf.training
