"""Encoder-decoder models in our engine: the answers of `generate`, sources of any length together, texts in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine import small
from tests.engine.watched import Watch
from tutelage.engine import Engine, Sampling
from tutelage.engine.hf_runner import HfRunner
from tutelage.engine.limits import ContextOverflow
from tutelage.errors import ArtifactError, ConfigError, DataError
from tutelage.models.hf.seq2seq import Seq2Seq
from tutelage.models.interface import Batch
from tutelage.models.open import load

T5: dict[str, Any] = {
    "model_type": "t5", "vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
BART: dict[str, Any] = {
    "model_type": "bart", "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "forced_eos_token_id": None,
}  # fmt: skip
CASES = {
    "t5": T5,
    "t5-untied": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "initializer_factor": 0.3},
    "bart": BART,
    "bart-forced-bos": BART,
}
GREEDY = Sampling(12, temperature=0)


def reference(raw: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    torch.manual_seed(7)
    model: Any = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**raw), attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
        # Or random weights say one word for ever.
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Seq2Seq]:
    theirs, folder = reference(CASES[request.param]), tmp_path_factory.mktemp("model")
    if "forced" in request.param:
        theirs.generation_config.forced_bos_token_id = 7
    theirs.save_pretrained(folder)
    ours = load(folder)
    assert isinstance(ours, Seq2Seq)
    return theirs, ours


def sources() -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (n,), generator=g).tolist() for n in (5, 19, 11, 12, 30)]


def generated(theirs: Any, source: list[int], start: int, count: int = 12) -> tuple[int, ...]:
    """What `generate` says after the `start` tokens that every target begins with, its end token included."""
    ids = torch.tensor([source])
    out = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, max_new_tokens=count + start - 1
    )
    return tuple(out[0, start:].tolist())


def test_greedy_equals_generate_alone_and_together(pair: tuple[Any, Seq2Seq]) -> None:
    """Padding of a shorter source that is looked at; a target that starts with another token, or does not stop at its end."""
    theirs, ours = pair
    want = [generated(theirs, s, len(ours.start)) for s in sources()]
    assert [Engine(ours, max_length=60).generate([s], GREEDY)[0].ids for s in sources()] == want
    for slots in (2, 8):
        engine = Engine(ours, slots=slots, max_length=60)
        assert isinstance(engine.runner, HfRunner)
        done = engine.generate(sources(), GREEDY)
        assert [c.ids for c in done] == want and [list(c.prompt) for c in done] == sources()
    assert len(set(want)) > 2


def test_the_end_token_ends(pair: tuple[Any, Seq2Seq]) -> None:
    """Without a tokenizer only the model itself knows its end token."""
    _, ours = pair
    [end] = ours.ends
    done = Engine(ours, max_length=60).generate(sources()[:1], Sampling(9, temperature=0, logit_bias={end: 100.0}))[0]
    assert (done.ids, done.finish_reason) == ((end,), "stop")


def test_logits_equal_those_of_whole_targets(pair: tuple[Any, Seq2Seq]) -> None:
    """Rows that leave and join take their sources, masks and guesses with them."""
    engine = Engine(pair[1], slots=4, max_length=60, speculate=3)
    watch = Watch(engine)
    sequences = [engine.submit(s, Sampling(3 + 4 * i, seed=i, ignore_eos=True), i) for s in sources()[:3] for i in range(2)]
    sequences += [engine.submit(s, Sampling(16, temperature=0, ignore_eos=True)) for s in sources()[3:]]
    while not engine.idle:
        engine.step()
    assert all(s.finish_reason == "length" for s in sequences)
    assert any(w.wanted > 1 for work in watch.work for w in work), "nothing was guessed"
    assert any(rows > 1 for rows, _ in watch.reads) and not engine.runner.rows  # type: ignore[attr-defined]


def test_a_source_is_encoded_once(pair: tuple[Any, Seq2Seq], monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that runs for every token of the answer."""
    _, ours = pair
    engine, encoded = Engine(ours, max_length=60), []
    begin = ours.begin
    monkeypatch.setattr(ours, "begin", lambda s: encoded.append(len(s)) or begin(s))
    engine.generate(sources(), Sampling(8, seed=0, ignore_eos=True))
    assert encoded == [5]


def test_sampling_and_streams_are_those_of_any_model(pair: tuple[Any, Seq2Seq]) -> None:
    """Answers that depend on the batch; log-probabilities that are not those of scoring the answer."""
    _, ours = pair
    engine = Engine(ours, slots=4, max_length=60)
    how = Sampling(8, temperature=2.0, seed=3, n=3, logprobs=2)
    done = engine.generate(sources(), how)
    alone = [c.ids for s in sources() for c in Engine(ours, slots=1, max_length=60).generate([s], how)]
    assert [c.ids for c in done] == alone and len(set(alone)) > 5
    for c, scores in zip(done, engine.score_targets([(c.prompt, c.ids) for c in done]), strict=True):
        np.testing.assert_allclose([s.logprob for s in c.scores], scores, atol=1e-4)
    events = list(engine.stream(sources()[1], Sampling(8, temperature=2.0, seed=3)))
    assert tuple(t for e in events for t in e.ids) == done[3].ids


