"""Fields beyond OpenAI's, as vLLM names them, through `extra_body` of the real `openai` client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from tests.engine import small
from tests.serve.running import Running
from tutelage.chat.render import Renderer
from tutelage.engine import Engine, Sampling
from tutelage.models.interface import Batch
from tutelage.serve.app import create_app

NAME, HI = "tiny", [{"role": "user", "content": "the cat"}]
QUIET = "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}{{ 'one two\\n' }}{% endif %}"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    plain = small.renderer(tmp_path_factory.mktemp("tokenizer") / "t")
    renderer = Renderer(plain.tokenizer, plain.source.rstrip() + QUIET)
    return Engine(small.model(renderer.tokenizer.vocab_size, 256), renderer, slots=4)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[openai.OpenAI]:
    running = Running(create_app(engine, engine.renderer, NAME))
    yield running.client()
    running.close()


def chat(client: openai.OpenAI, messages: Any = HI, **more: Any) -> Any:
    how: dict[str, Any] = {"max_tokens": 6, "temperature": 1.3, "seed": 4, **more}
    return client.chat.completions.create(model=NAME, messages=messages, **how)


def text(client: openai.OpenAI, prompt: Any, **more: Any) -> Any:
    how: dict[str, Any] = {"max_tokens": 6, "temperature": 1.3, "seed": 4, **more}
    return client.completions.create(model=NAME, prompt=prompt, **how)


def listed(engine: Engine, ids: list[int], top: int) -> list[dict[int, tuple[float, int]]]:
    """For each token but the first what a whole pass of the model says: token -> (log-probability, rank)."""
    with torch.inference_mode():
        rows = engine.model.logits(Batch.of([ids]))[0].log_softmax(-1)
    out = []
    for row, token in zip(rows, ids[1:], strict=False):
        order = row.argsort(descending=True).tolist()
        out.append({t: (float(row[t]), order.index(t) + 1) for t in [token, *order[:top]]})
    return out


def test_prompt_logprobs(client: openai.OpenAI, engine: Engine) -> None:
    """RL and perplexity over HTTP: a shift by one, the wrong rank, or the shape of another server."""
    prompts = [engine.encode("the cat sat on 🙂"), engine.encode("one two")]
    choices = text(client, prompts, n=2, extra_body={"prompt_logprobs": 2}).choices
    whole = chat(client, extra_body={"prompt_logprobs": 0})
    said = [(prompts[0], choices[1].prompt_logprobs, 2), (prompts[1], choices[2].prompt_logprobs, 2)]
    for ids, got, top in [*said, (engine.renderer.prompt(HI), whole.prompt_logprobs, 0)]:
        assert got[0] is None and len(got) == len(ids)
        for row, want in zip(got[1:], listed(engine, ids, top), strict=True):
            assert [int(t) for t in row] == list(want)
            assert [e["rank"] for e in row.values()] == [rank for _, rank in want.values()]
            assert [e["logprob"] for e in row.values()] == pytest.approx([p for p, _ in want.values()], abs=1e-4)
            names = [engine.vocabulary.raw(t).decode("utf-8", "replace") for t in want]  # type: ignore[union-attr]
            assert [e["decoded_token"] for e in row.values()] == names
    assert not hasattr(whole.choices[0], "prompt_logprobs") and not hasattr(choices[0], "prompt_token_ids")
    for stream in (chat, text):
        with pytest.raises(openai.BadRequestError) as caught:
            stream(client, *(["x"] if stream is text else []), stream=True, extra_body={"prompt_logprobs": 1})
        assert caught.value.param == "prompt_logprobs"


def test_token_ids(client: openai.OpenAI, engine: Engine) -> None:
    """Text does not always tokenize back: who trains on answers needs the tokens, each with its log-probability, the last too."""
    how: dict[str, Any] = {"n": 3, "max_tokens": 40, "extra_body": {"return_token_ids": True}}
    how["logit_bias"] = {str(t): 4 for t in engine.codec.ends}
    sampling = Sampling(40, temperature=1.3, seed=4, n=3, logit_bias=dict.fromkeys(engine.codec.ends, 4.0))
    for ask, prompt, logprobs in ((chat, HI, {"logprobs": True}), (text, "the cat", {"logprobs": 0})):
        want = engine_answers(engine, prompt, sampling)
        whole = ask(client, prompt, **how, **logprobs)
        assert [c.token_ids for c in whole.choices] == [list(c.ids) for c in want]
        assert any(c.finish_reason == "stop" and len(c.token_ids) > 1 for c in whole.choices)
        for choice in whole.choices:
            given = choice.logprobs.content if ask is chat else choice.logprobs.tokens
            assert len(given) == len(choice.token_ids)
        owner = whole if ask is chat else whole.choices[2]
        assert owner.prompt_token_ids == list(want[0].prompt)
        chunks = list(ask(client, prompt, **how, stream=True))
        assert [c.prompt_token_ids for c in chunks if hasattr(c, "prompt_token_ids")] == [list(want[0].prompt)] * (ask is chat)
        parts = [c.choices[0] for c in chunks]
        firsts = [p.prompt_token_ids for p in parts if hasattr(p, "prompt_token_ids")]
        assert firsts == [list(want[0].prompt)] * (3 * (ask is text))
        for number, done in enumerate(want):
            assert [t for p in parts if p.index == number for t in p.token_ids] == list(done.ids)
    assert not hasattr(chat(client).choices[0], "token_ids")


def engine_answers(engine: Engine, prompt: Any, sampling: Sampling) -> Any:
    return Engine(engine.model, engine.renderer, slots=1).generate([prompt], sampling)


def test_min_tokens_and_stops(client: openai.OpenAI, engine: Engine) -> None:
    """An answer that ends too early, a stop token that is shown, or one that is not although it was asked for."""
    end = next(iter(engine.codec.ends))
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "logit_bias": {str(end): 100}}
    assert text(client, "the cat", **asked).usage.completion_tokens == 1
    late = text(client, "the cat", **asked, extra_body={"min_tokens": 7, "return_token_ids": True}).choices[0]
    assert (late.finish_reason, len(late.token_ids), late.token_ids[-1]) == ("stop", 8, end) and end not in late.token_ids[:-1]

    free = text(client, "one two", max_tokens=30, extra_body={"ignore_eos": True, "return_token_ids": True}).choices[0]
    at = next(i for i in range(5, 30) if free.token_ids.index(free.token_ids[i]) == i and engine.vocabulary.of(free.token_ids[i]))
    stop = free.token_ids[at]
    body = {"ignore_eos": True, "return_token_ids": True, "stop_token_ids": [stop]}
    cut = text(client, "one two", max_tokens=30, extra_body=body).choices[0]
    assert (cut.token_ids, cut.finish_reason) == (free.token_ids[: at + 1], "stop")
    shown = text(client, "one two", max_tokens=30, extra_body={**body, "include_stop_str_in_output": True}).choices[0]
    assert shown.text == cut.text + engine.vocabulary.bytes[stop].decode("utf-8", "replace") and len(shown.text) > len(cut.text)
    assert free.text.startswith(shown.text.rstrip("\ufffd"))


def test_stop_texts_in_the_output_and_not_too_soon(client: openai.OpenAI) -> None:
    """A stop text swallowed although it was asked for; one in the first tokens that ends the answer; streams that differ."""
    plain = text(client, "one two", max_tokens=60, extra_body={"ignore_eos": True}).choices[0].text
    stop = plain[10:13]
    for body, want in (
        ({"include_stop_str_in_output": True}, plain[: plain.index(stop) + len(stop)]),
        ({"min_tokens": 60}, plain),
    ):
        how: dict[str, Any] = {"max_tokens": 60, "stop": ["never", stop], "extra_body": {"ignore_eos": True, **body}}
        assert text(client, "one two", **how).choices[0].text == want
        assert "".join(c.choices[0].text for c in text(client, "one two", stream=True, **how)) == want


def test_special_tokens_are_shown_where_asked(client: openai.OpenAI, engine: Engine) -> None:
    """Marks of a conversation that a text has lost; the text is the tokenizer's own."""
    end = engine.renderer.end_of_turn_id
    body = {"ignore_eos": True, "return_token_ids": True, "skip_special_tokens": False}
    how: dict[str, Any] = {"max_tokens": 8, "logit_bias": {str(end): 14}, "seed": 1}
    got = text(client, "the cat", extra_body=body, **how).choices[0]
    name = engine.vocabulary.names[end]  # type: ignore[union-attr]
    assert name in got.text and got.text == engine.renderer.tokenizer.decode(got.token_ids)
    hidden = text(client, "the cat", extra_body={**body, "skip_special_tokens": True}, **how).choices[0]
    assert hidden.text == got.text.replace(name, "")


