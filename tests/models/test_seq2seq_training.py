"""Encoder-decoders in the loop: the loss of transformers on the same pairs, invariances, and folders that others open."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.pipeline import world  # noqa: F401 (a fixture)
from tutelage.data.groups.groups import Completion, PromptGroup, collate
from tutelage.data.groups.source import GroupSource
from tutelage.data.groups.translations import Marks, PairedTexts, PairEncoder
from tutelage.engine import Engine, Sampling
from tutelage.errors import ArtifactError, ConfigError, DataError
from tutelage.files import read_json
from tutelage.models.export import save
from tutelage.models.hf.seq2seq import Seq2Seq, new_seq2seq
from tutelage.models.interface import Batch
from tutelage.models.open import load
from tutelage.objectives import objective
from tutelage.records import Conversation, Message
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.train.step import StepConfig, gradients

transformers = pytest.importorskip("transformers")

KINDS: dict[str, dict[str, Any]] = {
    "t5": {"model_type": "t5", "vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
           "dropout_rate": 0.0, "decoder_start_token_id": 0},
    "bart": {"model_type": "bart", "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
             "max_position_embeddings": 64, "forced_eos_token_id": None},
}  # fmt: skip


class Made(Sequence[PromptGroup]):
    """Pairs of unequal lengths."""

    digest = "made"

    def __init__(self, start: int, end: int) -> None:
        g = torch.Generator().manual_seed(2)
        texts = [[torch.randint(5, 97, (n,), generator=g).numpy() for n in (3 + 2 * i, 9 - i)] for i in range(6)]
        self.prompt_groups = [
            PromptGroup(
                f"p{i}", source, (Completion(np.array([start, *target, end]), np.array([0, *[1] * (len(target) + 1)], np.uint8)),)
            )
            for i, (source, target) in enumerate(texts)
        ]

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: Any) -> Any:
        return self.prompt_groups[i]

    def sizes(self, layout: Any) -> np.ndarray:
        return np.array([f.size(layout) for f in self.prompt_groups])


def built(kind: str) -> tuple[Seq2Seq, Made]:
    torch.manual_seed(1)
    model = new_seq2seq(KINDS[kind])
    return model, Made(model.start[0], model.ends[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradient_are_those_of_transformers(kind: str) -> None:
    """Targets that are one place off, a start token that is learnt, sources that are read with their padding."""
    model, made = built(kind)
    batch = collate(made.prompt_groups, "pairs")
    term = objective("next_token")({"policy": model}, batch)["loss"]
    count = sum(f.completions[0].supervised for f in made.prompt_groups)
    (term.sum / count).backward()
    got = {n: p.grad.clone() for n, p in model.hf.named_parameters() if p.grad is not None}
    model.zero_grad()
    total: Any = 0
    for group in made.prompt_groups:
        labels = torch.tensor([group.completions[0].ids[1:].tolist()])
        found = model.hf(input_ids=torch.tensor([group.prompt.tolist()]), labels=labels)
        total = total + found.loss * labels.numel() / count
    total.backward()
    assert (term.sum / count).item() == pytest.approx(total.item(), abs=1e-5)
    for name, p in model.hf.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulation_changes_nothing() -> None:
    """A mean over each micro-batch, or targets whose company changes them."""
    seen = []
    for micro_tokens in (1000, 20):
        model, made = built("t5")
        source = GroupSource(made, per_step=6, micro_tokens=micro_tokens, layout="pairs", seed=0)
        result = gradients(StepConfig({"policy": model}, objective("next_token")), source.next(0))
        seen.append((result.loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert seen[0][0] == pytest.approx(seen[1][0], abs=1e-6)
    torch.testing.assert_close(seen[0][1], seen[1][1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_opens_in_transformers_and_generates_alike(kind: str, tmp_path: Path) -> None:
    """A folder without its decoder's start token; weights of which the tied ones are lost."""
    model, made = built(kind)
    save(model, tmp_path / "m")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "m").eval()
    again = load(tmp_path / "m")
    assert isinstance(again, Seq2Seq)
    batch = collate(made.prompt_groups[:2], "pairs")
    with torch.no_grad():
        torch.testing.assert_close(again(batch).hidden, model(batch).hidden, atol=1e-6, rtol=1e-5)
        source = torch.tensor([made.prompt_groups[0].prompt.tolist()])
        expected = theirs.generate(source, do_sample=False, num_beams=1, max_new_tokens=6, min_new_tokens=6)
    got = Engine(again, None, max_length=16).generate(
        [made.prompt_groups[0].prompt.tolist()], Sampling(max_tokens=6, min_tokens=6, temperature=0.0)
    )
    assert list(got[0].ids) == expected[0, 1:].tolist()


def test_rows_of_text_are_refused() -> None:
    """A decoder's rows, whose prompts would be learnt as targets."""
    model, _ = built("t5")
    with pytest.raises(ConfigError, match="rows of plain text"):
        model(Batch.of([[5, 6, 7]]))
    with pytest.raises(ConfigError, match="not an encoder-decoder"):
        new_seq2seq({"model_type": "gpt2"})