@torch.no_grad()
def test_target_scores_equal_transformers(pair: tuple[Any, Seq2Seq]) -> None:
    """A shift by one; scores in order of length; a target of no tokens."""
    theirs, ours = pair
    targets = [[9, 4, 70], [], [33, 5, 6, 80, 11], [50], [8, 8]]
    got = Engine(ours, max_length=60).score_targets(list(zip(sources(), targets, strict=True)))
    for source, target, scores in zip(sources(), targets, got, strict=True):
        decoded = torch.tensor([[*ours.start, *target]])
        rows = theirs(input_ids=torch.tensor([source]), decoder_input_ids=decoded).logits[0].log_softmax(-1)
        want = [float(rows[len(ours.start) - 1 + i, t]) for i, t in enumerate(target)]
        np.testing.assert_allclose(scores, want, atol=1e-4)


def test_target_scores_of_a_causal_model_are_its_scores() -> None:
    """Who evaluates answers need not know which kind of model it is."""
    engine = Engine(small.model(97))
    pairs = [([5, 6, 7], [8, 9]), ([4], [3, 2, 1])]
    for got, want in zip(engine.score_targets(pairs), engine.score([([5, 6, 7, 8, 9], 3), ([4, 3, 2, 1], 1)]), strict=True):
        np.testing.assert_array_equal(got, want)


def test_what_an_encoder_decoder_cannot_do_is_said(pair: tuple[Any, Seq2Seq]) -> None:
    """Logits of something else in place of an error."""
    _, ours = pair
    engine = Engine(ours, max_length=32)
    with pytest.raises(ConfigError, match="score_targets"):
        engine.score([([5, 6, 7], 1)])
    with pytest.raises(ConfigError, match="encoder-decoder"):
        ours.logits(Batch.of([[5, 6, 7]]))
    for source, sampling in (([5] * 33, Sampling(1)), ([5], Sampling(32))):
        with pytest.raises(ContextOverflow):
            engine.submit(source, sampling)
    with pytest.raises(ContextOverflow):
        engine.score_targets([([5], [6] * 32)])
    with pytest.raises(DataError):
        engine.submit([], Sampling(1))
    assert len(engine.generate([[5] * 32], Sampling(ignore_eos=True))[0].ids) == 32 - len(ours.start)


def test_weights_keep_their_names_and_move_together(pair: tuple[Any, Seq2Seq]) -> None:
    """A head of its own that is no parameter of ours; a bias that stays where the rest of the model was."""
    theirs, ours = pair
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}
    assert not ours.training
    try:
        ours.to(torch.float64)
        assert {t.dtype for t in (*ours.hf.parameters(), *ours.hf.buffers())} <= {torch.float64, torch.int64}
    finally:
        ours.to(torch.float32)


def test_a_model_that_does_not_say_how_targets_begin_is_refused(tmp_path: Path) -> None:
    """Starting from token 0 by default gives answers, and wrong ones."""
    reference({k: v for k, v in T5.items() if k != "decoder_start_token_id"}).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="decoder_start_token_id"):
        load(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 with a small SentencePiece tokenizer, as such folders are: sources end with </s>, words begin with a space mark."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = ["▁the", "▁cat", "▁sat", "▁on", "▁mat", "▁", "s", "t", "a", "c", "m", "e", "h", "o", "n"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((w, -float(i + 1)) for i, w in enumerate(words))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    out = tmp_path_factory.mktemp("t5")
    reference({**T5, "vocab_size": 24, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    named = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))
    return out


def test_texts_are_read_and_written_as_the_tokenizer_does(folder: Path) -> None:
    """A source without its end, a sentinel taken for letters, an answer that begins with a space."""
    from transformers import AutoTokenizer

    from tutelage.chat.render import Renderer

    theirs, engine = AutoTokenizer.from_pretrained(folder), Engine(load(folder), Renderer(folder), max_length=40)
    for text in ("the cat sat", "on <extra_id_0> mat", ""):
        assert engine.encode(text) == theirs(text).input_ids and engine.encode(text)[-1] == 1
    answers = engine.generate(["the cat sat", "on the mat"], Sampling(9, temperature=3.0, seed=0, n=4))
    for c in answers:
        assert c.text == theirs.decode(c.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert any(theirs.convert_ids_to_tokens(c.ids[0]).startswith("▁") for c in answers)
    events = list(engine.stream("the cat sat", Sampling(9, temperature=3.0, seed=0)))
    assert "".join(e.text for e in events) == answers[0].text


def test_the_server_answers_from_sources(folder: Path) -> None:
    """Usage that counts the decoder's start for the prompt; echo's scores, which an encoder-decoder has none of, as a crash."""
    from fastapi.testclient import TestClient

    from tutelage.chat.render import Renderer
    from tutelage.serve.app import create_app

    renderer = Renderer(folder)
    engine = Engine(load(folder), renderer, max_length=40)
    want = engine.generate(["the cat sat"], Sampling(6, temperature=0))[0]
    asked = {"model": "t5", "prompt": "the cat sat", "max_tokens": 6, "temperature": 0}
    with TestClient(create_app(engine, renderer, "t5"), base_url="http://127.0.0.1") as client:
        said = client.post("/v1/completions", json=asked).json()
        refused = client.post("/v1/completions", json={**asked, "echo": True, "logprobs": 1})
    assert said["choices"][0]["text"] == want.text
    assert said["usage"]["prompt_tokens"] == 4 and said["usage"]["completion_tokens"] == len(want.ids)
    assert refused.status_code == 400 and "score_targets" in refused.json()["error"]["message"]
