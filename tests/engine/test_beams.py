"""Beam search: the answers of `generate(num_beams=...)` of `transformers`, on every runner, and the settings of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import small
from tests.engine.test_seq2seq import BART, T5, reference, sources
from tests.models import shapes
from tutelage.engine import Engine, Sampling
from tutelage.engine.hf_runner import HfRunner
from tutelage.engine.runner import CachedRunner, FusedRunner, RecomputingRunner
from tutelage.errors import ConfigError
from tutelage.models import kernels
from tutelage.models.open import load

ENDS = (2, 7, 11, 19, 23, 40, 52, 61, 77)
TINY: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
DECODERS: dict[str, tuple[Any, Any]] = {
    "fused": ({**shapes.CASES["qwen3"]}, FusedRunner),
    "by_operation": ({**shapes.CASES["llama"]}, CachedRunner),
    "transformers": ({"model_type": "gpt_neox", **TINY, "num_attention_heads": 4, "intermediate_size": 48}, HfRunner),
    "recurrent": ({"model_type": "mamba", **TINY, "state_size": 4}, RecomputingRunner),
}
HOW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "two": ({"num_beams": 2}, {"beams": 2}),
    "early": ({"early_stopping": True}, {"early_stopping": True}),
    "never": ({"early_stopping": "never", "length_penalty": 2.0}, {"early_stopping": "never", "length_penalty": 2.0}),
    "long": ({"length_penalty": 3.0}, {"length_penalty": 3.0}),
    "short": ({"length_penalty": -1.0}, {"length_penalty": -1.0}),
    "ngrams": ({"no_repeat_ngram_size": 2, "min_new_tokens": 6}, {"no_repeat_ngram": 2, "min_tokens": 6}),
    "repetition": ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    "several": ({"num_return_sequences": 3}, {"n": 3}),
}


def generated(theirs: Any, ids: list[int], skip: int, **how: Any) -> list[tuple[int, ...]]:
    """Answers of `transformers`, without what they begin with and what is filled up."""
    given = torch.tensor([ids])
    out = theirs.generate(given, attention_mask=torch.ones_like(given), do_sample=False, pad_token_id=0, **how)
    return [_cut(row[skip:].tolist(), how.get("eos_token_id", ())) for row in out]


def _cut(ids: list[int], ends: Any) -> tuple[int, ...]:
    at = next((i for i, t in enumerate(ids) if t in ends), len(ids) - 1)
    return tuple(ids[: at + 1])


def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(3)
    return [torch.randint(3, 97, (n,), generator=g).tolist() for n in (4, 11, 9, 17)]


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Engine]:
    raw, runner = DECODERS[request.param]
    theirs, folder = shapes.written(raw, tmp_path_factory.mktemp("m") / "m")
    engine = Engine(load(folder), slots=9, max_length=60)
    assert isinstance(engine.runner, runner) or (runner is FusedRunner and kernels.why_not())
    return theirs, engine


@pytest.mark.parametrize("name", HOW)
def test_equals_transformers(decoder: tuple[Any, Engine], name: str) -> None:
    """A beam that goes on from another's cache, that ends too soon, or is measured by another length."""
    theirs, engine = decoder
    asked, how = HOW[name]
    asked = {"num_beams": 4, "max_new_tokens": 14, "eos_token_id": list(ENDS), **asked}
    want = [answer for p in prompts() for answer in generated(theirs, p, len(p), **asked)]
    done = engine.generate(prompts(), Sampling(14, stop_ids=ENDS, **{"beams": 4, **how}))
    assert [c.ids for c in done] == want
    assert all((c.finish_reason == "stop") == (c.ids[-1] in ENDS) for c in done)
    assert engine.scheduler.slots.used == 0 and not getattr(engine.runner, "rows", None)


@pytest.fixture(scope="module", params=["t5", "bart", "bart-forced"])
def seq2seq(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Engine]:
    theirs, folder = reference(T5 if request.param == "t5" else BART), tmp_path_factory.mktemp("model")
    if request.param == "bart-forced":
        theirs.generation_config.forced_bos_token_id, theirs.generation_config.forced_eos_token_id = 7, 2
        often = [t for s in sources() for t in generated(theirs, s, 2, max_new_tokens=5)[0]]
        theirs.generation_config.bad_words_ids, theirs.generation_config.suppress_tokens = [[often[1]], [2]], [often[5], often[8]]
    theirs.save_pretrained(folder)
    return theirs, Engine(load(folder), slots=9, max_length=60)