def test_what_the_template_is_told(client: openai.OpenAI, engine: Engine) -> None:
    """A name that no template reads, taken without a word; one that changes what the server itself tells it."""

    def ids(**body: Any) -> list[int]:
        return chat(client, max_tokens=1, extra_body={"return_token_ids": True, **body}).prompt_token_ids

    plain = ids()
    quiet = ids(chat_template_kwargs={"enable_thinking": False})
    assert quiet[: len(plain)] == plain and engine.renderer.tokenizer.decode(quiet[len(plain) :]) == "one two\n"
    assert ids(chat_template_kwargs={}) == ids(chat_template_kwargs={"enable_thinking": True}) == plain
    assert ids(add_generation_prompt=False) == engine.renderer.prompt(HI, add_generation_prompt=False) != plain
    for wrong in ("enabel_thinking", "messages", "tools", "add_generation_prompt", "eos_token", "raise_exception"):
        with pytest.raises(openai.BadRequestError, match=wrong) as caught:
            ids(chat_template_kwargs={wrong: False})
        assert caught.value.param == "chat_template_kwargs"
    with pytest.raises(openai.BadRequestError, match="control token"):
        ids(chat_template_kwargs={"enable_thinking": engine.vocabulary.names[engine.renderer.end_of_turn_id]})  # type: ignore[union-attr]


