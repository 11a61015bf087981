"""What the server relies on, asked of every engine that it can have: `Engine` always, vLLM's where vLLM is installed.

What an answer must be is computed from the model itself, one forward pass a token.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine import small
from tutelage.chat.render import Renderer
from tutelage.engine import Completion, Engine, Event, Sampling, Sequence
from tutelage.engine.limits import ContextOverflow
from tutelage.engine.protocol import EngineProtocol
from tutelage.engine.vllm.engine import VllmEngine
from tutelage.errors import ConfigError, DataError, UserError
from tutelage.models.interface import Batch
from tutelage.models.open import load
from tutelage.structured.grammar import Grammar

CONTEXT = 96
GREEDY = Sampling(12, temperature=0, ignore_eos=True)
TEXTS = ["the cat sat on the mat", "one two", "naïve café — 日本語", "the dog sat by the door, and the cat sat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.saved(tmp_path_factory.mktemp("contract"), "model", CONTEXT, head=32)  # vLLM knows no narrower heads


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder)


@pytest.fixture(scope="module", params=["tutelage", "vllm"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[EngineProtocol]:
    made: EngineProtocol
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "tutelage":
            made = Engine(load(folder), Renderer(folder), slots=4)
        elif importlib.util.find_spec("vllm") is None:
            pytest.skip("NOT CHECKED: --engine vllm, since vLLM is not installed here")
        else:
            patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, where vLLM is a CPU build
            made = VllmEngine(folder, Renderer(folder), slots=4, dtype="float32", enforce_eager=True, block_size=32)
        made.start()
        yield made
        made.close()


@pytest.fixture(autouse=True)
def idle_before_and_after(engine: EngineProtocol) -> Iterator[None]:
    """A sequence left behind is a place less for ever."""
    assert engine.idle
    yield
    assert engine.idle and not engine.waiting and engine.cache_usage == 0


@pytest.fixture
def prompts(engine: EngineProtocol) -> list[list[int]]:
    return [engine.encode(text) for text in TEXTS]


def finish(engine: EngineProtocol, sequences: list[Sequence]) -> list[Event]:
    events = []
    while any(s.finish_reason is None for s in sequences):
        events += engine.step()
    return events


def answer(engine: EngineProtocol, prompt: list[int], sampling: Sampling) -> Completion:
    sequence = engine.submit(prompt, sampling)
    finish(engine, [sequence])
    return sequence.completion()


@torch.inference_mode()
def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """[T,V]: of the token after each."""
    return model.logits(Batch.of([ids]))[0].float().log_softmax(-1)


def greedy(model: Any, prompt: list[int], count: int) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logprobs(model, ids)[-1].argmax()))
    return tuple(ids[len(prompt) :])


def test_greedy_tokens_are_the_models(engine: EngineProtocol, model: Any, prompts: list[list[int]]) -> None:
    """Prompts that are cut, start tokens set twice, answers that change with what else runs."""
    many = prompts * 3  # more than run at a time
    sequences = [engine.submit(p, GREEDY) for p in many]
    assert not engine.idle and len(engine.waiting) <= len(many)
    events = finish(engine, sequences)
    for prompt, s in zip(many, sequences, strict=True):
        done = s.completion()
        assert done.ids == greedy(model, prompt, 12) and done.finish_reason == "length" and done.prompt == tuple(prompt)
        own = [e for e in events if e.sequence is s]
        assert tuple(t for e in own for t in e.ids) == done.ids
        assert [e.finish_reason for e in own] == [None] * (len(own) - 1) + ["length"]


def test_text_comes_in_pieces(engine: EngineProtocol, prompts: list[list[int]]) -> None:
    """Half characters shown, and pieces that laid end to end are another text than the whole."""
    vocabulary = engine.vocabulary
    assert vocabulary is not None
    sequence = engine.submit(prompts[2], Sampling(30, seed=3, ignore_eos=True))
    events = finish(engine, [sequence])
    done = sequence.completion()
    assert "".join(e.text for e in events) == done.text == b"".join(map(vocabulary.of, done.ids)).decode("utf-8", "replace")


def test_stop_texts_are_held_back(engine: EngineProtocol, prompts: list[list[int]]) -> None:
    """A stop text of which the beginning was shown, one across two tokens that is missed, tokens that come after it."""
    whole = answer(engine, prompts[0], Sampling(30, temperature=0, ignore_eos=True))
    at = next(i for i in range(4, len(whole.text) - 2) if "\ufffd" not in whole.text[i : i + 3])
    stop = whole.text[at : at + 3]
    sequence = engine.submit(prompts[0], Sampling(30, temperature=0, ignore_eos=True, stop=("never this", stop)))
    events = finish(engine, [sequence])
    done = sequence.completion()
    assert done.finish_reason == "stop" and done.text == whole.text[: whole.text.index(stop)]
    assert "".join(e.text for e in events) == done.text
    assert done.ids == whole.ids[: len(done.ids)] and len(done.ids) < len(whole.ids)


def test_stop_tokens_end_an_answer(engine: EngineProtocol, model: Any, prompts: list[list[int]]) -> None:
    """The token that ends an answer is one of its tokens and none of its text; the model's own can be ignored, given ones not."""
    tokens = greedy(model, prompts[1], 12)
    stop = next(t for t in tokens[3:] if t not in tokens[:3])
    until = tokens.index(stop) + 1
    given = answer(engine, prompts[1], Sampling(12, temperature=0, ignore_eos=True, stop_ids=(stop, 10**6)))
    assert given.ids == tokens[:until] and given.finish_reason == "stop"
    assert given.text == answer(engine, prompts[1], Sampling(until - 1, temperature=0, ignore_eos=True)).text
    end = min(engine.renderer.stop_ids)
    loved = {end: 100.0}
    assert answer(engine, prompts[1], Sampling(12, temperature=0, logit_bias=loved)).ids == (end,)
    ignored = answer(engine, prompts[1], Sampling(5, temperature=0, logit_bias=loved, ignore_eos=True))
    assert ignored.ids == (end,) * 5 and ignored.finish_reason == "length" and ignored.text == ""


