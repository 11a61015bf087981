"""Virtual tokens and low-rank changes under score heads and in encoder-decoders: the folders of `peft`, both ways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.models.shapes import SHAPE, reference
from tutelage.artifacts import is_scored
from tutelage.config.adapter import Adapter
from tutelage.engine import Engine, Sampling
from tutelage.engine.limits import ContextOverflow
from tutelage.errors import ArtifactError, ConfigError
from tutelage.models.adapters.attach import adapter_disabled, attach_adapter, attach_to_scorer, trainable
from tutelage.models.adapters.folder import load_adapter, save_adapter
from tutelage.models.adapters.score_heads import save_scored
from tutelage.models.hf.encoder import PROBLEM, ClassScorer, load_classifier
from tutelage.models.interface import Batch
from tutelage.models.open import load
from tutelage.models.open_scorer import load_scored, load_scorer
from tutelage.models.scorer import Scorer, build_scorer, score_answers

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
         "max_position_embeddings": 64}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", **SHAPE, "head_dim": 16},  # ours
    "gpt2": {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64,
             "pad_token_id": 0},
    "stablelm": {"model_type": "stablelm", **SMALL, "num_key_value_heads": 2, "pad_token_id": 0},  # of `transformers`
    "bert": {"model_type": "bert", **SMALL},
    "roberta": {"model_type": "roberta", **SMALL, "pad_token_id": 1},
    "tagger": {"model_type": "bert", **SMALL},
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {"prompt": {"kind": "prompt", "tokens": 5}, "prefix": {"kind": "prefix", "tokens": 5}}
PAIRS: dict[str, dict[str, Any]] = {
    "t5": {"model_type": "t5", "vocab_size": 97, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3,
           "num_heads": 2, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    "bart": {"model_type": "bart", "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
             "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
             "decoder_start_token_id": 2, "forced_eos_token_id": None},
}  # fmt: skip
WIDE = {"tagger": ["query", "value", "dense"]}  # `all-linear` would be its head, too
OUTPUTS = ("first", "second", "third")
TEXTS = [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 20, 31)]


def made(raw: dict[str, Any], kind: str) -> Any:
    """A model of `transformers` with random weights."""
    import transformers

    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(**raw)
    model = getattr(transformers, kind).from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, or an encoder without a head."""
    folder: Path = tmp_path_factory.mktemp(request.param) / request.param
    encoder = BASES[request.param]["model_type"] in ("bert", "roberta")
    (made(BASES[request.param], "AutoModel") if encoder else reference(BASES[request.param])).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def start(base: Path) -> Scorer | ClassScorer:
    """The base with new heads."""
    if base.name in ("bert", "roberta", "tagger"):
        torch.manual_seed(3)
        return load_classifier(base, "token" if base.name == "tagger" else "class", OUTPUTS)[0]
    return build_scorer(load(base), OUTPUTS, 1, PROBLEM[False]).eval()


@torch.no_grad()
def disturb(part: nn.Module) -> None:
    g = torch.Generator().manual_seed(5)
    for _, p in trainable(part):
        p.add_(torch.randn(p.shape, generator=g) * 0.2)


@torch.no_grad()
def ours(part: Any) -> list[Tensor]:
    """The scores of each text, or of each of its tokens, all texts in one packed batch."""
    batch = Batch.of_groups([(ids, []) for ids in TEXTS])
    scores = part(replace(batch, attention="bidirectional" if isinstance(part, ClassScorer) else "causal"))
    each = list(scores.split([len(ids) for ids in TEXTS]))
    return each if getattr(part, "task", "class") == "token" else [x[-1] for x in each]


def theirs(base: Path) -> Any:
    """The classification model of the base, for `peft` to put an adapter on."""
    import transformers

    kind = "AutoModelForTokenClassification" if base.name == "tagger" else "AutoModelForSequenceClassification"
    return getattr(transformers, kind).from_pretrained(base, num_labels=len(OUTPUTS), dtype=torch.float32)


@torch.no_grad()
def their_scores(model: Any, base: Path) -> list[Tensor]:
    out = []
    for ids in TEXTS:
        one = torch.tensor([ids])
        logits = model(input_ids=one, attention_mask=torch.ones_like(one)).logits[0]
        out.append(logits[-len(ids) :] if base.name == "tagger" else logits)
    return out