def test_a_begun_answer_is_continued(client: openai.OpenAI, engine: Engine) -> None:
    """A prefill that was closed with an end token, so that the model answers something else."""
    begun = [*HI, {"role": "assistant", "content": "the dog sat"}]
    got = chat(client, begun, extra_body={"continue_final_message": True, "return_token_ids": True})
    want = [*engine.renderer.prompt(HI), *engine.renderer.tokenizer.encode_text("the dog sat")]
    assert got.prompt_token_ids == want
    assert got.choices[0].message.content == engine_answers(engine, want, Sampling(6, temperature=1.3, seed=4))[0].text
    for messages, body in ((HI, {}), (begun, {"add_generation_prompt": True})):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, messages, extra_body={"continue_final_message": True, **body})
        assert caught.value.param in ("messages", "continue_final_message")


BAD = [
    ({"prompt_logprobs": 21}, "prompt_logprobs"), ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"), ({"stop_token_ids": ["x"]}, "stop_token_ids"),
    ({"min_tokens": 7}, "min_tokens"), ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 2, "structured_outputs": {"choice": ["a"]}}, "min_tokens"),
    ({"use_beam_search": True}, "use_beam_search"), ({"truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
    ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), BAD, ids=[str(b) for b, _ in BAD])
def test_what_cannot_be_done_is_refused(client: openai.OpenAI, body: dict[str, Any], param: str) -> None:
    """A field that is taken and not done."""
    for ask in (lambda: chat(client, extra_body=body), lambda: text(client, "x", extra_body=body)):
        with pytest.raises(openai.BadRequestError) as caught:
            ask()
        assert caught.value.param == param