def test_an_end_can_wait_and_be_shown(engine: EngineProtocol, model: Any, prompts: list[list[int]]) -> None:
    """Answers that end before `min_tokens`, and stop texts that are never shown."""
    end = min(engine.renderer.stop_ids)
    done = answer(engine, prompts[1], Sampling(8, temperature=0, min_tokens=3, logit_bias={end: 100.0}))
    assert len(done.ids) == 4 and done.ids[-1] == end and end not in done.ids[:-1] and done.finish_reason == "stop"
    whole = answer(engine, prompts[0], Sampling(20, temperature=0, ignore_eos=True))
    stop = next(c for c in whole.text[3:] if c != "\ufffd")
    shown = answer(engine, prompts[0], Sampling(20, temperature=0, ignore_eos=True, stop=(stop,), include_stop=True))
    assert shown.text.endswith(stop) and whole.text.startswith(shown.text) and shown.finish_reason == "stop"
    late = answer(engine, prompts[0], Sampling(20, temperature=0, ignore_eos=True, stop=(stop,), min_tokens=19))
    assert len(late.ids) >= 19


def test_seeds_and_samples(engine: EngineProtocol, prompts: list[list[int]]) -> None:
    """One noise for all n answers; noise that depends on what else runs; a seed that is not heard."""
    sampling = Sampling(10, seed=7, n=4, ignore_eos=True)
    four = [engine.submit(prompts[0], sampling, index) for index in range(4)]
    finish(engine, four)
    assert [s.completion().index for s in four] == [0, 1, 2, 3]
    ids = [s.completion().ids for s in four]
    assert len(set(ids)) == 4
    alone = engine.submit(prompts[0], sampling, 2)
    finish(engine, [alone])
    assert alone.completion().ids == ids[2]
    assert answer(engine, prompts[0], Sampling(10, seed=-(2**70), ignore_eos=True)).ids not in ids
    assert len({answer(engine, prompts[0], Sampling(10, ignore_eos=True)).ids for _ in range(3)}) == 3


def test_filters_keep_what_they_say(engine: EngineProtocol, model: Any, prompts: list[list[int]]) -> None:
    """Settings that never reach the sampler."""
    best = logprobs(model, prompts[0])[-1].exp().sort(descending=True)
    p, order = best.values, best.indices.tolist()
    for how, kept in (
        ({"top_k": 2}, 2), ({"top_p": float(p[:2].sum() + p[2] / 2)}, 3), ({"min_p": float((p[1] + p[2]) / 2 / p[0])}, 2),
    ):  # fmt: skip
        assert drawn(engine, prompts[0], **how) == set(order[:kept]), how
    sure = max(prompts, key=lambda ids: -float(logprobs(model, ids)[-1].topk(2).values.diff()))
    assert drawn(engine, sure, temperature=0.01) == set(greedy(model, sure, 1)) and len(drawn(engine, sure, temperature=2.0)) > 10


def drawn(engine: EngineProtocol, prompt: list[int], **how: Any) -> set[int]:
    """First tokens of 60 answers."""
    sequences = [engine.submit(prompt, Sampling(1, seed=i, ignore_eos=True, **how)) for i in range(60)]
    finish(engine, sequences)
    return {s.completion().ids[0] for s in sequences}


