"""The engine against the plain loop: caching, batching, chunking and cancelling must not change an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine import small
from tutelage.engine import Engine, Sampling, Sequence, TokenScore
from tutelage.engine.limits import ContextOverflow
from tutelage.errors import ArtifactError, ConfigError, DataError
from tutelage.models.interface import Batch, Traits
from tutelage.tokenizer.detokenize import TextStream, Vocabulary

VOCAB = 97


def prompts(count: int = 8) -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCAB, (3 + 5 * i,), generator=g).tolist() for i in range(count)]


@pytest.fixture(scope="module", params=[16, 8], ids=["fused", "by_operation"])
def model(request: pytest.FixtureRequest) -> Any:
    return small.model(VOCAB, head=request.param)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return small.renderer(tmp_path_factory.mktemp("tokenizer") / "t")


class NoCache(torch.nn.Module):
    """The same model as one that cannot cache, as an adapter would be."""

    traits = Traits()

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.lm_head = model, model.config, model.lm_head

    def forward(self, batch: Batch) -> Any:
        return self.model(batch)


@torch.inference_mode()
def plain_greedy(model: Any, prompt: list[int], count: int) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.logits(Batch.of([ids]))[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def test_greedy_equals_full_forward_passes(model: Any) -> None:
    """A cache written at the wrong place, or read a token short, changes the answer; so do chunked prompts."""
    want = [plain_greedy(model, p, 12) for p in prompts()]
    for engine in (Engine(model, slots=4), Engine(model, slots=8, prefill_tokens=7), Engine(NoCache(model).eval(), slots=3)):
        assert [c.ids for c in engine.generate(prompts(), Sampling(12, temperature=0))] == want


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}, {"min_p": 0.05, "presence_penalty": 0.5}])
def test_the_rest_of_the_batch_has_no_say(model: Any, how: dict[str, Any]) -> None:
    """Noise drawn from one stream for the batch gives other answers when the batch changes."""
    seeded = [Sampling(10, seed=i, **how) for i in range(8)]
    alone = [Engine(model, slots=1).generate([p], s)[0].ids for p, s in zip(prompts(), seeded, strict=True)]
    together = Engine(model, slots=8).generate(prompts(), seeded)
    assert [c.ids for c in together] == alone
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    shuffled = Engine(model, slots=3).generate([prompts()[i] for i in order], [seeded[i] for i in order])
    assert [c.ids for c in shuffled] == [alone[i] for i in order]
    assert len(set(alone)) == 8


def test_samples_follow_the_model(model: Any) -> None:
    """Wrong noise or a wrong filter draws from another distribution than the model's."""
    prompt = prompts()[1]
    with torch.inference_mode():
        p = (model.logits(Batch.of([prompt]))[0, -1] / 1.5).softmax(-1)
    kept = p * (p >= p.topk(5).values[-1])
    kept = (kept / kept.sum()).numpy()
    drawn = Engine(model, slots=64).generate([prompt], Sampling(1, temperature=1.5, top_k=5, seed=3, n=1000))
    share = np.bincount([c.ids[0] for c in drawn], minlength=VOCAB) / 1000
    assert np.abs(share - kept).max() < 0.06
    assert set(np.nonzero(share)[0]) <= set(np.nonzero(kept)[0])


def test_top_p_and_min_p_keep_what_they_say(model: Any) -> None:
    """Off by one: dropping the token that crosses the threshold, or keeping one more."""
    prompt = prompts()[2]
    with torch.inference_mode():
        p, order = model.logits(Batch.of([prompt]))[0, -1].softmax(-1).sort(descending=True)
    top_p = float(p[:2].sum() + p[2] / 2)
    drawn = Engine(model, slots=64).generate([prompt], Sampling(1, top_p=top_p, seed=0, n=300))
    assert {c.ids[0] for c in drawn} == set(order[:3].tolist())
    min_p = float((p[3] + p[4]) / 2 / p[0])
    drawn = Engine(model, slots=64).generate([prompt], Sampling(1, min_p=min_p, seed=0, n=400))
    assert {c.ids[0] for c in drawn} == set(order[:4].tolist())


def test_scores_equal_sampled_logprobs(model: Any) -> None:
    """Promise 16 inside the engine: the log-probability of a sampled token is the model's own, penalties or not."""
    engine = Engine(model, slots=4)
    done = engine.generate(prompts(), Sampling(8, temperature=2.0, frequency_penalty=1.0, seed=1, logprobs=3))
    scored = engine.score([((*c.prompt, *c.ids), len(c.prompt)) for c in done])
    for completion, logprobs in zip(done, scored, strict=True):
        np.testing.assert_allclose([s.logprob for s in completion.scores], logprobs, atol=1e-4)
        assert all(len(s.top) == 3 and s.top[0][1] >= s.logprob - 1e-6 for s in completion.scores)


