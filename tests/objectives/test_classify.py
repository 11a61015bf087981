"""Classification: the losses of transformers on the same batch, golden numbers, and invariances."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tutelage.config.train import Optimizer, Schedule
from tutelage.data.groups.examples import ExampleGroups, Labels, TextEncoder, labels_of, spans_of, tags
from tutelage.data.groups.groups import collate
from tutelage.data.groups.source import GroupSource
from tutelage.errors import ConfigError, DataError
from tutelage.models.hf.encoder import new_classifier
from tutelage.objectives import objective
from tutelage.records import Example, Span
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.train.optim import LearningRates, Optimizers
from tutelage.train.schedule import factor
from tutelage.train.step import StepConfig, gradients, train_step

pytest.importorskip("transformers")

GOLDEN = Path(__file__).parent.parent / "golden" / "classify.json"
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = [*"abcdefghijklmnopqrstuvwxyz.,"]
PIECES = ["##a", "##b", "##c", "##n", "##e"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "pad_token_id": 0,
         "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> TokenizerFolder:
    return TokenizerFolder.open(write_words(tmp_path_factory.mktemp("words")))


def write_words(folder: Path) -> Path:
    """A tokenizer of BERT's kind: letters, some of them pieces of words."""
    vocabulary = {token: i for i, token in enumerate([*MARKS, *WORDS, *PIECES])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(list(MARKS))
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))
    return folder


def examples(kind: str) -> list[Example]:
    """Texts of 3 to 11 words from arithmetic; what they are depends on their words."""
    out = []
    for i in range(12):
        text = " ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % 26] for j in range(3 + 2 * (i % 5)))
        about: dict[str, Any] = {"label": ("cold", "mild", "warm")[i * i % 3 if i % 2 else i % 3]}
        if kind == "many":
            about = {"labels": tuple(sorted({("cold", "mild", "warm")[k] for k in (i % 3, i * 2 % 3) if i % 4}))}
        if kind == "tag":
            about = {"spans": (Span(start=2, end=5, label="X"), Span(start=len(text) - 1, end=len(text), label="Y"))[: 1 + i % 2]}
        out.append(Example.make(text, source=f"t#{i}", **about))
    return out


def prompt_groups(words: TokenizerFolder, kind: str, **weights: float) -> ExampleGroups:
    made = examples(kind)
    found = labels_of(made, [])
    return ExampleGroups(made, TextEncoder(words, 64), Labels(found.task, found.names, weights))


def part_of(found: ExampleGroups, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(5)
    task: Any = "token" if found.labels.task == "tag" else "class"
    shape = {**SIZES, "vocab_size": len(MARKS) + len(WORDS) + len(PIECES)}
    return new_classifier(shape, task, found.labels.names, many=found.labels.task == "many", sep_id=3).to(dtype)


def named(kind: str, part: Any) -> tuple[Any, dict[str, Any]]:
    return (objective("tag"), {"token": part}) if kind == "tag" else (objective("classify"), {"class": part})


@pytest.mark.parametrize("kind", ["class", "many", "tag"])
@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_the_loss_and_its_gradient_are_those_of_transformers(words: TokenizerFolder, kind: str, layout: Any) -> None:
    """Against `hf(input_ids, labels)`, which means over texts (or supervised tokens): a place off by one, a text judged at
    another's last token, a sub-word piece that is supervised."""
    found = prompt_groups(words, kind)
    part = part_of(found)
    method, parts = named(kind, part)
    term = method(parts, collate([found[i] for i in range(len(found))], layout))["loss"]
    count = sum(found[i].completions[0].supervised for i in range(12)) if kind == "tag" else 12
    (term.sum / count).backward()
    got = {n: p.grad.clone() for n, p in part.named_parameters() if p.grad is not None}
    part.zero_grad()
    total: Any = 0
    for example, encoded in zip(found.examples, found.encoded, strict=True):
        ids = torch.tensor([encoded.ids])
        if kind == "class":
            answer = torch.tensor([found.number[str(example.label)]])
        elif kind == "many":
            answer = torch.tensor([[float(name in example.labels) for name in found.labels.names]])
        else:
            answer = torch.full_like(ids, -100)
            for (token, _, _), tag in zip(encoded.words, tags(encoded, example.spans), strict=True):
                answer[0, token] = found.number[tag]
        weight = len(encoded.words) if kind == "tag" else 1
        total = total + part.hf(input_ids=ids, labels=answer).loss * weight / count
    total.backward()
    assert (term.sum / count).item() == pytest.approx(total.item(), abs=1e-5)
    for name, p in part.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["class", "many", "tag"])
