"""`tutelage predict`: a trained classifier used on whole files."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.pipeline import World, environment, tutelage, world  # noqa: F401 (a fixture)
from tests.stages.test_classify import TINY, classify, data, rows
from tutelage import api
from tutelage.config.spec import hyphens
from tutelage.config.stages import Predict
from tutelage.errors import ArtifactError, ConfigError, DataError
from tutelage.files import read_json, write_json
from tutelage.inference.classifier import Classifier
from tutelage.models.export import save
from tutelage.models.hf.encoder import new_classifier

pytest.importorskip("transformers")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:  # noqa: F811
    """Runs of a few steps: of an encoder and a decoder, of several classes, of a tagger, of virtual tokens."""
    folder = tmp_path_factory.mktemp("trained")
    made = {}
    for kind in ("class", "many", "tag"):
        (folder / kind).mkdir()
        made[kind] = classify(folder / kind, world, data(folder / kind, kind), steps=30 if kind == "tag" else 3).path
    records = data(folder / "class", "class")
    start = {"tokenizer": None, "architecture": None, "steps": 1}
    made["decoder"] = classify(folder / "class", world, records, model=world.made["base"], **start).path
    behind = {"adapter": {"kind": "prompt", "tokens": 4}, "max_length": 28}
    made["adapter"] = classify(folder / "class", world, records, encoder=made["class"] / "model", **start, **behind).path
    yield made


def write(path: Path, lines: Sequence[object]) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("kind", "key"),
    [("class", "label"), ("many", "labels"), ("tag", "spans"), ("decoder", "label"), ("adapter", "label")],
)
def test_every_classifier_labels_a_file(trained: dict[str, Path], tmp_path: Path, capsys: Capture, kind: str, key: str) -> None:
    """A classifier that can be trained and not be used; rows in another order than those of the file."""
    made = [{"id": f"r{i}", "text": row["text"], "other": 1} for i, row in enumerate(rows("class"))]
    made = made * 7 + [{"text": "short"}]  # more than are read at a time
    source, output = write(tmp_path / "in.jsonl", made), tmp_path / "out" / "labels.jsonl"
    said = tutelage(capsys, "predict", trained[kind], source, "--output", output)
    assert said.code == 0 and said.out == f"{output}\n" and f"{len(made):,} rows in" in said.err, said.err
    found = read(output)
    folder = next(trained[kind] / n for n in ("model", "adapter") if (trained[kind] / n).is_dir())
    expected = Classifier(folder).predict([row["text"] for row in made])
    labels = expected.labels if kind == "class" else [list(x) if isinstance(x, tuple) else x for x in expected.labels]
    if kind == "tag":
        labels = [[{"start": s.start, "end": s.end, "label": s.label} for s in spans] for spans in expected.labels]
        assert any(labels)
    assert [row[key] for row in found] == labels
    assert [row.get("id", row.get("number")) for row in found] == [*(f"r{i}" for i in range(90))] * 7 + [631]
    assert list(found[0]) == ["id", "text", key, "probabilities"] and found[-1]["text"] == "short"
    assert list(found[5]["probabilities"].values()) == pytest.approx(expected.probabilities[5].tolist(), abs=1e-4)


def test_tables_lines_and_pairs(trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats that every other command reads; a pair of which one text is thrown away; numbers that are not the lines."""
    plain = write(tmp_path / "in.txt", ["the cat is red", " the dog is blue "])
    with (tmp_path / "in.csv").open("w", newline="") as f:
        csv.writer(f).writerows([["title", "comment"], ["one", "the cat is red"], ["two", "the dog, who is blue"]])
    out = tmp_path / "out.jsonl"
    facts = api.predict(model=trained["class"], input=plain, output=out)
    assert [(row["number"], row["text"]) for row in read(out)] == [(1, "the cat is red"), (2, " the dog is blue ")]
    assert facts["rows"] == 2 == sum(facts["labels"].values()) and facts["cut"] == 0
    fields = {"text": "comment", "pair": "title"}
    api.predict(model=trained["class"], input=tmp_path / "in.csv", output=out, fields=fields, force=True)
    found = read(out)
    assert [(row["text"], row["pair"]) for row in found] == [("the cat is red", "one"), ("the dog, who is blue", "two")]
    expected = Classifier(trained["class"] / "model").predict([(row["text"], row["pair"]) for row in found])
    assert list(found[1]["probabilities"].values()) == pytest.approx(expected.probabilities[1].tolist(), abs=1e-5)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b'{"text": "an owl", "id": 7}\n')))
    api.predict(model=trained["class"], input="-", output=out, force=True)
    assert [row["id"] for row in read(out)] == [7] and sorted(p.name for p in tmp_path.iterdir()) == [
        "in.csv",
        "in.txt",
        "out.jsonl",
    ]
    with pytest.raises(DataError, match="mark between the texts of a pair") as error:
        api.predict(model=trained["decoder"], input=tmp_path / "in.csv", output=tmp_path / "no.jsonl", fields=fields)
    assert error.value.line == 2 and not (tmp_path / "no.jsonl").exists()