def test_null_asks_for_nothing(client: openai.OpenAI) -> None:
    """Clients that send every field of theirs, and null where nothing is meant; a required one is still missed."""
    nothing: dict[str, Any] = dict.fromkeys(("audio", "prediction", "web_search_options", "ignore_eos", "guided_json", "top_k"))
    assert chat(client, extra_body=nothing).choices[0].message.content == chat(client).choices[0].message.content
    with pytest.raises(openai.BadRequestError) as caught:
        text(client, None)
    assert caught.value.param == "prompt"


def test_only_the_prompt(client: openai.OpenAI, engine: Engine) -> None:
    """`max_tokens: 0` of evaluation harnesses: an error, or a token that nobody asked for."""
    ids = engine.encode("the cat sat")
    want = text(client, [ids, ids[:4]], echo=True, logprobs=2, max_tokens=1).choices
    got = text(client, [ids, ids[:4]], echo=True, logprobs=2, max_tokens=0)
    assert got.usage.completion_tokens == 0 and got.usage.prompt_tokens == len(ids) + 4
    for one, longer, count in zip(got.choices, want, (len(ids), 4), strict=True):
        assert (one.finish_reason, one.text) == ("length", longer.text[: len(one.text)]) and one.text
        assert one.logprobs.tokens == longer.logprobs.tokens[:count]
        assert one.logprobs.token_logprobs == longer.logprobs.token_logprobs[:count]
    parts = [c.choices[0] for c in text(client, ids, echo=True, logprobs=2, max_tokens=0, stream=True)]
    assert "".join(p.text for p in parts) == got.choices[0].text and parts[-1].finish_reason == "length"
    for how in ({}, {"echo": True}, {"logprobs": 1}):
        with pytest.raises(openai.BadRequestError) as caught:
            text(client, "x", max_tokens=0, **how)
        assert caught.value.param == "max_tokens"


def test_more_answers_than_slots(client: openai.OpenAI, engine: Engine) -> None:
    """Answers that wait for a place and are lost, or come under another's number, whole and in streams."""
    want = [c.text for c in engine_answers(engine, "the cat", Sampling(9, temperature=1.3, seed=4, n=11))]
    assert [c.text for c in text(client, "the cat", n=11, max_tokens=9).choices] == want and len(set(want)) > 5
    said, ended = [""] * 11, []
    for chunk in text(client, "the cat", n=11, max_tokens=9, stream=True):
        choice = chunk.choices[0]
        said[choice.index] += choice.text
        ended += [choice.index] if choice.finish_reason else []
    assert said == want and sorted(ended) == list(range(11))
    talk = [""] * 3
    for chunk in chat(client, n=3, stream=True, max_tokens=9):
        talk[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert talk == [c.message.content for c in chat(client, n=3, max_tokens=9).choices] and len(set(talk)) == 3


def test_without_max_tokens(client: openai.OpenAI, engine: Engine) -> None:
    """A chat that stops after OpenAI's old 16 tokens; a text that goes on to the end of the context."""
    rest = engine.context_length - len(engine.renderer.prompt(HI))
    got = client.chat.completions.create(model=NAME, messages=HI, seed=1, extra_body={"ignore_eos": True})
    assert (got.usage.completion_tokens, got.choices[0].finish_reason) == (rest, "length")
    assert client.completions.create(model=NAME, prompt="x", extra_body={"ignore_eos": True}).usage.completion_tokens == 16


def test_a_typo_is_told_from_what_is_not_supported(client: openai.OpenAI) -> None:
    for name, advice in (("temprature", "; did you mean temperature?"), ("guided_whim", "")):
        with pytest.raises(openai.BadRequestError) as error:
            chat(client, extra_body={name: 0})
        assert error.value.param == name and f"{name} is not supported by this server{advice}" in str(error.value)