def test_penalties_and_bias(engine: EngineProtocol, model: Any, prompts: list[list[int]]) -> None:
    """Penalties that are not applied, or count what they should not."""
    plain = greedy(model, prompts[3], 24)
    assert len(set(plain)) < 24
    for how in ({"presence_penalty": 2.0, "repetition_penalty": 50.0}, {"frequency_penalty": 2.0}):
        ids = list(prompts[3])
        for _ in range(24):  # as the documentation of `Sampling` has it
            row = model.logits(Batch.of([ids]))[0, -1].float().detach().clone()
            if "repetition_penalty" in how:
                seen = torch.tensor(sorted(set(ids)))
                row[seen] = torch.where(row[seen] > 0, row[seen] / 50, row[seen] * 50)
            own, counts = np.unique(ids[len(prompts[3]) :], return_counts=True)
            row[own] -= torch.as_tensor(counts * how.get("frequency_penalty", 0) + how.get("presence_penalty", 0)).float()
            ids.append(int(row.argmax()))
        got = answer(engine, prompts[3], Sampling(24, temperature=0, ignore_eos=True, **how))
        assert got.ids == tuple(ids[len(prompts[3]) :]), how
    bias = {plain[0]: -100.0, 10**6: 5.0}
    assert answer(engine, prompts[3], Sampling(6, temperature=0, ignore_eos=True, logit_bias=bias)).ids[0] != plain[0]


def test_logprobs_are_the_models_own(engine: EngineProtocol, model: Any, prompts: list[list[int]]) -> None:
    """Log-probabilities after temperature or penalties; of another token; alternatives in no order."""
    how = Sampling(8, temperature=2.0, frequency_penalty=1.0, seed=1, logprobs=3, ignore_eos=True)
    done = answer(engine, prompts[0], how)
    want = logprobs(model, [*prompts[0], *done.ids])[len(prompts[0]) - 1 : -1]
    assert [s.id for s in done.scores] == list(done.ids)
    for score, row in zip(done.scores, want, strict=True):
        assert score.logprob == pytest.approx(float(row[score.id]), abs=1e-3)
        assert [p for _, p in score.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
        assert [p for t, p in score.top] == pytest.approx([float(row[t]) for t, _ in score.top], abs=1e-3)
    only = answer(engine, prompts[0], Sampling(4, temperature=0, logprobs=0, ignore_eos=True))
    assert len(only.scores) == 4 and all(s.top == () and s.logprob < 0 for s in only.scores)
    assert answer(engine, prompts[0], GREEDY).scores == ()


def test_prompts_are_scored_while_answers_run(engine: EngineProtocol, model: Any, prompts: list[list[int]]) -> None:
    """Off by one, results in another order, a text that fills the context, events of answers that are lost meanwhile."""
    running = engine.submit(prompts[1], GREEDY)
    full = (prompts[3] * 9)[:CONTEXT]
    requests = [(prompts[0], 1), (full, 5), (prompts[2], len(prompts[2]) - 1), (prompts[2], len(prompts[2])), (prompts[1][:1], 1)]
    for top in (2, 0):
        for (ids, start), got in zip(requests, engine.score_top(requests, top), strict=True):
            want = logprobs(model, list(ids))[start - 1 : -1]
            own = want[torch.arange(len(ids) - start), torch.tensor(ids[start:], dtype=torch.int64)]
            np.testing.assert_allclose(got.logprobs, own.numpy(), atol=1e-3)
            assert got.top_ids.shape == got.top_logprobs.shape == (len(ids) - start, top)
            np.testing.assert_allclose(got.top_logprobs, want.topk(top).values.numpy(), atol=1e-3)
            above = (want > own[:, None] + 1e-4).sum(1) + 1
            assert np.array_equal(got.ranks, above.numpy() if top else [])
    events = finish(engine, [running])
    events += [] if engine.idle else engine.step()
    assert running.completion().ids == greedy(model, prompts[1], 12)
    for wrong in ([(prompts[0], 0)], [(prompts[0], len(prompts[0]) + 1)], [([1, engine.vocab_size], 1)]):
        with pytest.raises(DataError):
            engine.score_top(wrong, 0)
    with pytest.raises(ContextOverflow):
        engine.score_top([([*full, 1], 1)], 0)


def test_cancelling_ends_one_answer(engine: EngineProtocol, model: Any, prompts: list[list[int]]) -> None:
    """Cancelled answers that go on, or that take others with them; waiting ones too."""
    sequences = [engine.submit(p, Sampling(40, temperature=0, ignore_eos=True)) for p in prompts * 3]
    engine.step()
    for victim in (sequences[0], sequences[11]):
        engine.cancel(victim)
        engine.cancel(victim)
    events = finish(engine, sequences)
    assert not any(e.sequence in (sequences[0], sequences[11]) for e in events)
    assert [s.finish_reason for s in sequences] == ["cancelled", *["length"] * 10, "cancelled"]
    assert sequences[1].completion().ids == greedy(model, prompts[1], 40)
    engine.cancel(sequences[1])
    assert sequences[1].finish_reason == "length"


def test_nothing_is_cut_to_fit(engine: EngineProtocol, prompts: list[list[int]]) -> None:
    """Silent truncation: the model answers another question than the one asked."""
    assert engine.context_length == CONTEXT and engine.vocab_size >= len(engine.vocabulary or ())
    for prompt, sampling in (([9] * CONTEXT, Sampling()), ([9] * (CONTEXT - 2), Sampling(3)), ([9] * 2 * CONTEXT, Sampling(1))):
        with pytest.raises(ContextOverflow) as caught:
            engine.submit(prompt, sampling)
        assert caught.value.field == "max_tokens"
    for limit in (2, None):
        done = answer(engine, [9] * (CONTEXT - 2), Sampling(limit, temperature=0, ignore_eos=True))
        assert len(done.ids) == 2 and done.finish_reason == "length"
    for wrong in ([], [engine.vocab_size], [-1]):
        with pytest.raises(DataError) as unknown:
            engine.submit(wrong, Sampling(1))
        assert unknown.value.field == "prompt"


def test_cached_prompts_are_counted(engine: EngineProtocol) -> None:
    """Usage and metrics that say nothing of the prefix cache, or count an answer's tokens."""
    prompt = [*range(20, 40)] * 4
    queries, hits = engine.prefix_cache_queries, engine.prefix_cache_hits
    done = [answer(engine, prompt, Sampling(2, temperature=0, ignore_eos=True)) for _ in range(2)]
    assert done[0].ids == done[1].ids and done[0].shared == 0
    assert engine.prefix_cache_queries - queries == 160 and engine.prefix_cache_hits - hits == done[1].shared
    assert 64 <= done[1].shared < 80


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar.of_choices(["yes", "no"]), "yes|no"), (Grammar("regex", "[a-c]{2,5}x"), "[a-c]{2,5}x"),
        (Grammar("lark", 'start: "sum" part{1,3}\npart: " " /[0-9]{2}/'), "sum( [0-9]{2}){1,3}"),
        (Grammar.of_schema({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
                            "additionalProperties": False}), r'\{\s*"ok"\s*:\s*(true|false)\s*\}'),
        (Grammar.of_schema({"type": "array", "items": {"enum": [1, None]}, "maxItems": 2}), r"\[.*\]"),
    ],
)  # fmt: skip
def test_structured_output_is_enforced(engine: EngineProtocol, prompts: list[list[int]], grammar: Grammar, pattern: str) -> None:
    """A grammar that is accepted and not enforced, and an answer that does not end when it is complete."""
    engine.constrain(grammar)
    for seed in range(3):
        done = answer(engine, prompts[0], Sampling(60, seed=seed, grammar=grammar))
        assert re.fullmatch(pattern, done.text, re.DOTALL) and done.finish_reason == "stop"
        if grammar.kind == "json_schema":
            json.loads(done.text)
    cut = answer(engine, prompts[0], Sampling(1, seed=0, grammar=grammar))
    assert cut.finish_reason == "length" and len(cut.ids) == 1