def test_score_equals_log_softmax(model: Any) -> None:
    """A shift by one, or results in order of length instead of order of asking."""
    requests = [(p, 1 + i % 3) for i, p in enumerate(prompts())]
    with torch.inference_mode():
        for (ids, start), got in zip(requests, Engine(model).score(requests), strict=True):
            want = model.logits(Batch.of([ids]))[0].log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
            np.testing.assert_allclose(got, want[start - 1 :].numpy(), atol=1e-4)


def test_penalties_and_bias(model: Any) -> None:
    """A penalty that is never applied leaves the loops of greedy answers in place."""
    engine, prompt = Engine(model), prompts()[3]
    assert (
        len(set(engine.generate([prompt], Sampling(40, temperature=0, presence_penalty=2, repetition_penalty=50.0))[0].ids)) == 40
    )
    assert engine.generate([prompt], Sampling(3, temperature=0, logit_bias={11: 100.0}))[0].ids == (11, 11, 11)
    best = plain_greedy(model, prompt, 1)[0]
    assert best not in engine.generate([prompt], Sampling(5, temperature=0, logit_bias={best: -100.0}))[0].ids


def test_cancelled_and_finished_sequences_free_their_slots(model: Any) -> None:
    """A slot that leaks starves the queue; the answers of the others must not notice."""
    engine = Engine(model, slots=2)
    sequences = [engine.submit(p, Sampling(12, temperature=0)) for p in prompts(6)]
    engine.step()
    for victim in (sequences[0], sequences[5]):
        engine.cancel(victim)
        engine.cancel(victim)
    while not engine.idle:
        engine.step()
    assert engine.scheduler.slots.used == 0
    assert [s.finish_reason for s in sequences] == ["cancelled", *["length"] * 4, "cancelled"]
    for p, s in list(zip(prompts(6), sequences, strict=True))[1:5]:
        assert s.completion().ids == plain_greedy(model, p, 12)


def test_a_step_that_fails_in_the_middle_gives_every_slot_back(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that ended in the same step before another failed: its slot is nobody's, for ever."""
    engine = Engine(model, slots=2)
    ended, failing = (engine.submit(p, Sampling(n, temperature=0)) for p, n in zip(prompts(2), (1, 5), strict=True))
    append = Sequence.append

    def broken(self: Sequence, score: TokenScore) -> Any:
        if self is failing:
            raise RuntimeError("out of memory")
        return append(self, score)

    monkeypatch.setattr(Sequence, "append", broken)
    with pytest.raises(RuntimeError):
        engine.step()
    assert ended.finish_reason == "length" and engine.scheduler.slots.used == 2
    for sequence in (ended, failing):
        engine.cancel(sequence)
    assert engine.idle and engine.scheduler.slots.used == 0 and ended.finish_reason == "length"


def test_moving_slots_together_keeps_the_answers(model: Any) -> None:
    """Closing a gap copies a slot; a copy one token short would show in the next token."""
    engine = Engine(model, slots=4)
    lengths = [2, 5, 9, 20]
    done = engine.generate(prompts(4), [Sampling(n, temperature=0) for n in lengths])
    assert [c.ids for c in done] == [plain_greedy(model, p, n) for p, n in zip(prompts(4), lengths, strict=True)]


def test_context_overflow_is_an_error(model: Any) -> None:
    """Silent truncation: the model answers another question than the one asked."""
    engine = Engine(model, max_length=32)
    for prompt, sampling in (([1] * 32, Sampling()), ([1] * 30, Sampling(3)), ([1] * 40, Sampling(1))):
        with pytest.raises(ContextOverflow):
            engine.submit(prompt, sampling)
    assert len(engine.generate([[1] * 30], Sampling(2))[0].ids) == 2
    assert len(engine.generate([[1] * 30], Sampling())[0].ids) == 2
    assert engine.idle
    with pytest.raises(ContextOverflow):
        engine.score([([1] * 33, 1)])
    with pytest.raises(DataError):
        engine.submit([VOCAB], Sampling(1))
    with pytest.raises(DataError):
        engine.submit([], Sampling(1))


def test_a_model_in_training_is_left_in_training(model: Any) -> None:
    """The sampling hook of a run must not switch the model's mode for good."""
    model.train()
    Engine(model).generate(prompts(1), Sampling(1))
    assert model.training
    model.eval()


def test_damaged_weights_are_an_error() -> None:
    """argmax over NaN gives a token as if nothing were wrong."""
    broken = small.model(VOCAB)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    for sampling in (Sampling(2, temperature=0), Sampling(2)):
        with pytest.raises(ArtifactError, match="not a number"):
            Engine(broken).generate(prompts(1), sampling)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.1), ("max_tokens", 0), ("n", 0),
     ("stop", ("",)), ("logit_bias", {1: 101}), ("repetition_penalty", 0.0)],
)  # fmt: skip
def test_sampling_names_the_wrong_field(field: str, value: Any) -> None:
    """A setting out of range that is quietly accepted changes what was asked for."""
    with pytest.raises(ConfigError) as caught:
        Sampling(**{field: value})
    assert caught.value.field == field


