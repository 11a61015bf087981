"""Scorers: the same scores here and in `transformers`, whoever wrote the folder and however texts lie in a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.guarantees import tiny
from tests.models.shapes import CASES, SHAPE
from tests.models.test_hf import OTHERS, packed
from tutelage import log
from tutelage.errors import ArtifactError
from tutelage.models import families
from tutelage.models.config import DecoderConfig
from tutelage.models.init import build
from tutelage.models.interface import Batch
from tutelage.models.open import load
from tutelage.models.open_scorer import load_scorer
from tutelage.models.scorer import Scorer, build_scorer, score_answers
from tutelage.models.scorer_export import save_scorer
from tutelage.models.shard import is_shard, layers, shard, whole
from tutelage.train import distributed
from tutelage.train.optim import groups

TEXTS = [[5, 9, 40, 3, 77, 12, 8, 60, 31, 2], [33, 70, 6, 11], [95, 4, 17, 28, 65, 2]]
FAMILIES = sorted({c["model_type"] for c in CASES.values()})


def scorer_of(case: str, outputs: Any = 1) -> Scorer:
    """With norms and head moved away from their starting values, so that a wrong one shows."""
    made = build_scorer(build(DecoderConfig.from_hf(CASES[case]), 1), outputs, seed=3)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.2)
    return made.eval()


def theirs_of(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()


@torch.no_grad()
def padded_scores(theirs: Any, texts: list[list[int]]) -> torch.Tensor:
    """[n,K] by transformers, from one padded batch."""
    width, pad = max(map(len, texts)), theirs.config.get_text_config().pad_token_id
    ids = torch.tensor([t + [pad] * (width - len(t)) for t in texts])
    mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts])
    return theirs(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("case", [c for c in CASES if c in FAMILIES or c == "gemma3"])
def test_every_family_scores_as_in_transformers(case: str, tmp_path: Path) -> None:
    """A folder whose head, norm or padding is not read as it was trained gives other rewards elsewhere, and nobody notices."""
    ours = scorer_of(case, ["helpful", "harmless"])
    save_scorer(ours, tmp_path / "m")
    theirs = theirs_of(tmp_path / "m")
    assert type(theirs).__name__ == families.family(ours.config.model_type).scorer
    assert theirs.config.id2label == {0: "helpful", 1: "harmless"} and theirs.config.problem_type == "regression"
    expected = padded_scores(theirs, TEXTS)
    assert expected.abs().max() > 0.1
    np.testing.assert_allclose(score_answers(ours, TEXTS), expected.numpy(), atol=3e-5, rtol=1e-4)
    again = load_scorer(tmp_path / "m")
    assert again.outputs == ours.outputs
    np.testing.assert_array_equal(score_answers(again, TEXTS), score_answers(ours, TEXTS))


def test_the_table_covers_every_family() -> None:
    """A family without a class for scores would be trained for hours and then refused."""
    assert {c["model_type"] for c in CASES.values()} == set(families.names())
    assert all(families.family(name).scorer for name in families.names())


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_folders_of_transformers_load_here(case: str, outputs: int, tmp_path: Path) -> None:
    """Two outputs are the default there, and config.json then does not say how many: the head itself does."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(5)
    raw = {**CASES[case], "pad_token_id": 0}
    theirs = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(**raw, num_labels=outputs), attn_implementation="eager"
    ).eval()
    theirs.save_pretrained(tmp_path / "m")
    ours = load_scorer(tmp_path / "m")
    assert len(ours.outputs) == outputs
    np.testing.assert_allclose(score_answers(ours, TEXTS), padded_scores(theirs, TEXTS).numpy(), atol=2e-5, rtol=1e-4)


def test_heads_with_a_bias_go_both_ways(tmp_path: Path) -> None:
    """Judges of steps are token classifiers elsewhere, with a bias: left out, every step is judged wrongly by as much."""
    from transformers import AutoConfig, AutoModelForTokenClassification

    torch.manual_seed(5)
    theirs = AutoModelForTokenClassification.from_config(AutoConfig.for_model(**CASES["qwen3"])).eval()
    with torch.no_grad():
        theirs.score.bias += torch.tensor([0.5, -1.0])
    theirs.save_pretrained(tmp_path / "m")
    ours = load_scorer(tmp_path / "m")
    with torch.no_grad():
        got, expected = ours(Batch.of(TEXTS[:1])), theirs(input_ids=torch.tensor(TEXTS[:1])).logits[0]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    save_scorer(ours, tmp_path / "again")
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=torch.tensor(TEXTS[:1])).logits[0], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt_neox", "opt", "bloom"])
def test_other_families_through_transformers(family: str, tmp_path: Path) -> None:
    """The language head has to go and the layers have to stay the model's own; packed texts must not see one another."""
    tiny_lm(OTHERS[family], tmp_path / "lm")
    lm = load(tmp_path / "lm")
    body = {n for n, _ in lm.named_parameters()}  # type: ignore[attr-defined]
    ours = build_scorer(lm, 1, seed=3).eval()
    assert "score.weight" in dict(ours.named_parameters())
    assert {n for n, _ in ours.named_parameters()} - {"score.weight"} <= body
    with torch.no_grad():
        ours.score.weight.mul_(30)
    save_scorer(ours, tmp_path / "m")
    expected = padded_scores(theirs_of(tmp_path / "m"), TEXTS)
    np.testing.assert_allclose(score_answers(ours, TEXTS), expected.numpy(), atol=3e-5, rtol=1e-4)
    np.testing.assert_allclose(score_answers(load_scorer(tmp_path / "m"), TEXTS), expected.numpy(), atol=3e-5, rtol=1e-4)
    with torch.no_grad():
        assert ours(packed()).shape == (40, 1)