def test_accumulation_and_ranks_change_nothing(words: TokenizerFolder, kind: str) -> None:
    """A mean over each micro-batch: short batches would count as much as long ones."""
    found = prompt_groups(words, kind)
    seen = []
    for micro_tokens in (1000, 16):
        part = part_of(found)
        method, parts = named(kind, part)
        source = GroupSource(found, per_step=12, micro_tokens=micro_tokens, layout="packed", seed=0, unit="examples")
        result = gradients(StepConfig(parts, method), source.next(0))
        seen.append((result.loss, result.terms["_accuracy"], torch.cat([p.grad.flatten() for p in part.parameters()])))
    assert seen[0][0] == pytest.approx(seen[1][0], abs=1e-6) and seen[0][1] == pytest.approx(seen[1][1])
    torch.testing.assert_close(seen[0][2], seen[1][2], atol=1e-5, rtol=1e-4)


def test_weights_and_smoothing_by_hand(words: TokenizerFolder) -> None:
    """A weight that is read from another class; smoothing that takes from the wrong side."""
    found = prompt_groups(words, "class", cold=3.0)
    part = part_of(found)
    batch = collate([found[i] for i in range(12)], "packed")
    got = objective("classify", label_smoothing=0.1)({"class": part}, batch)["loss"].sum.item()
    with torch.no_grad():
        logs = part(batch)[batch.answers.last_position].log_softmax(1)  # type: ignore[union-attr]
    expected = 0.0
    for example, row in zip(found.examples, logs, strict=True):
        soft = torch.full((3,), 0.1 / 3)
        soft[found.number[str(example.label)]] += 0.9
        expected -= float((soft * row).sum()) * (3.0 if example.label == "cold" else 1.0)
    assert got == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["class", "many", "tag"])
def test_five_steps_are_the_golden_ones(words: TokenizerFolder, kind: str) -> None:
    """Any silent change of encoder, objective, division, optimizer or order of the data."""
    golden = json.loads(GOLDEN.read_text())[kind]
    for got, expected in zip(losses(words, kind), golden, strict=True):
        assert got == pytest.approx(expected, rel=1e-5)


def losses(words: TokenizerFolder, kind: str) -> list[float]:
    found = prompt_groups(words, kind)
    part = part_of(found, torch.float64)
    method, parts = named(kind, part)
    optimizers = Optimizers(parts, Optimizer(name="adamw"), LearningRates(1e-3, 1e-3, 1e-3))
    source = GroupSource(found, per_step=6, micro_tokens=40, layout="packed", seed=0, unit="examples")
    out = []
    for step in range(5):
        optimizers.set_factor(factor(Schedule(warmup=2), step, 5))
        out.append(train_step(StepConfig(parts, method), source.next(step), optimizers).loss)
    return out


def test_sub_word_pieces_are_not_supervised_and_spans_come_back(words: TokenizerFolder) -> None:
    """Words of several pieces that count several times, or whose span ends with its first piece."""
    text = "a be x, can"
    spans = (Span(start=2, end=4, label="X"), Span(start=8, end=11, label="Y"))
    encoded = TextEncoder(words, 64)(text)
    assert encoded is not None
    assert [text[s:e] for _, s, e in encoded.words] == ["a", "be", "x", ",", "can"] and len(encoded.ids) == 10
    found = tags(encoded, spans)
    assert found == ["O", "B-X", "O", "O", "B-Y"] and spans_of(encoded, found) == spans
    group = ExampleGroups([Example.make(text, source="t", spans=spans)], TextEncoder(words, 64),
                             Labels("tag", ("O", "B-X", "I-X", "B-Y", "I-Y")))[0]  # fmt: skip
    answers = collate([group], "packed").answers
    assert answers is not None and (answers.positions + 1).tolist() == [t for t, _, _ in encoded.words]
    assert answers.tokens["label"].tolist() == [0, 1, 0, 0, 3]