def same(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_opens_what_we_write(base: Path, kind: str, tmp_path: Path) -> None:
    """A folder that only we can read; heads that are lost beside virtual tokens, a text that sees another's."""
    part = attach_to_scorer(start(base), Adapter(**KINDS[kind]), 0)
    disturb(part)
    save_scored(part, tmp_path / "adapter", base=base, tokenizer=base)
    expected = ours(part)
    with adapter_disabled(part):
        assert max(float((a - b).abs().max()) for a, b in zip(ours(part), expected, strict=True)) > 0.01
    same(expected, their_scores(peft.PeftModel.from_pretrained(theirs(base), tmp_path / "adapter").eval(), base))
    again = load_scored(tmp_path / "adapter")
    same(expected, ours(again))
    names = again.labels if isinstance(again, ClassScorer) else again.outputs
    assert names == OUTPUTS and is_scored(tmp_path / "adapter")


@pytest.mark.parametrize("kind", [*KINDS, "lora"])
def test_we_open_what_peft_writes(base: Path, kind: str, tmp_path: Path) -> None:
    """An adapter of `peft` under a score head that says something else here, or that can't be trained on and saved again."""
    task = {"task_type": "TOKEN_CLS" if base.name == "tagger" else "SEQ_CLS"}
    tokens = {"num_virtual_tokens": 5}
    configs = {"prompt": (peft.PromptTuningConfig, tokens), "prefix": (peft.PrefixTuningConfig, tokens),
               "lora": (peft.LoraConfig, {"target_modules": WIDE.get(base.name, "all-linear"), "r": 4})}  # fmt: skip
    config, how = configs[kind]
    more = {"modules_to_save": ["pooler"]} if base.name == "bert" and kind != "lora" else {}
    if base.name == "qwen3" and kind == "prefix":  # heads are wider than the hidden width divided by their number
        more = {"token_dim": 32, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = peft.get_peft_model(theirs(base), config(**task, **how, **more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(tmp_path / "theirs")
    part = load_scored(tmp_path / "theirs")
    same(ours(part), their_scores(model, base))
    if kind == "lora":  # it has become part of the weights
        assert not any(".change." in name for name, _ in part.named_parameters())
        return
    assert {name for name, p in part.named_parameters() if p.requires_grad} > {"virtual.values"}
    save_scored(part, tmp_path / "again", base=base, tokenizer=base)
    same(ours(part), their_scores(peft.PeftModel.from_pretrained(theirs(base), tmp_path / "again").eval(), base))


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "stablelm"])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_scored_behind_virtual_tokens(name: str, kind: str, tmp_path: Path) -> None:
    """A reward model that is asked in packs, where beginnings are shared, and by folder as the stages do."""
    reference(BASES[name]).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    part = attach_to_scorer(build_scorer(load(tmp_path / "base"), 1), Adapter(**KINDS[kind]), 0)
    disturb(part)
    save_scored(part, tmp_path / "adapter", base=tmp_path / "base", tokenizer=tmp_path / "base")
    texts = [[*TEXTS[1], *tail] for tail in ([5, 6], [7], [8, 9, 10])]
    alone = np.concatenate([score_answers(part, [text]) for text in texts])
    np.testing.assert_allclose(score_answers(load_scorer(tmp_path / "adapter"), texts), alone, atol=2e-5)


def test_a_scored_adapter_writes_no_text_and_a_language_models_has_no_score(tmp_path: Path) -> None:
    """A reward model that is chatted with, or an adapter of a language model that is asked for rewards: both said by name."""
    base = tmp_path / "base"
    reference(BASES["qwen3"]).save_pretrained(base)
    (base / "tokenizer.json").write_text("{}")
    save_scored(attach_to_scorer(start(base), Adapter(kind="prompt"), 0), tmp_path / "scored", base=base, tokenizer=base)
    save_adapter(attach_adapter(load(base), Adapter(kind="prompt"), 0), tmp_path / "writes", base=base)
    with pytest.raises(ArtifactError, match="writes no text") as refused:
        load(tmp_path / "scored")
    assert refused.value.field == "task_type"
    with pytest.raises(ArtifactError, match="of a language model: it has no score head"):
        load_scorer(tmp_path / "writes")
    with pytest.raises(ConfigError, match="one adapter at a time"):
        attach_adapter(load(tmp_path / "writes"), Adapter(kind="lora"), 0)


def test_heads_of_another_base_are_refused(tmp_path: Path) -> None:
    """Heads of another shape, or none at all, which a model would answer with as if nothing had happened."""
    base = tmp_path / "base"
    reference(BASES["qwen3"]).save_pretrained(base)
    (base / "tokenizer.json").write_text("{}")
    save_scored(attach_to_scorer(start(base), Adapter(kind="prompt"), 0), tmp_path / "scored", base=base, tokenizer=base)
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "scored" / "adapter_model.safetensors"
    held = load_file(weights)
    save_file({**held, "base_model.score.weight": torch.zeros(3, 7)}, weights)
    with pytest.raises(ArtifactError, match="heads are not those of this base"):
        load_scored(tmp_path / "scored")
    save_file({"prompt_embeddings": held["prompt_embeddings"]}, weights)
    with pytest.raises(ArtifactError, match="has no score head"):
        load_scored(tmp_path / "scored")


def test_an_encoder_without_a_place_for_a_prefix_says_so(tmp_path: Path) -> None:
    """An error from inside `transformers`, at the first step."""
    made({"model_type": "distilbert", "vocab_size": 97, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48}, "AutoModel"
         ).save_pretrained(tmp_path / "base")  # fmt: skip
    part = load_classifier(tmp_path / "base", "class", OUTPUTS)[0]
    with pytest.raises(ConfigError, match="read no keys and values before a text"):
        attach_to_scorer(part, Adapter(kind="prefix"), 0)
    assert torch.isfinite(torch.stack(ours(attach_to_scorer(part, Adapter(kind="prompt"), 0)))).all()


def test_virtual_tokens_take_room_from_the_texts(tmp_path: Path) -> None:
    """Positions past the end of a learned table, at the longest text."""
    from tutelage.models.adapters.virtual_tokens import max_text_tokens

    reference(BASES["gpt2"]).save_pretrained(tmp_path)
    model = attach_adapter(load(tmp_path), Adapter(kind="prompt", tokens=5), 0)
    assert max_text_tokens(model) == 59
    assert torch.isfinite(model.logits(Batch.of([list(range(3, 62))]))).all()
    engine = Engine(model, None)
    assert engine.context_length == 59
    assert len(engine.generate([list(range(3, 40))], Sampling(max_tokens=22, temperature=0.0, stop_ids=()))[0].ids) == 22
    with pytest.raises(ContextOverflow):
        engine.generate([list(range(3, 40))], Sampling(max_tokens=23))
    with pytest.raises(ConfigError, match="virtual tokens fill the context"):
        attach_adapter(load(tmp_path), Adapter(kind="prompt", tokens=64), 0)


# Encoder-decoders


SOURCES, TARGETS = TEXTS[:2], [TEXTS[1][:6], TEXTS[2][:6]]


@torch.no_grad()
def written(model: Any) -> Tensor:
    return model.read(SOURCES, [[*model.start, *t] for t in TARGETS])  # type: ignore[no-any-return]


@torch.no_grad()
def their_logits(model: Any, start_ids: tuple[int, ...]) -> Tensor:
    out = []
    for source, target in zip(SOURCES, TARGETS, strict=True):
        one = torch.tensor([source])
        ids = torch.tensor([[*start_ids, *target]])
        out.append(model(input_ids=one, attention_mask=torch.ones_like(one), decoder_input_ids=ids).logits[0])
    return torch.stack(out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PAIRS)
def test_a_translators_virtual_tokens_are_those_of_peft(name: str, kind: str, tmp_path: Path) -> None:
    """A prompt that the encoder never reads, a prefix of the encoder where the decoder is meant; answers made
    step by step that are others than those that were trained."""
    from transformers import AutoModelForSeq2SeqLM

    base = tmp_path / "base"
    made(PAIRS[name], "AutoModelForSeq2SeqLM").save_pretrained(base)
    model: Any = attach_adapter(load(base), Adapter(**KINDS[kind]), 0)
    before = written(load(base))
    disturb(model)
    expected = written(model)
    assert float((expected - before).abs().max()) > 0.01
    save_adapter(model, tmp_path / "adapter", base=base)
    opened = peft.PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(their_logits(opened, model.start), expected, atol=2e-4, rtol=1e-3)
    again: Any = load(tmp_path / "adapter")
    torch.testing.assert_close(written(again), expected)
    engine = Engine(again, None, slots=4, max_length=40)
    assert type(engine.runner).__name__ == "HfRunner", "every step reads everything again"
    how = Sampling(max_tokens=8, temperature=0.0, stop_ids=())
    for source, found in zip(SOURCES, engine.generate(SOURCES, how), strict=True):
        ids = list(again.start)
        for token in found.ids:
            with torch.no_grad():
                logits = again.read([source], [ids])[0, -1]
            assert float(logits.max() - logits[token]) < 1e-3
            ids.append(token)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("kind", "modules"), [("prompt", 1), ("prompt", 2), ("prefix", 2)])
def test_we_open_a_translators_adapter_of_peft(kind: str, name: str, modules: int, tmp_path: Path) -> None:
    """`peft` keeps twice as many virtual tokens of an encoder-decoder as it reads, and of a prefix it gives layers those of
    others. (With one half counted it has the prefix and the source in one cache.)"""
    from transformers import AutoModelForSeq2SeqLM

    base, raw = tmp_path / "base", PAIRS[name]
    made(raw, "AutoModelForSeq2SeqLM").save_pretrained(base)
    how: dict[str, Any] = {"num_virtual_tokens": 4, "num_transformer_submodules": modules, "task_type": "SEQ_2_SEQ_LM"}
    heads = {"num_attention_heads": 2, "token_dim": 2 * raw.get("d_kv", 16), "num_layers": raw.get("num_decoder_layers", 2)}
    config = peft.PromptTuningConfig(**how) if kind == "prompt" else peft.PrefixTuningConfig(**how, **heads)
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(base), config).eval()
    model.save_pretrained(tmp_path / "theirs")
    ours_: Any = load_adapter(tmp_path / "theirs", load(base))
    assert len(ours_.virtual) == 4
    torch.testing.assert_close(written(ours_), their_logits(model, ours_.start), atol=2e-4, rtol=1e-3)
    assert json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["num_transformer_submodules"] == modules