def test_a_family_without_a_score_head_is_refused_by_name(tmp_path: Path) -> None:
    """Cohere has no such class: a head of our own making would open nowhere."""
    tiny_lm(OTHERS["cohere"], tmp_path / "lm")
    with pytest.raises(ArtifactError, match="cohere"):
        build_scorer(load(tmp_path / "lm"))


def tiny_lm(raw: dict[str, Any], folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw, pad_token_id=0)).save_pretrained(folder)


def test_a_reward_model_is_no_language_model_nor_the_other_way(tmp_path: Path) -> None:
    """Served as a language model, it would fail on a tensor's name or, in transformers, write with a random head."""
    save_scorer(scorer_of("qwen3"), tmp_path / "reward")
    with pytest.raises(ArtifactError, match="gives scores"):
        load(tmp_path / "reward")
    tiny.save_model(build(DecoderConfig.from_hf(CASES["qwen3"]), 1), tmp_path / "lm")
    with pytest.raises(ArtifactError, match="no score head"):
        load_scorer(tmp_path / "lm")


def test_a_head_that_is_missing_is_named(tmp_path: Path) -> None:
    """A checkpoint whose head was lost would score with random weights."""
    save_scorer(scorer_of("llama"), tmp_path / "m")
    held = load_file(tmp_path / "m" / "model.safetensors")
    del held["score.weight"]
    save_file(held, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"score\.weight"):
        load_scorer(tmp_path / "m")


@pytest.mark.parametrize("budget", [12, 50, 4096])
@pytest.mark.parametrize("case", ["qwen3", "mistral", "phi3-longrope"])
def test_shared_beginnings_change_no_score(case: str, budget: int) -> None:
    """A prompt read once for its answers, texts in any order, one that is another's beginning, one that is there twice."""
    ours = scorer_of(case)
    prompt, other = list(range(3, 33)), list(range(40, 60))
    texts = [
        [*prompt, 7, 8],
        [*other, 1],
        prompt,
        [*prompt, 9, 2, 4],
        [*prompt, 7, 8],
        [5, 6],
        [*other, 88, 3],
        [*prompt[:20], 90],
    ]
    expected = np.concatenate([score_answers(ours, [t]) for t in texts])
    with torch.no_grad():
        plain = np.concatenate([ours(Batch.of([t]))[-1:].numpy() for t in texts])
    np.testing.assert_allclose(expected, plain, atol=1e-6)
    np.testing.assert_allclose(score_answers(ours, texts, budget), plain, atol=1e-5, rtol=1e-4)
    assert score_answers(ours, []).shape == (0, 1)