def test_a_kind_of_span_weighs_both_of_its_tags(words: TokenizerFolder) -> None:
    """A weight that is asked for by the tags' names and looked up by the kind's: accepted, and without effect."""
    text = "a be can x"
    made = [Example.make(text, source="t", spans=(Span(start=2, end=8, label="X"),))]
    labels = Labels("tag", ("O", "B-X", "I-X"), {"X": 5.0, "O": 0.5})
    answers = collate([ExampleGroups(made, TextEncoder(words, 64), labels)[0]], "packed").answers
    assert answers is not None and answers.tokens["label"].tolist() == [0, 1, 2, 0]
    assert answers.tokens["weight"].tolist() == [0.5, 5.0, 5.0, 0.5] and labels.kinds == ("O", "X")
    labels.check(["X", "O"])
    with pytest.raises(ConfigError, match="no such class") as error:
        labels.check(["B-X"])
    assert error.value.expected == "O, X"


@pytest.mark.parametrize("kind", ["class", "tag"])
def test_balanced_gives_every_class_the_same_share(words: TokenizerFolder, kind: str) -> None:
    """Kinds of spans weighed by how many spans they have, with O at 1: the rarest tags stay a small part of the loss."""
    plain = prompt_groups(words, kind)
    found = prompt_groups(words, kind, **plain.balanced())
    total: dict[str, float] = {}
    texts = 0.0
    for i in range(len(found)):
        answers = collate([found[i]], "packed").answers
        assert answers is not None
        one = answers.tokens if kind == "tag" else answers.per_completion
        for label, weight in zip(one["label"].tolist(), one["weight"].tolist(), strict=True):
            name = found.labels.names[int(label)].removeprefix("B-").removeprefix("I-")
            total[name], texts = total.get(name, 0.0) + weight, texts + 1
    assert set(total) == set(found.labels.kinds) and len(total) == 3
    assert list(total.values()) == pytest.approx([texts / 3] * 3)


def test_long_texts_are_cut_as_said_and_counted(words: TokenizerFolder) -> None:
    """A text whose end is lost without a word; a separator that is cut away with it; a pair of which one text goes whole."""
    text = "a b c d e f g h"
    for policy, expected in (("right", "a b c d"), ("left", "e f g h")):
        encoded = TextEncoder(words, 6, policy)(text)  # type: ignore[arg-type]
        assert encoded is not None and encoded.cut
        assert words.decode(encoded.ids).replace(" ", "") == f"[CLS]{expected}[SEP]".replace(" ", "")
    assert TextEncoder(words, 6, "drop")(text) is None
    pair = TextEncoder(words, 9)(text, "x y")
    assert pair is not None and words.decode(pair.ids).replace(" ", "") == "[CLS]abcd[SEP]xy[SEP]"
    made = [Example.make(t, source="t", label=label) for t, label in ((text, "p"), ("a", "q"))]
    found = ExampleGroups(made, TextEncoder(words, 6), Labels("class", ("p", "q")))
    assert found.report["too long, cut at the right"] == 1
    assert "[SEP]" not in [words.tokenizer.id_to_token(i) for i in TextEncoder(words, 64)("a [SEP] b").ids[1:-1]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("train", "held", "said"),
    [
        (["x", "x"], [], "single class"),
        (["x", "y"], ["z"], "validation part alone"),
        ([None, "y"], [], "no label"),
    ],
)
def test_labels_that_teach_nothing_are_errors(train: Sequence[str | None], held: Sequence[str], said: str) -> None:
    """A classifier of one class, which is always right; a class that no training text has, which is always wrong."""
    made, kept = (
        [Example.make(f"{p} {i}", source="t", label=x) for i, x in enumerate(rows)] for p, rows in (("a", train), ("b", held))
    )
    with pytest.raises(DataError, match=said):
        labels_of(made, kept)


def test_empty_texts_and_unknown_classes_are_errors(words: TokenizerFolder) -> None:
    """An index error deep inside a batch."""
    with pytest.raises(DataError, match="empty text"):
        TextEncoder(words, 64)("  ")
    with pytest.raises(ConfigError, match="no such class"):
        Labels("class", ("cold", "warm")).check(["wram"])


if __name__ == "__main__":  # to make the golden numbers anew after a change that is meant
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = TokenizerFolder.open(write_words(Path(name)))
        GOLDEN.write_text(json.dumps({kind: losses(folder, kind) for kind in ("class", "many", "tag")}, indent=1) + "\n")