def test_grammars_that_cannot_be_used_are_refused(engine: EngineProtocol, prompts: list[list[int]]) -> None:
    """One bad schema that ends every answer, or the process."""
    other = engine.submit(prompts[1], GREEDY)
    for grammar in (Grammar("regex", "(a"), Grammar("json_schema", '{"type": "odd"}'), Grammar("lark", "start: nowhere")):
        for call in (lambda g=grammar: engine.constrain(g), lambda g=grammar: engine.submit(prompts[0], Sampling(4, grammar=g))):
            with pytest.raises(ConfigError):
                call()
    finish(engine, [other])
    assert len(other.completion().ids) == 12


def test_control_tokens_can_be_shown(engine: EngineProtocol, prompts: list[list[int]]) -> None:
    """The marks of tool calls, where they are control tokens."""
    control = engine.renderer.tokenizer.tokenizer.token_to_id("<|tool|>")
    how: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "logit_bias": {control: 100.0}}
    assert answer(engine, prompts[0], Sampling(2, **how)).text == ""
    assert answer(engine, prompts[0], Sampling(2, shown_ids=(control,), **how)).text == "<|tool|><|tool|>"


def test_embeddings_are_given_or_refused(engine: EngineProtocol, prompts: list[list[int]]) -> None:
    """Vectors of another width than the model's, or an engine that has none and says so to nobody."""
    assert engine.hidden_size == 32
    try:
        vectors = engine.embed(prompts)
    except UserError as error:
        assert error.field == "model" and "tutelage" in str(error.fix)
    else:
        assert [v.shape for v in vectors] == [(32,)] * len(prompts)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