def test_texts_that_are_cut_are_counted(trained: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    """A text whose end, or beginning, is lost without a word."""
    source = write(tmp_path / "in.jsonl", [{"text": "red " * 60 + "blue"}, {"text": "red"}])
    out = tmp_path / "out.jsonl"
    for side in ("right", "left"):
        said = tutelage(capsys, "predict", trained["class"], source, "-o", out, "--too-long", side, "--force")
        assert f"1 of 2 texts were cut at the {side}, to 32 tokens" in said.err and len(read(out)[0]["text"]) == 244
        row = Classifier(trained["class"] / "model", too_long=side).predict(["red " * 60 + "blue"])  # type: ignore[arg-type]
        assert list(read(out)[0]["probabilities"].values()) == pytest.approx(row.probabilities[0].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "lines", "place", "said"),
    [
        ("in.jsonl", [{"text": "a"}, {"text": "  "}], "in.jsonl:2", "an empty text can't be classified"),
        ("in.txt", ["a", "", "b"], "in.txt:2", "an empty text can't be classified"),
        ("in.jsonl", [{"text": "a"}, {"txt": "b"}], "in.jsonl:2", "--fields '{text: YOUR_KEY}'"),
        ("in.jsonl", [{"text": "a"}, "{"], "in.jsonl:2", "not valid JSON"),
        ("in.jsonl", ['{"text": "\\ud800"}'], "in.jsonl:1", "half a character"),
        ("in.jsonl", [], "in.jsonl", "no rows in this file"),
        ("in.pdf", ["a"], "in.pdf", "texts are not read from such a file"),
    ],
)
def test_rows_without_a_text_are_named_and_nothing_is_written(
    trained: dict[str, Path], tmp_path: Path, capsys: Capture, name: str, lines: Sequence[object], place: str, said: str
) -> None:
    """Half of an output; a row that is left out without a word; an error that does not say where."""
    source = write(tmp_path / name, lines)
    done = tutelage(capsys, "predict", trained["class"], source, "--output", tmp_path / "out.jsonl")
    assert done.code == 2 and place in done.err and said in done.err, done.err
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_what_is_no_classifier_or_in_the_way_is_refused(
    trained: dict[str, Path], world: World, tmp_path: Path, capsys: Capture  # noqa: F811
) -> None:  # fmt: skip
    """An output that is written over; a language model whose likeliest token is taken for a label."""
    source, out = write(tmp_path / "in.txt", ["a"]), write(tmp_path / "out.jsonl", ["mine"])
    with pytest.raises(ConfigError, match="there already"):
        api.predict(model=trained["class"], input=source, output=out)
    with pytest.raises(ConfigError, match="replace the input"):
        api.predict(model=trained["class"], input=source, output=source, force=True)
    with pytest.raises(ArtifactError, match="does not classify"):
        api.predict(model=world.made["base"], input=source, output=out, force=True)
    save(new_classifier({}, "class", ["better"], base={**TINY, "vocab_size": 400}), tmp_path / "score")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(trained["class"] / "model" / file, tmp_path / "score" / file)
    settings = read_json(tmp_path / "score" / "config.json")
    write_json(tmp_path / "score" / "config.json", settings | {"problem_type": None})  # as reward models are
    with pytest.raises(ArtifactError, match="scores, it does not classify"):
        api.predict(model=tmp_path / "score", input=source, output=out, force=True)
    assert out.read_text() == "mine\n"
    said = tutelage(capsys, "predict", trained["class"], source, "-o", tmp_path / "new.jsonl", "--dry-run")
    assert said.code == 0 and "1 rows" in said.err and "too_long: right" in said.out and not (tmp_path / "new.jsonl").exists()
    said = tutelage(capsys, "generate", trained["class"], source, "--output", tmp_path / "new.jsonl")
    assert said.code == 2 and "a classifier is used with `tutelage predict`" in " ".join(said.err.split())


def test_help_lists_every_setting_and_imports_nothing_heavy(capsys: Capture) -> None:
    """A setting that only the source knows; a help page that takes seconds."""
    assert " predict " in tutelage(capsys, "--help").out
    page = tutelage(capsys, "predict", "--help", columns=200).out
    assert all(f" --{hyphens(key)} " in page or f" {key} " in page for key in Predict.model_fields)
    code = (
        "import sys; sys.argv = ['tutelage', 'predict', '--help']\nfrom tutelage.cli.main import main\n"
        "try: main()\nexcept SystemExit: print(sorted({'torch', 'fastapi', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.splitlines()[-1] == "[]"