def test_keys_that_a_family_does_not_have_are_refused() -> None:
    """`d_modle`, which is taken and never read."""
    with pytest.raises(ConfigError, match="t5 has no such key") as error:
        new_seq2seq({"d_modle": 32}, KINDS["t5"])
    assert error.value.fix == "did you mean `d_model`?"
    made = new_seq2seq({"num_layers": 1}, {k: v for k, v in KINDS["t5"].items() if k != "model_type"}).hf.config
    assert (made.d_model, made.num_layers, made.decoder_start_token_id) == (32, 1, 0)


def write_words(folder: Path) -> TokenizerFolder:
    """Letters; a text ends with </s>, as T5 has it."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "<pad>"}')
    return TokenizerFolder.open(folder)


def talk(*turns: str) -> Conversation:
    roles = ("user", "assistant") * 2
    return Conversation.make(
        [Message(role=r, content=t) for r, t in zip(roles, turns, strict=False)], source="t", style="completion"
    )


def test_texts_become_pairs_as_they_are_served(tmp_path: Path) -> None:
    """A source without its end, a target that never ends or that learns the decoder's own start; a cut that nobody counts."""
    words = write_words(tmp_path)
    encode = PairEncoder(words, Marks((0,), (1,)))
    found = PairedTexts([talk("a b c", "d e"), talk("a b c d e f", "g"), talk("a", "a b c d e f g")], encode, 5, 6)
    assert [f.prompt.tolist() for f in found.prompt_groups] == [[3, 4, 5, 1], [3, 4, 5, 6, 1]]
    assert [f.completions[0].ids.tolist() for f in found.prompt_groups] == [[0, 6, 7, 1], [0, 9, 1]]
    assert found.prompt_groups[0].completions[0].mask.tolist() == [0, 1, 1, 1]  # type: ignore[union-attr]
    assert found.report["source too long, cut at the right"] == 1 and found.report["target too long, left out"] == 1
    dropped = PairedTexts([talk("a b c", "d e"), talk("a b c d e f", "g")], encode, 5, 6, cut=False)
    assert len(dropped) == 1 and dropped.report["source too long, left out"] == 1
    forced = PairEncoder(words, Marks((0, 10), (1,))).target("d")
    assert forced == ([0, 10, 6, 1], [0, 0, 1, 1])
    with pytest.raises(DataError, match="one source and one target"):
        PairedTexts([talk("a", "b", "c", "d")], encode, 5, 6)


def test_a_translator_learns(tmp_path: Path, world: Any, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """The stage as a user meets it: from pairs to a folder, a share that is right, and errors in its own words."""
    from tutelage import api

    pairs = api.data(runs=tmp_path, kind="conversations", sources=["skill:upper?count=40&held_out=10"], dedup="exact")
    tiny = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    how: dict[str, Any] = {"data": pairs, "runs": tmp_path, "batch": 16, "steps": 12, "max_target": 16, "threads": 1}
    made = api.translate(tokenizer=world.made["words"], architecture=tiny, **how)
    first, last = ([x for x in (made.path / "metrics.jsonl").read_text().splitlines() if '"loss"' in x][i] for i in (0, -1))
    loss = [float(row.split('"loss": ')[1].split(",")[0]) for row in (first, last)]
    assert loss[1] < loss[0] - 1 and 0 <= made.facts["right"] <= 1
    rows = (made.path / "scores" / "held_out.jsonl").read_text().splitlines()
    assert len(rows) == 10 and "to the letter" in capsys.readouterr().err
    more = api.translate(model=made, **{**how, "steps": 2})
    assert more.facts["steps"] == 2
    worn = api.translate(model=made, adapter={"kind": "lora", "rank": 4}, **{**how, "steps": 8})
    assert (worn.path / "adapter" / "adapter_config.json").is_file() and not (worn.path / "model").exists()
    assert read_json(worn.path / "adapter" / "adapter_config.json")["task_type"] == "SEQ_2_SEQ_LM"
    on = api.translate(model=worn, adapter={"kind": "lora", "rank": 4}, **{**how, "steps": 2})
    whole = api.merge(adapter=on, runs=tmp_path)
    assert 0 <= api.translate(model=whole, **{**how, "steps": 1}).facts["similarity"] <= 1
    with pytest.raises(ConfigError, match="no trained base"):
        api.translate(tokenizer=world.made["words"], architecture=tiny, adapter={"kind": "lora"}, **how)
    for kind in ("prompt", "prefix"):
        behind = api.translate(model=made, adapter={"kind": kind, "tokens": 4}, **{**how, "steps": 8})
        assert 0 <= behind.facts["similarity"] <= 1 and (behind.path / "adapter" / "adapter_config.json").is_file()
        with pytest.raises(ArtifactError, match="can't be merged"):
            api.merge(adapter=behind, runs=tmp_path)
    with pytest.raises(ConfigError, match="starts from a model"):
        api.translate(**how)
    with pytest.raises(ArtifactError, match="not an encoder-decoder"):
        api.translate(model=world.made["base"], **how)