@pytest.mark.parametrize("name", HOW)
def test_equals_transformers_from_sources(seq2seq: tuple[Any, Engine], name: str) -> None:
    """Sources mixed up when beams fork; a forced token that no score or length counts."""
    theirs, engine = seq2seq
    asked, how = HOW[name]
    start = len(engine.model.start)
    ends = [t for t in (*engine.model.ends, *ENDS) if t not in engine.model.start]
    asked = {"num_beams": 4, "max_new_tokens": 12 + start - 1, "eos_token_id": ends, **asked}
    if "min_new_tokens" in asked:
        asked["min_new_tokens"] += start - 1
    want = [answer for s in sources() for answer in generated(theirs, s, start, **asked)]
    assert [c.ids for c in engine.generate(sources(), Sampling(12, stop_ids=tuple(ends), **{"beams": 4, **how}))] == want


@pytest.mark.parametrize("how", [{}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 9}], ids=str)
def test_greedy_follows_the_checkpoint(seq2seq: tuple[Any, Engine], how: dict[str, int]) -> None:
    """A forced end, a token that is never to be made: the model's own settings, whoever searches."""
    theirs, engine = seq2seq
    start = len(engine.model.start)
    ends = list(engine.model.ends)
    want = [a for s in sources() for a in generated(theirs, s, start, max_new_tokens=12 + start - 1, eos_token_id=ends, **how)]
    fields = {"no_repeat_ngram_size": "no_repeat_ngram", "min_new_tokens": "min_tokens"}
    ours = {fields[k]: v - (start - 1) * (k == "min_new_tokens") for k, v in how.items()}
    done = engine.generate(sources(), Sampling(12, temperature=0, **ours))  # type: ignore[arg-type]
    assert [c.ids for c in done] == want
    if engine.model.generation.last is not None:
        assert {c.ids[-1] for c in done} == {2} and {c.finish_reason for c in done if len(c.ids) == 12} == {"length"}


def test_what_a_checkpoint_suggests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beams, lengths and n-grams of generation_config.json, done where asked for and else said; what is not done, too."""
    theirs = reference(BART)
    settings = {
        "num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram_size": 3, "max_length": 14,
        "min_length": 5, "forced_bos_token_id": 7, "forced_eos_token_id": 2, "encoder_no_repeat_ngram_size": 2,
    }  # fmt: skip
    theirs.generation_config.update(**settings)
    theirs.save_pretrained(tmp_path)
    model: Any = load(tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert "beams=4" in said and "max_tokens=12" in said and "encoder_no_repeat_ngram_size=2, which this engine does not" in said
    assert model.generation.undone == {"encoder_no_repeat_ngram_size": 2}
    theirs.generation_config.encoder_no_repeat_ngram_size = None
    want = []
    for s in sources():
        ids = torch.tensor([s])
        want.append(_cut(theirs.generate(ids, attention_mask=torch.ones_like(ids))[0, 2:].tolist(), (2,)))
    done = Engine(model, max_length=60).generate(sources(), Sampling(**model.generation.suggested))
    assert [c.ids for c in done] == want


def test_nothing_is_said_of_a_checkpoint_without_wishes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line at every start that nobody reads any more when it matters."""
    reference(BART).save_pretrained(tmp_path)
    model: Any = load(tmp_path)
    assert model.generation.note() is None and "generation_config" not in capsys.readouterr().err


def test_more_prompts_than_slots_and_others_running() -> None:
    """Groups that wait for ever, or take slots that are in use."""
    engine = Engine(small.model(97), slots=5)
    alone = [Engine(small.model(97), slots=3).generate([p], Sampling(8, beams=3))[0].ids for p in prompts()]
    other = engine.submit(prompts()[0], Sampling(5, temperature=0))
    others = [engine.submit(p, Sampling(9, temperature=0)) for p in prompts()[:3]]
    engine.step()
    assert [c.ids for c in engine.generate(prompts(), Sampling(8, beams=3))] == alone
    assert other.finish_reason and engine.scheduler.slots.used == len([s for s in others if not s.finish_reason])


@pytest.mark.parametrize(
    ("how", "field"),
    [
        ({"beams": 0}, "beams"), ({"beams": 4, "temperature": 0.7}, "temperature"), ({"beams": 4, "stop": ("x",)}, "stop"),
        ({"beams": 4, "logprobs": 1}, "logprobs"), ({"beams": 2, "n": 3}, "n"), ({"length_penalty": 2.0}, "length_penalty"),
        ({"early_stopping": True}, "early_stopping"), ({"beams": 2, "early_stopping": "soon"}, "early_stopping"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(how: dict[str, Any], field: str) -> None:
    """A setting that has no effect."""
    with pytest.raises(ConfigError) as caught:
        Sampling(**how)
    assert caught.value.field == field


def test_beams_are_for_generate_alone() -> None:
    """A search that becomes greedy without a word; one with more beams than places."""
    engine = Engine(small.model(97), slots=3)
    for call in (
        lambda: engine.submit([5], Sampling(4, beams=2)),
        lambda: engine.generate([[5]], Sampling(4, beams=4)),
        lambda: engine.generate([[5], [6]], [Sampling(4, beams=2), Sampling(4)]),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert caught.value.field == "beams"
    assert engine.idle and engine.scheduler.slots.used == 0