def test_shared_beginnings_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight samples of one prompt cost a prompt and eight answers, not eight prompts."""
    ours, read = scorer_of("qwen3"), []
    forward = ours.backbone.forward
    monkeypatch.setattr(ours.backbone, "forward", lambda batch: read.append(batch.ids.numel()) or forward(batch))
    score_answers(ours, [[*list(range(50)), 60 + i] for i in range(8)])
    assert read == [58]


def test_a_new_head_is_small_centred_and_reproducible() -> None:
    """Scores that start large are noise which the first steps have to unlearn; a seed has to give them again."""
    one, two = (build_scorer(build(DecoderConfig.from_hf(CASES["qwen3"]), 1), 4, seed=s).score.weight for s in (0, 1))
    again = build_scorer(build(DecoderConfig.from_hf(CASES["qwen3"]), 1), 4, seed=0).score.weight
    assert torch.equal(one, again) and not torch.equal(one, two)
    assert one.mean(1).abs().max() < 1e-7
    made = build_scorer(build(DecoderConfig.from_hf(CASES["qwen3"]), 1))
    assert np.abs(score_answers(made, TEXTS)).max() < 3 / 32**0.5
    assert "lm_head.weight" not in dict(made.named_parameters())


def test_a_head_is_no_matrix_to_muon() -> None:
    """An orthogonalised update of one row is a step of fixed length, whatever the gradient says."""
    made = build_scorer(build(DecoderConfig.from_hf(CASES["qwen3"]), 1))
    assert [n for n, _ in groups({"reward": made})["embedding"]] == ["reward.model.embed_tokens.weight", "reward.score.weight"]


def test_scores_are_float32_where_the_layers_are_not(tmp_path: Path) -> None:
    """Rewards rounded to bfloat16 tie: 8 bits tell 3.01 from 3.02 no more."""
    save_scorer(scorer_of("qwen3"), tmp_path / "m")
    half = load_scorer(tmp_path / "m", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert half(Batch.of(TEXTS)).dtype == torch.float32
        assert scorer_of("qwen3")(Batch.of(TEXTS)).dtype == torch.float32


@pytest.mark.parametrize(
    ("own", "pad", "expected"), [("</s>", None, 5), ("</s>", 2, 5), ("</s>", 1, 1), ("<|pad|>", 1, 5), (None, 7, 5)]
)
def test_padding_never_ends_a_text(own: str | None, pad: int | None, expected: int, tmp_path: Path) -> None:
    """transformers reads the score at the last token that is not padding: where padding is the end token, one token early."""
    words = tmp_path / "words"
    words.mkdir()
    added = [{"id": i, "content": t, "special": True} for i, t in ((1, "<s>"), (2, "</s>"), (4, "<|x|>"), (5, "<|pad|>"))]
    (words / "tokenizer.json").write_text(json.dumps({"added_tokens": added}), encoding="utf-8")
    (words / "tokenizer_config.json").write_text(json.dumps({"pad_token": own, "eos_token": "</s>"}), encoding="utf-8")
    config = DecoderConfig.from_hf({"model_type": "llama", **SHAPE, "pad_token_id": pad})
    ours = build_scorer(build(config, 1))
    save_scorer(ours, tmp_path / "m", words, stop_ids=[4])
    theirs = theirs_of(tmp_path / "m")
    assert theirs.config.pad_token_id == expected
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["pad_token"] == ("<|pad|>" if expected == 5 else "<s>")
    ending = [[8, 9, 2], [8, 9, 10, 4]]
    np.testing.assert_allclose(score_answers(ours, ending), padded_scores(theirs, ending).numpy(), atol=1e-5)


def test_a_sharded_folder_is_whole(tmp_path: Path) -> None:
    """A head in the last of several files is still found."""
    ours = scorer_of("phi3")
    save_scorer(ours, tmp_path / "m", shard_bytes=20_000)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    np.testing.assert_array_equal(score_answers(load_scorer(tmp_path / "m"), TEXTS), score_answers(ours, TEXTS))


def sharded(folder: str) -> None:
    """Scores, gradients and the folder of a scorer on two ranks: the decoder under it is not among its modules."""
    distributed.start("cpu")
    try:
        ours = load_scorer(Path(folder) / "m")
        shard(ours, torch.device("cpu"))
        assert len(layers(ours)) == ours.config.num_hidden_layers and all(is_shard(p) for p in ours.parameters())
        scores = ours(Batch.of(TEXTS))
        scores.square().sum().backward()
        save_scorer(ours, Path(folder) / "again")
        found = {"scores": scores.detach(), **{n: whole(p.grad) / 2 for n, p in ours.named_parameters()}}
        if log.rank() == 0:
            save_file({n: x.contiguous() for n, x in found.items()}, Path(folder) / "found.safetensors")
    finally:
        distributed.stop()


def test_a_scorer_on_two_ranks_is_one(tmp_path: Path) -> None:
    """Weights that only rank 0 trains, gradients counted twice, or a folder with a rank's own rows."""
    one = scorer_of("llama", 2)
    save_scorer(one, tmp_path / "m")
    pair = [tiny.Process({"call": sharded, "args": [str(tmp_path)], "env": env, "die": {}}) for env in tiny.ranks(2)]
    assert [p.wait() for p in pair] == [0, 0], pair[0].said + pair[1].said
    scores = one(Batch.of(TEXTS))
    scores.square().sum().backward()
    found = load_file(tmp_path / "found.safetensors")
    torch.testing.assert_close(found["scores"], scores.detach(), atol=1e-5, rtol=1e-4)
    for name, p in one.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-4, rtol=1e-3, msg=name)
    again = load_scorer(tmp_path / "again")
    assert all(torch.equal(p, dict(again.named_parameters())[n]) for n, p in one.named_parameters())