def test_text_streams_whole_characters(renderer: Any) -> None:
    """Half an emoji, streamed, is U+FFFD on the client's screen."""
    tokenizer = renderer.tokenizer
    vocabulary = Vocabulary(json.loads(tokenizer.tokenizer.to_str()))
    for text in ("naïve 🙂 日本語 – end", "🙃" * 3, "a\u0301"):
        ids = tokenizer.encode_text(text)
        stream = TextStream(vocabulary)
        pieces = [stream.add(i) for i in ids]
        assert "".join(pieces) + stream.flush() == text == stream.text == tokenizer.decode(ids)
        assert all("\ufffd" not in piece for piece in pieces)
    half = TextStream(vocabulary)
    half.add(tokenizer.encode_text("🙂")[0])
    assert half.text + half.flush() in ("\ufffd", "🙂")


def test_stop_text_is_held_back_and_never_shown(renderer: Any) -> None:
    """A stop text that spans tokens leaks its beginning to a streaming client."""
    tokenizer = renderer.tokenizer
    vocabulary = Vocabulary(json.loads(tokenizer.tokenizer.to_str()))

    def run(text: str, *stop: str) -> tuple[str, bool]:
        stream = TextStream(vocabulary, stop)
        shown = ""
        for i in tokenizer.encode_text(text):
            shown += stream.add(i)
            if stream.stopped:
                break
        shown += stream.flush()
        assert shown == stream.text
        return shown, stream.stopped

    assert run("the cat sat on", "t sa", "zzz") == ("the ca", True)
    assert run("the cat sat", "tx", "sat on") == ("the cat sat", False)
    assert run("aab aaab", "aaab") == ("aab ", True)


def test_a_stop_text_that_came_too_early_ends_nothing_later(renderer: Any) -> None:
    """Text that is held for a longer stop text has a shorter one in it, which was not to end anything."""
    vocabulary = Vocabulary(json.loads(renderer.tokenizer.tokenizer.to_str()))
    first, second = (renderer.tokenizer.encode_text(x)[0] for x in "aq")
    stops = ("a", "abc")
    stream = TextStream(vocabulary, stops)
    assert stream.add(first, stops=False) == "" and stream.add(second) == "aq" and not stream.stopped
    assert stream.add(first) == "" and stream.stopped and stream.text == "aq"


def test_generation_with_a_tokenizer(renderer: Any) -> None:
    """End tokens end, their text is not shown, padding of the vocabulary is never sampled, ignore_eos goes on."""
    size = renderer.tokenizer.vocab_size
    model = small.model(size + 50)
    engine = Engine(model, renderer)
    end = renderer.stop_ids[0]
    done = engine.generate(["the cat"], Sampling(20, temperature=0, logit_bias={end: 100.0}))[0]
    assert (done.ids, done.text, done.finish_reason) == ((end,), "", "stop")
    done = engine.generate(["the cat"], Sampling(4, temperature=0, logit_bias={end: 100.0}, ignore_eos=True))[0]
    assert (done.ids, done.text, done.finish_reason) == ((end,) * 4, "", "length")
    answers = engine.generate([[{"role": "user", "content": "hi"}]], Sampling(40, temperature=5.0, seed=0, n=8, ignore_eos=True))
    assert all(t < size for c in answers for t in c.ids)
    assert [c.index for c in answers] == list(range(8))
    assert len({c.text for c in answers}) == 8
    events = list(engine.stream("the cat", Sampling(12, seed=1)))
    assert "".join(e.text for e in events) == engine.generate(["the cat"], Sampling(12, seed=1))[0].text
    with pytest.raises(ArtifactError, match="does not fit"):
        Engine(small.model(size - 1), renderer)


def test_a_stream_that_is_closed_is_cancelled(model: Any) -> None:
    """Ctrl-C in the chat must not leave a sequence running."""
    engine = Engine(model, slots=1)
    events = engine.stream(prompts()[0], Sampling(50))
    next(events)
    events.close()
    assert engine.idle and engine.scheduler.slots.used == 0


def test_files_stay_readable(root: Path) -> None:
    """Four nouns in small files: no function of the engine over 55 lines."""
    import ast

    for file in (root / "tutelage" / "engine").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 55, f"{file.name}: {node.name}"


def test_filters_of_one_row_leave_the_others_alone(model: Any) -> None:
    """Rows with other filters share one sort; a narrow one must not cut the wide ones."""
    ways = [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.02}, {}, {"top_k": 40, "top_p": 0.95}, {"top_k": 2, "min_p": 0.1}]
    for mix in (ways, [w for w in ways if w != {"top_p": 0.5}]):
        sampling = [Sampling(6, temperature=2.0, seed=i, **w) for i, w in enumerate(mix)]
        alone = [Engine(model).generate([[1, 2]], s)[0].ids for s in sampling]
        assert [c.ids for c in Engine(model).generate([[1, 2]] * len(mix), sampling)] == alone
